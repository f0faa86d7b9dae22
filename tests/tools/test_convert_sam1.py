"""SAM 1 in both forms it comes in, to checkpoints of ours."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from lens_jax import checkpoints
from lens_jax.convert_weights import from_torch, lens_table, parameter_shapes
from lens_jax.convert_weights.export import to_torch
from lens_jax.convert_weights.sam1 import (
    HF_MATRIX_AGAIN,
    hf_source,
    original_encoder_name,
    recognise,
)
from lens_jax.convert_weights.verify import verify
from lens_jax.files import CheckpointError
from lens_jax.model_configs.lens import read_lens
from lens_jax.model_configs.sam import write_sam1
from lens_jax.models.sam.config import SAM_PRESETS
from tests import sam1
from tests.golden import weights as golden

torch = pytest.importorskip("torch")

GOLDEN = Path(os.environ.get("LENS_GOLDEN_DIR", Path(__file__).parents[1] / "golden" / "data"))
CONFIG = sam1.CONFIG


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return sam1.tensors()


@pytest.fixture(scope="module")
def mllm(tmp_path_factory) -> Path:
    return golden.write_mllm(GOLDEN, tmp_path_factory.mktemp("official") / "mllm")


def read_back(directory: Path) -> dict[str, np.ndarray]:
    """A converted checkpoint's SAM under its original names, through the inverse of the table."""
    config = read_lens(checkpoints.read_config(directory))
    assert config.sam == CONFIG
    params = dict(checkpoints.iterate_params(directory))
    assert set(parameter_shapes(config)) == {n for n in params if not n.startswith("unused/")}
    return {
        entry.source.removeprefix("sam."): entry.transform.inverse(params[entry.target])
        for entry in lens_table(config).entries
        if entry.source.startswith("sam.")
    }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


def test_the_original_file(mllm, tensors, tmp_path):
    file = sam1.write_original(tmp_path / "sam", tensors, write_sam1(CONFIG))
    from_torch(tmp_path / "out", mllm=mllm, sam=file)
    assert_same(read_back(tmp_path / "out"), tensors)
    assert checkpoints.read_config(tmp_path / "out")["sam"]["image_size"] == CONFIG.image_size


@pytest.mark.parametrize("with_again", [False, True])
def test_a_hugging_face_directory(mllm, tensors, tmp_path, with_again):
    """As transformers saves it, its config.json included; older files hold one matrix twice."""
    model = transformers.SamModel(transformers.SamConfig(**write_sam1(CONFIG)))
    state = {hf_source(CONFIG, name)[0]: torch.from_numpy(x.copy()) for name, x in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {HF_MATRIX_AGAIN} and not unexpected
    model.save_pretrained(tmp_path / "sam")
    if with_again:
        state[HF_MATRIX_AGAIN] = model.shared_image_embedding.positional_embedding.detach()
        arrays = {name: x.numpy() for name, x in state.items()}
        save_file(arrays, tmp_path / "sam" / "model.safetensors")
    from_torch(tmp_path / "out", mllm=mllm, sam=tmp_path / "sam")
    assert_same(read_back(tmp_path / "out"), tensors)


def test_inside_a_lens_checkpoint(tensors, tmp_path):
    official = golden.build(GOLDEN)
    official = {name: x for name, x in official.items() if not name.startswith("sam.")}
    for name in ("proj_to_sam.2.weight", "proj_to_sam.2.bias"):  # to this SAM's width
        official[name] = np.ones((CONFIG.d_model, *official[name].shape[1:]), np.float32)
    lens = tmp_path / "lens"
    golden.write_lens(GOLDEN, lens, official | {f"sam.{name}": x for name, x in tensors.items()})
    (lens / "sam_config.json").write_text(json.dumps(write_sam1(CONFIG)))
    from_torch(tmp_path / "out", lens=lens)
    assert_same(read_back(tmp_path / "out"), tensors)


@pytest.mark.parametrize("layout", ["lens", "hf"])
def test_back_to_pytorch(mllm, tensors, tmp_path, layout):
    """And here again, without a bit's change; Hugging Face's directory is one of SamModel's."""
    file = sam1.write_original(tmp_path / "sam", tensors, write_sam1(CONFIG))
    from_torch(tmp_path / "ours", mllm=mllm, sam=file)
    to_torch(tmp_path / "ours", layout, tmp_path / "theirs")
    theirs = tmp_path / "theirs"
    if layout == "lens":
        comparison = verify(tmp_path / "ours", theirs, forward=True)
        assert comparison.compared and not comparison.differences, comparison.differences
        from_torch(tmp_path / "again", lens=theirs)
    else:
        model, info = transformers.SamModel.from_pretrained(
            theirs / "sam", output_loading_info=True
        )
        assert not any(info.values()), info
        state = {name: x.numpy() for name, x in model.state_dict().items()}
        for name, x in tensors.items():
            np.testing.assert_array_equal(state[hf_source(CONFIG, name)[0]], x, err_msg=name)
        (theirs / "sam" / "sam_config.json").unlink()  # config.json says it all
        from_torch(tmp_path / "again", mllm=theirs / "mllm", sam=theirs / "sam")
    assert_same(read_back(tmp_path / "again"), tensors)


def test_published_sizes_are_told_by_shapes():
    with torch.device("meta"):
        theirs = transformers.SamModel(transformers.SamConfig()).state_dict()
    shapes = {original_encoder_name(name): tuple(x.shape) for name, x in theirs.items()}
    assert recognise(shapes) == SAM_PRESETS["vit_b"]


def test_what_goes_wrong(mllm, tensors, tmp_path):
    def errors(tensors, config) -> list[str]:
        file = sam1.write_original(tmp_path / "sam", tensors, config)
        with pytest.raises(CheckpointError) as caught:
            from_torch(tmp_path / "out", mllm=mllm, sam=file)
        assert not (tmp_path / "out").exists()
        lines = str(caught.value).splitlines()
        assert all(str(tmp_path / "sam") in line for line in lines)
        return lines

    [error] = errors(tensors, None)
    assert "no published SAM 1" in error and "sam_config.json" in error
    [error] = errors(tensors, write_sam1(CONFIG) | {"model_type": "sam2"})
    assert "sam_config.json: model_type 'sam2'" in error
    [error] = errors(tensors, {"model_type": "sam"})
    assert "sam_config.json: the key 'vision_config' is missing" in error
    broken = dict(tensors)
    del broken["mask_decoder.iou_token.weight"]
    broken["image_encoder.neck.0.weight"] = broken["image_encoder.neck.0.weight"][:, :, 0]
    broken["stranger"] = np.zeros(1, np.float32)
    missing = errors(broken, write_sam1(CONFIG))
    wanted = (
        "missing tensor sam.mask_decoder.iou_token.weight",
        "misshapen tensor sam.image_encoder.neck.0.weight: shape [16, 16, 1]",
        "unexpected tensor sam.stranger",
    )
    assert len(missing) == len(wanted)
    for text in wanted:
        assert any(text in error for error in missing), text
