"""Image files of which any may be opened at any time, in memory decoded or streamed: whichever fits.

In: Encoded splits, of a folder or a Hugging Face data set. Out: ImageSets, whose images are the same either way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dist_train.config import DataConfig
from dist_train.data.cache import cached, remembered
from dist_train.data.decode import attempt_each, decode_image, is_gray, stack, tell_bad
from dist_train.data.imageset import ImageSet, Splits, hold_out
from dist_train.data.lazy import LazyImages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """The image files of one split.

    open: returns the path or the content of file i; names: N strings, unique within the split; labels: int64 [N],
    indices into the classes; sizes: int64 [N], bytes of each file.
    """

    open: Callable[[int], Path | BytesIO]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray

    def subset(self, index: np.ndarray) -> Encoded:
        """Return the files at the positions `index` (int64 [M])."""
        names = [self.names[i] for i in index]
        return Encoded(lambda i: self.open(int(index[i])), names, self.labels[index], self.sizes[index])


def load_encoded(
    found: dict[str, Encoded], classes: tuple[str, ...], stamp: Sequence[str], config: DataConfig
) -> Splits:
    """Return the images of all splits, decoded (and cached, by `stamp`) or to be decoded when asked for.

    data.residency auto decodes what takes less than half of this machine's free memory. Raises InputError for files
    that cannot be read, unless skip_bad leaves them out. Without a validation split a share of train is held out for
    it, before anything is decoded, so that no process needs a copy of a part. Of images to be streamed only the headers
    are read here; with skip_bad each is decoded, so that the same ones are left out. What was found is remembered: this
    is slow only the first time.
    """
    if "validation" not in found:
        held = hold_out(found["train"].labels, config.validation_share)
        parts = {"train": ~held, "validation": held}
        found = found | {split: found["train"].subset(np.flatnonzero(part)) for split, part in parts.items()}
        stamp = [f"held out {config.validation_share}", *stamp]
    count = sum(len(split.names) for split in found.values())
    auto = config.residency == "auto"
    if config.residency == "stream" or (auto and not _fits(count, 3, config)):
        looked = remembered(config, ["looked at", *stamp], lambda: _look(found, config))
        if not auto or not _fits(count, looked["channels"], config):
            logger.info("data: images are decoded when they are needed (data.residency stream)")
            return _stream(found, classes, config, looked)
    return cached(config, [str(config.image_size), *stamp], lambda: _decode(found, classes, config))


def _fits(count: int, channels: int, config: DataConfig) -> bool:
    return count * channels * config.image_size**2 < psutil.virtual_memory().available / 2


def _decode(found: dict[str, Encoded], classes: tuple[str, ...], config: DataConfig) -> Splits:
    decoded, bad = {}, {}
    for name, split in found.items():
        arrays, good, bad[name] = _attempt(split, lambda file: decode_image(file, config.image_size), config)
        decoded[name] = arrays, good
    _tell_bad(found, bad, config)
    channels = 1 if all(array.ndim == 2 for arrays, _ in decoded.values() for array in arrays) else 3
    splits = {}
    for name, split in found.items():
        arrays, good = decoded.pop(name)  # so that a split is in memory twice only while it is stacked
        splits[name] = _image_set(split, stack(arrays, config.image_size, channels), good, classes)
    return splits


def _look(found: dict[str, Encoded], config: DataConfig) -> dict[str, Any]:
    """Return the channels of all images, and each split's unreadable files."""

    def look(file: Path | BytesIO) -> bool:
        return decode_image(file, config.image_size).ndim == 2 if config.skip_bad else is_gray(file)

    gray, bad = True, {}
    for name, split in found.items():
        grays, _, bad[name] = _attempt(split, look, config)
        gray = gray and all(grays)
    _tell_bad(found, bad, config)
    return {"channels": 1 if gray else 3, "bad": {name: list(faults) for name, faults in bad.items()}}


def _stream(found: dict[str, Encoded], classes: tuple[str, ...], config: DataConfig, looked: dict[str, Any]) -> Splits:
    splits, pool = {}, _threads(config, sharing=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, split in found.items():
        good = np.setdiff1d(np.arange(len(split.names)), looked["bad"][name])
        names = [f"{config.path}/{file}" for file in split.names]
        images = LazyImages(split.open, names, good, looked["channels"], config.image_size, pool)
        splits[name] = _image_set(split, images, good, classes)
    return splits


def _attempt(
    split: Encoded, function: Callable[[Path | BytesIO], Any], config: DataConfig
) -> tuple[list[Any], np.ndarray, dict[int, str]]:
    """Return what `function` makes of the good files, their indices, and what is wrong with each of the others."""
    with _threads(config) as pool:
        results = attempt_each(lambda i: function(split.open(i)), len(split.names), pool)
    bad = {i: str(result) for i, result in enumerate(results) if isinstance(result, Exception)}
    good = np.array([i for i in range(len(results)) if i not in bad], dtype=np.int64)
    return [results[i] for i in good], good, bad


def _threads(config: DataConfig, sharing: int = 1) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(config.workers or max(1, len(os.sched_getaffinity(0)) // sharing))


def _tell_bad(found: dict[str, Encoded], bad: dict[str, dict[int, str]], config: DataConfig) -> None:
    listed = [
        f"{config.path}/{found[name].names[i]} ({why})" for name, faults in bad.items() for i, why in faults.items()
    ]
    count = sum(len(split.names) for split in found.values())
    tell_bad(listed, f"{count} images under {config.path}", config.skip_bad)


def _image_set(split: Encoded, images: np.ndarray | LazyImages, good: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    return ImageSet(images, split.labels[good], [split.names[i] for i in good], classes, split.sizes[good])
