"""Window order, canvases and resizing rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_jax.data import images


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), window=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_window_layout(rows, columns, window):
    """Every window lies in one row of slots, in its order; few rows are needed."""
    source, positions, slots = images.window_layout((2 * rows, 2 * columns), window)
    size = 4 * window * window
    assert source.shape[1] == size
    held = source.reshape(-1, 4)[slots]  # each unit's patches, in the order of the image tokens
    np.testing.assert_array_equal(held.reshape(-1), np.arange(4 * rows * columns))
    assert (source < 0).sum() == source.size - held.size and (positions[source < 0] == 0).all()
    for patches in source:
        filled = patches[patches >= 0]
        assert (patches[len(filled) :] < 0).all()  # padding comes last
    place = positions.reshape(-1, 4, 2)[slots].reshape(rows, columns, 2, 2, 2)
    for y, x, i, j in np.ndindex(rows, columns, 2, 2):
        assert tuple(place[y, x, i, j]) == (2 * y + i, 2 * x + j)
    slots = slots.reshape(rows, columns)
    count = 0
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            one = slots[top : top + window, left : left + window].reshape(-1)
            np.testing.assert_array_equal(one, one[0] + np.arange(len(one)))
            assert len(set(one // window**2)) == 1
            count += 1
    assert len(source) <= count
    # First fit leaves no two rows that one could hold.
    free = np.sort((source < 0).sum(1))
    assert len(free) < 2 or free[-2:].sum() < size


def test_a_coco_picture_wastes_few_slots():
    source, *_ = images.window_layout((34, 46), 4)
    assert len(source) == 25 and (source >= 0).sum() == 34 * 46


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
