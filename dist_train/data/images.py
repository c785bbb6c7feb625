"""Where images come from: class folders, fer2013.csv or the built-in faces, decoded once into uint8 arrays.

In: a DataConfig. Out: two ImageSets, train and validation. Decoded arrays are cached on disk, written by
one process and memory-mapped by all.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dist_train.config import CLASSES, DataConfig, InputError
from dist_train.data.cache import cached, stamp
from dist_train.data.decode import decode_files, stack, tell_bad
from dist_train.data.folders import SPLITS, Listing, list_folders, list_splits
from dist_train.data.imageset import ImageSet, Splits, digest
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
    if validation is None:
        train, validation = _split_off_validation(train, config.validation_share)
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
    kind, path = config.source, Path(config.path) if config.path is not None else None
    if path is None:
        return _load_synthetic(config)
    if not path.exists():
        raise InputError(f"data.path: {path} does not exist")
    if kind == "auto":
        kind = "folder" if path.is_dir() else "csv"
    if (kind == "folder") != path.is_dir():
        raise InputError(f"data.path: {path} is {'a folder' if path.is_dir() else 'a file'}, but data.source is {kind}")
    if kind == "csv":
        stamps = [str(path.resolve()), *stamp(path)]
        try:
            return cached(config, stamps, lambda: _read_fer2013(path, config))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data.path: {path} is neither a folder nor a CSV file ({error})") from error
    listing = list_splits(Path(config.splits), path) if config.splits else list_folders(path)
    stamps = [
        str(path.resolve()),
        *(s for split, files in listing.items() for f in files for s in (split, str(f.relative_to(path)), *stamp(f))),
    ]
    return cached(config, stamps, lambda: _decode_folders(path, listing, config))


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


def _decode_folders(path: Path, listing: Listing, config: DataConfig) -> Splits:
    every = [file for files in listing.values() for file in files]
    decoded, bad = decode_files(every, config)
    tell_bad(bad, f"{len(every)} images under {path}", config.skip_bad)
    classes = tuple(sorted({label for files in listing.values() for label in files.values()}))
    splits = {}
    for split, files in listing.items():
        good = [file for file in files if decoded[file] is not None]
        labels = np.array([classes.index(files[file]) for file in good], dtype=np.int64)
        images = stack([decoded[file] for file in good], config.image_size)
        splits[split] = ImageSet(images, labels, [str(file.relative_to(path)) for file in good], classes)
    return splits


# fer2013.csv


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
    return {
        split: ImageSet(
            np.stack([image for image, _, _ in found])[:, None],
            np.array([order[FER2013_CLASSES[emotion]] for _, emotion, _ in found], dtype=np.int64),
            [name for _, _, name in found],
            CLASSES,
        )
        for split, found in rows.items()
        if found
    }


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


def _split_off_validation(train: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Move a seeded share of each class from train to validation; at least one image of each."""
    random = np.random.default_rng(0)
    chosen = np.zeros(len(train), dtype=bool)
    for label in range(len(train.classes)):
        members = random.permutation(np.flatnonzero(train.labels == label))
        chosen[members[: max(1, round(len(members) * share))]] = True
    logger.info("data: no validation split; %.0f %% of each class of train is held out for it", 100 * share)
    return train.subset(np.flatnonzero(~chosen)), train.subset(np.flatnonzero(chosen))


def _drop_leaked(train: ImageSet, validation: ImageSet) -> ImageSet:
    leaked = find_leaked(train, validation)
    logger.info("data: %d validation images that are also in train left out", leaked.sum())
    return validation.subset(np.flatnonzero(~leaked))


def find_leaked(train: ImageSet, validation: ImageSet) -> np.ndarray:
    """Return which validation images, bool [N], have the very pixels of an image of train."""
    seen = {digest(image) for image in train.images}
    return np.array([digest(image) in seen for image in validation.images], dtype=bool)
