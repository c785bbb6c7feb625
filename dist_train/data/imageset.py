"""ImageSet: the images of one split, in memory or decoded when asked for, with labels, names and classes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dist_train.data.lazy import LazyImages

AT_ONCE = 256
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    images: uint8 [N, C, H, W], C 1 (gray) or 3 (RGB); labels: int64 [N], indices into classes;
    names: N strings, unique within the split; sizes: int64 [N], bytes of the file of each image, if it has one.
    """

    images: np.ndarray | LazyImages
    labels: np.ndarray
    names: list[str]
    classes: tuple[str, ...]
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> ImageSet:
        """Return the samples at the positions `index` (int [M])."""
        images = self.images.select(index) if isinstance(self.images, LazyImages) else self.images[index]
        sizes = None if self.sizes is None else self.sizes[index]
        return ImageSet(images, self.labels[index], [self.names[i] for i in index], self.classes, sizes)

    def fingerprint(self) -> str:
        """Return a digest of labels, classes and pixels; of files, names and sizes stand for the pixels.

        So it is the same for images in memory and those decoded when asked for, and for a copy of the files.
        """
        found = hashlib.blake2b(repr((self.images.shape, self.classes)).encode(), digest_size=16)
        if self.sizes is None:
            found.update(np.ascontiguousarray(self.images[:]).data)
        else:
            found.update(repr(self.names).encode() + self.sizes.tobytes())
        found.update(np.ascontiguousarray(self.labels).data)
        return found.hexdigest()

    def digests(self) -> Iterator[bytes]:
        """Yield what stands for each image's pixels, while few images are in memory."""
        for start in range(0, len(self), AT_ONCE):
            yield from map(digest, self.images[start : start + AT_ONCE])


Splits = dict[str, ImageSet]


def hold_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Return which samples are for validation where there is no such split, bool [N]: a seeded share of each class.

    labels: int64 [N]. At least one sample of each class is chosen.
    """
    logger.info("data: no validation split; %.0f %% of each class of train is held out for it", 100 * share)
    random = np.random.default_rng(0)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(len(members) * share))]] = True
    return chosen


def digest(image: np.ndarray) -> bytes:
    """Return what stands for an image's pixels: equal for equal arrays."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
