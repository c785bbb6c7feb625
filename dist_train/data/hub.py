"""Data sets of the Hugging Face Hub, and Parquet and WebDataset shards, by way of the package `datasets`.

In: data.path. Out: Encoded splits. They are loaded in full onto the disk, in Arrow files that are memory-mapped: no
image is in memory, and each can be had at any time. A streamed data set (IterableDataset) could not be used: it is
shuffled in a buffer only and cannot be resumed exactly (huggingface/datasets#7901, huggingface/accelerate#2859), while
here order, sharding and position are exact.
"""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_train.config import DataConfig, InputError
from dist_train.data.cache import cache_folder, stamp
from dist_train.data.encoded import Encoded
from dist_train.data.folders import VALIDATION_NAMES

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "cls", "class")
SHARDS = (".parquet", ".tar")


def open_hub(config: DataConfig) -> tuple[dict[str, Encoded], tuple[str, ...], list[str]]:
    """Return the splits of data.path, the names of the classes, and what stands for the content.

    Splits: train, validation (or valid, val, test) and, besides a validation split, test. Classes are named by the
    label column if it is a ClassLabel, else by its sorted values. Raises InputError where `datasets` is not installed,
    for what it cannot load, and for columns in which image and label are not to be found.
    """
    path = config.path or ""
    loaded = _load(path, config)
    if "train" not in loaded:
        raise InputError(f"data.path: {path} has no split train, only {', '.join(loaded)}")
    chosen = {"train": loaded["train"]}
    if held_out := next((loaded[name] for name in VALIDATION_NAMES if name in loaded), None):
        chosen["validation"] = held_out
    if "test" in loaded and held_out is not loaded["test"]:
        chosen["test"] = loaded["test"]
    image, label = _find_columns(loaded["train"], path)
    values = {split: _read_labels(data, label) for split, data in chosen.items()}
    for split in [split for split, found in values.items() if None in found]:
        if split != "test":  # which is only judged where asked for
            raise InputError(f"data.path: {path} has images without a label in split {split}")
        del values[split]
    named = getattr(loaded["train"].features[label], "names", None)
    keys = range(len(named)) if named else sorted({value for found in values.values() for value in found})
    index = {key: i for i, key in enumerate(keys)}
    classes = tuple(str(name) for name in named or keys)
    found, stamps = {}, [path, image, label]
    for split, labels in values.items():
        data = chosen[split]
        found[split] = _encoded(data, image, split, np.array([index[value] for value in labels], np.int64))
        files = [Path(file["filename"]) for file in data.cache_files]
        stamps += [split, *(part for file in files for part in (str(file), *stamp(file)))]
    return found, classes, stamps


def _load(path: str, config: DataConfig) -> DatasetDict:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("data.source: hub needs datasets; pip install 'dist_train[datasets]'") from error
    cache = str(cache_folder(config) / "datasets") if config.cache else None
    builder = "parquet" if path.endswith(".parquet") else "webdataset"
    try:
        if path.endswith(SHARDS) and not Path(path).is_dir():
            return load_dataset(builder, data_files=path, cache_dir=cache)
        return load_dataset(path, cache_dir=cache)
    except Exception as error:  # a network, a disk, a file's content: all can fail in many ways
        reason = " ".join(f"{error.__cause__ or error}".split())
        raise InputError(f"data.path: {path} cannot be loaded as a Hugging Face data set ({reason})") from error


def _find_columns(data: Dataset, path: str) -> tuple[str, str]:
    """Return the columns of image and label: by their types, else by their names; of several the best known name."""
    from datasets import ClassLabel, Image

    columns = []
    for what, kind, names in (("image", Image, IMAGES), ("label", ClassLabel, LABELS)):
        typed = [name for name, feature in data.features.items() if isinstance(feature, kind)]
        known = [name for name in names if name in (typed or data.features)]
        if not (candidates := known + typed):
            raise InputError(
                f"data.path: {path} has no column of the {what}, only {', '.join(data.features)}; name it {names[0]}"
            )
        columns.append(candidates[0])
    logger.info("data: images of column %s, labels of column %s", *columns)
    return columns[0], columns[1]


def _read_labels(data: Dataset, column: str) -> list[Any]:
    """Return the values of all labels; None for an image without."""
    if column not in data.features:
        return [None] * len(data)
    values = data.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    unknown = -1 if hasattr(data.features[column], "names") else None  # a ClassLabel's sign of an image without
    return [None if value == unknown else value for value in values]


def _encoded(data: Dataset, column: str, split: str, labels: np.ndarray) -> Encoded:
    import pyarrow.compute as pc
    from datasets import Image

    data = data.select_columns([column]).cast_column(column, Image(decode=False))

    def open_image(i: int) -> Path | BytesIO:
        found = data[i][column]
        if found is None:
            raise ValueError("there is no image in this row")
        return BytesIO(found["bytes"]) if found["bytes"] is not None else Path(found["path"])

    content = pc.struct_field(data.with_format("arrow")[:].column(column), "bytes")
    sizes = pc.fill_null(pc.binary_length(content), 0).to_numpy().astype(np.int64)
    return Encoded(open_image, [f"{split}/{i}" for i in range(len(data))], labels, sizes)
