"""ImageSet: the images of one split in memory, with labels, names and classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    images: uint8 [N, C, H, W], C 1 (gray) or 3 (RGB); labels: int64 [N], indices into classes;
    names: N strings, unique within the split.
    """

    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> ImageSet:
        """Return the samples at the positions `index` (int [M])."""
        return ImageSet(self.images[index], self.labels[index], [self.names[i] for i in index], self.classes)

    def fingerprint(self) -> str:
        """Return a digest of pixels, labels and classes."""
        digest = hashlib.blake2b(repr((self.images.shape, self.classes)).encode(), digest_size=16)
        for array in (self.images, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


Splits = dict[str, ImageSet]


def digest(image: np.ndarray) -> bytes:
    """Return what stands for an image's pixels: equal for equal arrays."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
