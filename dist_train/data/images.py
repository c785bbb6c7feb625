"""Where images come from: class folders, Hugging Face data sets, fer2013.csv or the built-in faces.

In: a DataConfig. Out: two ImageSets, train and validation. Images are decoded once into uint8 arrays, which are cached
on disk, written by one process and memory-mapped by all; those that do not fit in memory are decoded when needed.
"""

from __future__ import annotations

import csv
import glob
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dist_train.config import CLASSES, DataConfig, InputError
from dist_train.data.cache import cached, stamp
from dist_train.data.decode import tell_bad
from dist_train.data.encoded import Encoded, load_encoded
from dist_train.data.folders import SPLITS, list_folders, list_splits
from dist_train.data.hub import SHARDS, open_hub
from dist_train.data.imageset import ImageSet, Splits, hold_out
from dist_train.data.synthetic import EXPRESSIONS, draw_faces

logger = logging.getLogger(__name__)

FER2013_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FER2013_USAGES = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}


def load_splits(config: DataConfig, held_out: str = "validation") -> tuple[ImageSet, ImageSet]:
    """Return (train, validation) of the configured source; with held_out "test", (train, test).

    Raises InputError for a path that is missing or of an unknown layout, unreadable images (unless
    skip_bad), classes without images, and splits whose classes differ.
    """
    splits = _load_source(config)
    train = splits["train"]
    validation = splits.get(held_out)
    if validation is None and held_out == "test":
        raise InputError(
            f"data: {config.path or 'the built-in faces'} has no test split; name its images in data.splits"
        )
    assert validation is not None  # every source holds some of train out where it has none
    if config.drop_leaked:
        validation = _drop_leaked(train, validation)
    _check_classes(train, validation)
    logger.info(
        "data: %d train and %d %s images, %d classes, %s",
        len(train),
        len(validation),
        held_out,
        len(train.classes),
        "x".join(str(n) for n in train.images.shape[1:]),
    )
    return train, validation


def _load_source(config: DataConfig) -> Splits:
    kind: str = config.source
    if config.path is None:
        kind = "synthetic"
    elif kind == "auto":
        kind = _kind(config.path)
    if config.residency == "stream" and kind in ("csv", "synthetic"):
        raise InputError(
            f"data.residency: stream needs image files that can be read one by one; source {kind} has none"
        )
    if config.splits and kind != "folder":
        raise InputError(f"data.splits: {config.splits} given, but it is for the images of a folder (data.path)")
    if config.path is None:
        return _load_synthetic(config)
    if kind == "hub":
        return load_encoded(*open_hub(config), config)
    path = Path(config.path)
    if not path.exists():
        raise InputError(f"data.path: {path} does not exist; a data set of the Hugging Face Hub needs data.source hub")
    if (kind == "folder") != path.is_dir():
        raise InputError(f"data.path: {path} is {'a folder' if path.is_dir() else 'a file'}, but data.source is {kind}")
    return _load_folder(path, config) if kind == "folder" else _load_csv(path, config)


def _kind(path: str) -> str:
    """Return folder, csv or hub: what a path is by its looks."""
    folder = Path(path)
    if folder.is_dir():
        shards = (file for pattern in ("*", "*/*") for end in SHARDS for file in folder.glob(pattern + end))
        return "folder" if next(shards, None) is None else "hub"
    return "hub" if path.endswith(SHARDS) and ("://" in path or glob.has_magic(path) or folder.is_file()) else "csv"


def _load_synthetic(config: DataConfig) -> Splits:
    validation_count = max(1, round(config.count * config.validation_share))
    counts = {"train": config.count - validation_count, "validation": validation_count}
    splits = {}
    for seed, (split, count) in enumerate(counts.items()):
        images, labels = draw_faces(count, seed=seed, size=config.image_size)
        names = [f"{split}/{EXPRESSIONS[label]}/{i}" for i, label in enumerate(labels)]
        splits[split] = ImageSet(images, labels, names, EXPRESSIONS)
    return splits


# Folders


def _load_folder(path: Path, config: DataConfig) -> Splits:
    listing = list_splits(Path(config.splits), path) if config.splits else list_folders(path)
    classes = tuple(sorted({label for files in listing.values() for label in files.values()}))
    index = {label: i for i, label in enumerate(classes)}
    found, stamps = {}, [str(path.resolve())]
    for split, files in listing.items():
        names, marks = [str(file.relative_to(path)) for file in files], [stamp(file) for file in files]
        labels, sizes = ([index[label] for label in files.values()], [int(size) for size, _ in marks])
        stamps += [part for name, mark in zip(names, marks, strict=True) for part in (split, name, *mark)]
        opener = partial(_file_of, path, names)
        found[split] = Encoded(opener, names, np.array(labels, np.int64), np.array(sizes, np.int64))
    return load_encoded(found, classes, stamps, config)


def _file_of(folder: Path, names: list[str], i: int) -> Path:
    return folder / names[i]


# fer2013.csv


def _load_csv(path: Path, config: DataConfig) -> Splits:
    stamps = [str(config.image_size), str(config.validation_share), str(path.resolve()), *stamp(path)]
    try:
        return cached(config, stamps, lambda: _read_fer2013(path, config))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.path: {path} is neither a folder nor a CSV file ({error})") from error


def _read_fer2013(path: Path, config: DataConfig) -> Splits:
    """Read Kaggle's fer2013.csv: rows of emotion (0-6), pixels (2,304 numbers) and Usage."""
    rows: dict[str, list[tuple[np.ndarray, int, str]]] = {split: [] for split in SPLITS}
    left_out, bad, number = 0, [], 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        fields = [name.strip() for name in reader.fieldnames or []]
        if missing := {"emotion", "pixels", "Usage"} - set(fields):
            raise InputError(f"{path}: no column {', '.join(sorted(missing))}; expected emotion, pixels, Usage")
        reader.fieldnames = fields
        for number, row in enumerate(tqdm(reader, "reading", unit="image", disable=None, leave=False)):
            split = FER2013_USAGES.get((row["Usage"] or "").strip())
            if split is None:
                left_out += 1
                continue
            try:
                rows[split].append((*_parse_fer2013_row(row, config.image_size), str(number)))
            except (ValueError, OverflowError, AttributeError, TypeError) as error:
                bad.append(f"data row {number} ({error})")
    tell_bad(bad, f"{number + 1} rows of {path}", config.skip_bad)
    if left_out:
        logger.info("%s: %d rows of other Usage than %s left out", path, left_out, ", ".join(FER2013_USAGES))
    if not rows["train"]:
        raise InputError(f"{path}: no row with Usage Training")
    order = {name: CLASSES.index(name) for name in FER2013_CLASSES}
    splits = {
        split: ImageSet(
            np.stack([image for image, _, _ in found])[:, None],
            np.array([order[FER2013_CLASSES[emotion]] for _, emotion, _ in found], dtype=np.int64),
            [name for _, _, name in found],
            CLASSES,
        )
        for split, found in rows.items()
        if found
    }
    if "validation" not in splits:
        held = hold_out(splits["train"].labels, config.validation_share)
        parts = {"train": ~held, "validation": held}
        splits |= {split: splits["train"].subset(np.flatnonzero(chosen)) for split, chosen in parts.items()}
    return splits


def _parse_fer2013_row(row: dict[str, str], size: int) -> tuple[np.ndarray, int]:
    emotion = int(row["emotion"])
    if not 0 <= emotion < len(FER2013_CLASSES):
        raise ValueError(f"emotion {emotion} is not one of 0 to 6")
    pixels = np.array(row["pixels"].split(), dtype=np.uint8)
    side = round(len(pixels) ** 0.5)
    image = Image.fromarray(pixels.reshape(side, side))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)), emotion


# Checks and choices on whole splits


def _check_classes(train: ImageSet, validation: ImageSet) -> None:
    for split, images in (("train", train), ("validation", validation)):
        if not len(images):
            raise InputError(f"data: the {split} split has no images")
        present = Counter(images.labels.tolist())
        if missing := [name for label, name in enumerate(images.classes) if not present[label]]:
            raise InputError(
                f"data: class {', '.join(missing)} has no images in the {split} split; "
                "every class must be in both splits"
            )
    if len(train.classes) < 2:
        raise InputError(f"data: only one class, {train.classes[0]}; a classifier needs two or more")


def _drop_leaked(train: ImageSet, validation: ImageSet) -> ImageSet:
    leaked = find_leaked(train, validation)
    logger.info("data: %d validation images that are also in train left out", leaked.sum())
    return validation.subset(np.flatnonzero(~leaked))


def find_leaked(train: ImageSet, validation: ImageSet) -> np.ndarray:
    """Return which validation images, bool [N], have the very pixels of an image of train."""
    seen = set(train.digests())
    return np.array([found in seen for found in validation.digests()], dtype=bool)
