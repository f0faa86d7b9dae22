"""Window order, canvases and resizing rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_jax.data import images


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), window=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_window_layout(rows, columns, window):
    """Against the definition, slot by slot."""
    source, positions, slots = images.window_layout((2 * rows, 2 * columns), window)
    expected = []  # (patch, row, column), or None for padding
    units = []
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            for y in range(top, top + window):
                for x in range(left, left + window):
                    inside = y < rows and x < columns
                    units.append(y * columns + x if inside else None)
                    for i in (0, 1):
                        for j in (0, 1):
                            patch = (y * columns + x) * 4 + 2 * i + j
                            expected.append((patch, 2 * y + i, 2 * x + j) if inside else None)
    assert source.shape[1] == 4 * window * window and source.size == len(expected)
    flat = zip(source.reshape(-1), positions.reshape(-1, 2), expected, strict=True)
    for patch, (row, column), want in flat:
        assert (patch, row, column) == (want or (-1, 0, 0))
    assert [units[slot] for slot in slots] == list(range(rows * columns))


def test_arranged_patches_are_the_picture():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (84, 140, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    patches, grid = images.patchify(image, mean, std)
    assert grid == (6, 10)
    source, positions, _ = images.window_layout(grid, 2)
    arranged, mask = images.arrange_windows(patches, source)
    assert (arranged[~mask] == 0).all() and mask.sum() == 60
    value = ((image / 255 - mean) / std).astype(np.float32)
    for window, slot in np.argwhere(mask):
        row, column = positions[window, slot] * 14
        patch = value[row : row + 14, column : column + 14].transpose(2, 0, 1)
        pair = arranged[window, slot].reshape(3, 2, 14, 14)
        np.testing.assert_allclose(pair[:, 0], patch, atol=1e-6)
        np.testing.assert_array_equal(pair[:, 0], pair[:, 1])


@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_smart_resize_keeps_its_promises(height, width):
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            images.smart_resize(height, width)
        return
    h, w = images.smart_resize(height, width)
    assert h % 28 == 0 and w % 28 == 0 and h >= 28 and w >= 28
    assert h * w <= images.MAX_PIXELS or min(h, w) == 28
    assert h * w >= images.MIN_PIXELS


def test_mask_on_a_canvas():
    mask = np.zeros((30, 60), bool)
    mask[10:20, 20:50] = True
    assert images.fit_mask(mask, (30, 60)) is mask
    small = images.fit_mask(mask, (30, 30))
    assert small.shape == (15, 30)
    assert abs(small.mean() - mask.mean()) < 0.02 and small[7, 15] and not small[1, 1]
