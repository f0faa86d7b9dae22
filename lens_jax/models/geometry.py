"""The sizes in which images are cut for a vision tower."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """Sizes of patches, merged units and windows; the defaults are those of every published model.

    A merged unit, `merge_size` x `merge_size` patches, becomes one image token.
    """

    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # times that a still image is repeated
    merge_size: int = 2  # patches
    window_size: int = 112  # pixels

    @property
    def unit_size(self) -> int:
        """Pixels on a merged unit's side: images are resized to multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def window_units(self) -> int:
        """Merged units on a window's side."""
        return self.window_size // self.patch_size // self.merge_size

    @property
    def window_side(self) -> int:
        """Patches on a window's side; whole merged units."""
        return self.window_units * self.merge_size

    @property
    def window_patches(self) -> int:
        """Patches in a window, S."""
        return self.window_side**2
