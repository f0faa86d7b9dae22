"""From Hugging Face's Qwen2-VL to boxes in pixels."""

import numpy as np
import pytest

from lens_jax import Lens
from lens_jax.convert_weights import from_torch
from lens_jax.inference import Responses
from tests import qwen2_vl
from tests.golden import weights as golden
from tests.launch.conftest import GOLDEN


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen2_vl")
    mllm = qwen2_vl.write_mllm(GOLDEN, root / "mllm")
    sam = golden.write_sam(GOLDEN, root / "sam")
    from_torch(output=root / "lens", mllm=mllm, sam=sam, num_queries=3)
    return Lens.from_pretrained(root / "lens")


def test_a_box_is_given_in_pixels_of_the_picture(lens, monkeypatch):
    """The text says thousandths of the sides, whatever the picture is resized to."""

    def respond(prompts, *_, **__):
        count = len(prompts.tokens)
        return Responses(
            tokens=np.zeros((count, 1), np.int32),
            lengths=np.zeros(count, np.int32),
            ended=np.ones(count, bool),
            mask_logits=np.ones((count, 4, 4), np.float32),
            box=np.tile(np.float32([100, 250, 500, 1000]), (count, 1)),
            box_found=np.ones(count, bool),
            formats={"grounding_format": np.ones(count, bool)},
        )

    monkeypatch.setattr(lens, "respond", respond)
    assert lens.config.mllm.vision.family == "qwen2_vl"
    result = lens.segment(np.zeros((60, 90, 3), np.uint8), "it")
    np.testing.assert_allclose(result.box, [9, 15, 45, 60], rtol=1e-6)
    assert result.mask.shape == (60, 90)
