"""What the tests of SAM 1 and SAM 2 against transformers share."""

import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models.sam.segmenter import Sam2

torch = pytest.importorskip("torch")

B, G = 2, 3
KINDS = ("points", "boxes", "points_boxes", "points_mask")


def perturb(model: torch.nn.Module) -> None:
    """Leaves no parameter at a trivial initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)


def to_numpy(state: dict) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in state.items()}


def images() -> np.ndarray:
    """Normalised pictures of 128 x 128 pixels."""
    return np.random.default_rng(0).standard_normal((B, 128, 128, 3)).astype(np.float32)


def prompts() -> dict[str, np.ndarray]:
    """A point set, boxes, and a mask for each picture, in pixels of the model's picture."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (B, G, 2))
    return {
        "points": rng.uniform(0, 127, (B, G, 2, 2)).astype(np.float32),
        "labels": np.array([[[1, 0], [1, 1], [0, -1]]] * B, np.int32),
        "boxes": np.concatenate([corner, corner + rng.uniform(5, 60, (B, G, 2))], -1).astype("f4"),
        "masks": rng.standard_normal((B, 1, 32, 32)).astype(np.float32),
    }


def close(ours, theirs, tolerance=2e-5):
    """Equal up to `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def hf_pixels(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def hf_inputs(prompts, kind):
    """Prompts of one kind as transformers' models take them."""
    points = {
        "input_points": torch.from_numpy(prompts["points"]),
        "input_labels": torch.from_numpy(prompts["labels"]),
    }
    boxes = {"input_boxes": torch.from_numpy(prompts["boxes"])}
    masks = {"input_masks": torch.from_numpy(prompts["masks"])}
    return {
        "points": points,
        "boxes": boxes,
        "points_boxes": points | boxes,
        "points_mask": points | masks,
    }[kind]


def our_prompts(model, prompts, kind):
    """The same through our prompt encoder: sparse tokens, and the dense embedding or None."""
    encoder = model.sam_prompt_encoder
    boxes = encoder.embed_boxes(prompts["boxes"])
    if isinstance(model, Sam2):  # its predictor gives boxes as labelled points and one that is none
        corners = prompts["boxes"].reshape(B, G, 2, 2)
        boxes = encoder.embed_points(corners, jnp.broadcast_to(jnp.array([2, 3]), (B, G, 2)))
    points = encoder.embed_points(prompts["points"], prompts["labels"], pad="boxes" not in kind)
    sparse = {"boxes": boxes, "points_boxes": jnp.concatenate([points, boxes], axis=2)}
    dense = encoder.embed_masks(prompts["masks"]) if "mask" in kind else None
    return sparse.get(kind, points), dense


def same_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Every tensor's gradient, relative to its largest value."""
    assert ours.keys() == theirs.keys()
    total = np.sqrt(sum(np.sum(x**2) for x in theirs.values()))
    assert total > 0
    for name, want in theirs.items():
        scale = max(np.abs(want).max(), 1e-4 * total)
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-3 * scale, err_msg=name)
