"""The cache of decoded images: written whole by one process, memory-mapped by all, made anew when the files change.

In: what the files are (their stamps) and a function that decodes them. Out: the decoded splits. What was learnt by
looking at files that are not kept decoded is remembered beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import DataConfig
from dist_train.data.imageset import ImageSet, Splits
from dist_train.files import write_file

logger = logging.getLogger(__name__)

CACHE_VERSION = 5


def stamp(file: Path) -> tuple[str, str]:
    status = file.stat()
    return str(status.st_size), str(status.st_mtime_ns)


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of decoded images: data.cache, else dist_train in the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dist_train"


def cached(config: DataConfig, stamp: Sequence[str], build: Callable[[], Splits]) -> Splits:
    """Return the splits that `build` makes, from the cache if the same files were decoded before."""
    folder = _entry(config, stamp)
    if folder.exists():
        try:
            return _read_cache(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("decoded images in %s are damaged (%s) and are decoded anew", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    splits = build()
    try:
        _write_cache(folder, splits)
        return _read_cache(folder)
    except OSError as error:
        logger.warning("cannot keep decoded images in %s (%s); set data.cache to another folder", folder, error)
        return splits


def remembered(config: DataConfig, stamp: Sequence[str], look: Callable[[], Any]) -> Any:
    """Return what `look` returns (what JSON can hold), without looking anew if the same files were looked at before."""
    file = _entry(config, stamp).with_suffix(".json")
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or damaged
        found = look()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lambda aside: aside.write_text(json.dumps(found)))
    except OSError as error:
        logger.warning("cannot keep %s (%s); set data.cache to another folder", file, error)
    return found


def _entry(config: DataConfig, stamp: Sequence[str]) -> Path:
    key = json.dumps([CACHE_VERSION, config.skip_bad, sys.byteorder, *stamp])
    return cache_folder(config) / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _write_cache(folder: Path, splits: Splits) -> None:
    aside = folder.with_name(f".{folder.name}-{os.getpid()}-{time.time_ns()}")
    aside.mkdir(parents=True)
    try:
        for split, images in splits.items():
            np.save(aside / f"{split}.images.npy", np.asarray(images.images))
            np.save(aside / f"{split}.labels.npy", images.labels)
            if images.sizes is not None:
                np.save(aside / f"{split}.sizes.npy", images.sizes)
            meta = {"names": images.names, "classes": images.classes}
            (aside / f"{split}.json").write_text(json.dumps(meta))
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.exists():  # else another node on the same file system was first, and has its images mapped
            raise


def _read_cache(folder: Path) -> Splits:
    splits = {}
    for meta_file in sorted(folder.glob("*.json")):
        split, meta = meta_file.stem, json.loads(meta_file.read_text())
        # copy-on-write: torch wants writable memory, and nobody writes
        images = np.load(folder / f"{split}.images.npy", mmap_mode="c")
        labels = np.load(folder / f"{split}.labels.npy")
        if not len(images) == len(labels) == len(meta["names"]):
            raise ValueError(f"{split} is incomplete")
        file = folder / f"{split}.sizes.npy"
        sizes = np.load(file) if file.exists() else None
        splits[split] = ImageSet(images, labels, meta["names"], tuple(meta["classes"]), sizes)
    if "train" not in splits:
        raise ValueError("no train split")
    return splits
