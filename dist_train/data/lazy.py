"""LazyImages: the images of one split, decoded when they are asked for.

In: how to open each image's file. Out: what looks like a uint8 array of them all, and holds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import InputError
from dist_train.data.decode import decode_image, stack


@dataclass(frozen=True)
class LazyImages:
    """Images that are decoded, by the threads of `pool`, each time they are asked for.

    open: returns the path or the content of file i; names: of the files, for errors; index: int64 [N], the files
    that are images here; channels: 1 (then all must be gray) or 3; size: the side of the squares.
    """

    open: Callable[[int], Path | BytesIO]
    names: Sequence[str]
    index: np.ndarray
    channels: int
    size: int
    pool: ThreadPoolExecutor

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.index), self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return the images at `key` as of an array's first axis: uint8 [B, C, size, size], of one [C, size, size].

        Raises InputError, which names the image, for one that cannot be read.
        """
        files = self.index[key]
        arrays = list(self.pool.map(self._decode, np.atleast_1d(files).tolist()))
        images = stack(arrays, self.size, self.channels)
        return images if np.ndim(files) else images[0]

    def select(self, index: np.ndarray) -> LazyImages:
        """Return those at the positions `index` (int [M]), still to be decoded."""
        return dataclasses.replace(self, index=self.index[index])

    def _decode(self, file: int) -> np.ndarray:
        try:
            array = decode_image(self.open(file), self.size)
            if array.ndim == 3 and self.channels == 1:
                raise ValueError("it has become colour, and all were gray")
        except Exception as error:  # a damaged file can make a decoder fail in any way
            raise InputError(
                f"data: {self.names[file]} cannot be read ({error}). Put a whole file in its place and go on with "
                "--resume auto"
            ) from error
        return array
