"""Where images come from: class folders, fer2013.csv or the built-in faces, decoded once into uint8 arrays.

In: a DataConfig. Out: two ImageSets, train and validation. Decoded arrays are cached on disk, written by
one process and memory-mapped by all.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from dist_train.config import CLASSES, DataConfig, InputError
from dist_train.data.synthetic import EXPRESSIONS, draw_faces

logger = logging.getLogger(__name__)

CACHE_VERSION = 2
TRAIN_NAMES = ("train",)
VALIDATION_NAMES = ("validation", "valid", "val", "test")
FER2013_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FER2013_USAGES = {"Training": "train", "PublicTest": "validation"}
GRAY_MODES = ("1", "L", "LA")
MAX_PIXELS = 64_000_000  # bounds the memory that one file can take
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for a bad file
SHOWN = 20


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


def load_splits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return (train, validation) of the configured source.

    Raises InputError for a path that is missing or of an unknown layout, unreadable images (unless
    skip_bad), classes without images, and splits whose classes differ.
    """
    splits = _load_source(config)
    train = splits["train"]
    validation = splits.get("validation")
    if validation is None:
        train, validation = _split_off_validation(train, config.validation_share)
    if config.drop_leaked:
        validation = _drop_leaked(train, validation)
    _check_classes(train, validation)
    logger.info(
        "data: %d train and %d validation images, %d classes, %s",
        len(train),
        len(validation),
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
        stamp = [str(path.resolve()), *_stamp(path)]
        try:
            return _cached(config, stamp, lambda: _read_fer2013(path, config))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data.path: {path} is neither a folder nor a CSV file ({error})") from error
    files = {split: list_files(folder) for split, folder in split_folders(path).items()}
    classes = _class_names(path, files)
    stamp = [
        str(path.resolve()),
        *(s for split in files.values() for f in split for s in (str(f.relative_to(path)), *_stamp(f))),
    ]
    return _cached(config, stamp, lambda: _decode_folders(path, files, classes, config))


def _load_synthetic(config: DataConfig) -> Splits:
    validation_count = max(1, round(config.count * config.validation_share))
    counts = {"train": config.count - validation_count, "validation": validation_count}
    splits = {}
    for seed, (split, count) in enumerate(counts.items()):
        images, labels = draw_faces(count, seed=seed, size=config.image_size)
        names = [f"{split}/{EXPRESSIONS[label]}/{i}" for i, label in enumerate(labels)]
        splits[split] = ImageSet(images, labels, names, EXPRESSIONS)
    return splits


# Class folders


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the splits under `path`; one without split folders is all train."""
    found = {}
    for split, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder:
            found[split] = folder
    if "train" not in found:
        raise InputError(f"data.path: {path} has no folder train/; expected train/<class>/* and validation/<class>/*")
    return found


def list_files(folder: Path) -> list[Path]:
    """Return all image files under `folder`/<class>/, sorted, by the file endings that PIL knows."""
    endings = Image.registered_extensions()
    files = [
        file
        for kind in folder.iterdir()
        if kind.is_dir() and not kind.name.startswith(".")
        for file in kind.rglob("*")
        if file.suffix.lower() in endings
    ]
    return sorted(files)


def _class_names(path: Path, files: dict[str, list[Path]]) -> tuple[str, ...]:
    names: set[str] = set()
    for split, folder in split_folders(path).items():
        found = {kind.name for kind in folder.iterdir() if kind.is_dir() and not kind.name.startswith(".")}
        used = {file.relative_to(folder).parts[0] for file in files[split]}
        if not found:
            raise InputError(f"{folder}: no class folders; expected {folder}/<class>/*")
        if empty := sorted(found - used):
            raise InputError(f"{folder}: no images of class {', '.join(empty)}; add some or delete the folder")
        names |= found
    return tuple(sorted(names))


def _decode_folders(path: Path, files: dict[str, list[Path]], classes: tuple[str, ...], config: DataConfig) -> Splits:
    every = [file for split in files.values() for file in split]
    decoded, bad = _decode(every, config)
    _tell_bad(bad, f"{len(every)} images under {path}", config.skip_bad)
    splits = {}
    for split, folder in split_folders(path).items():
        good = [file for file in files[split] if decoded[file] is not None]
        labels = np.array([classes.index(file.relative_to(folder).parts[0]) for file in good], dtype=np.int64)
        images = _stack([decoded[file] for file in good], config.image_size)
        splits[split] = ImageSet(images, labels, [str(file.relative_to(path)) for file in good], classes)
    return splits


def _tell_bad(bad: Sequence[str], of: str, skip: bool) -> None:
    """Name all that cannot be read: in an InputError, or in a warning where it is to be left out."""
    if bad:
        listed = "; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        message = f"{len(bad)} of {of} cannot be read: {listed}"
        if not skip:
            raise InputError(f"{message}. Mend or delete them, or set data.skip_bad: true")
        logger.warning("%s. Left out (data.skip_bad)", message)


def _decode(files: Sequence[Path], config: DataConfig) -> tuple[dict[Path, np.ndarray | None], list[str]]:
    """Decode in parallel; return the arrays (uint8 [H, W] or [H, W, 3], None if unreadable) and the bad files."""

    def decode(file: Path) -> np.ndarray | Exception:
        try:
            return decode_image(file, config.image_size)
        except UNREADABLE as error:
            return error

    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        results = list(tqdm(pool.map(decode, files), "decoding", len(files), unit="image", disable=None, leave=False))
    bad = [f"{file} ({result})" for file, result in zip(files, results, strict=True) if isinstance(result, Exception)]
    return {f: None if isinstance(r, Exception) else r for f, r in zip(files, results, strict=True)}, bad


def decode_image(file: Path, size: int) -> np.ndarray:
    """Return one image file as uint8 [size, size] if it is gray, else [size, size, 3] RGB.

    It is turned as its EXIF says, then scaled and cropped around the centre to the square. Raises what PIL
    raises for a file it cannot read.
    """
    return fit_square(read_image(file), size)


def read_image(file: Path) -> Image.Image:
    """Return one image file (of an animation: its first frame) upright, in mode L if it is gray, else RGB.

    Raises what PIL raises for a file it cannot read, and ValueError for more than MAX_PIXELS.
    """
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        if image.format == "EPS":  # PIL would have Ghostscript run it
            raise ValueError("EPS is a program, not a picture")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):  # 16-bit gray: PIL would clip to 8 bits, not scale
            values = np.nan_to_num(np.asarray(upright, dtype=np.float32)).clip(0)
            upright = Image.fromarray((values / max(values.max(), 255.0) * 255).astype(np.uint8))
        return upright.convert("L" if upright.mode in GRAY_MODES else "RGB")


def fit_square(picture: Image.Image, size: int) -> np.ndarray:
    """Return a picture scaled and cropped around the centre: uint8 [size, size] or [size, size, 3]."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))


def _stack(arrays: Sequence[np.ndarray | None], size: int) -> np.ndarray:
    """Stack decoded images to uint8 [N, C, size, size]: gray if all are gray, else RGB."""
    images = [array for array in arrays if array is not None]
    if all(image.ndim == 2 for image in images):
        return np.stack(images)[:, None] if images else np.zeros((0, 1, size, size), np.uint8)
    colour = [np.broadcast_to(i[..., None], (size, size, 3)) if i.ndim == 2 else i for i in images]
    return np.ascontiguousarray(np.stack(colour).transpose(0, 3, 1, 2))


# fer2013.csv


def _read_fer2013(path: Path, config: DataConfig) -> Splits:
    """Read Kaggle's fer2013.csv: rows of emotion (0-6), pixels (2,304 numbers) and Usage."""
    rows: dict[str, list[tuple[np.ndarray, int, str]]] = {"train": [], "validation": []}
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
    _tell_bad(bad, f"{number + 1} rows of {path}", config.skip_bad)
    if left_out:
        logger.info("%s: %d rows of other Usage than Training and PublicTest left out", path, left_out)
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


def digest(image: np.ndarray) -> bytes:
    """Return what stands for an image's pixels: equal for equal arrays."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


# Decode cache


def _stamp(file: Path) -> tuple[str, str]:
    status = file.stat()
    return str(status.st_size), str(status.st_mtime_ns)


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of decoded images: data.cache, else dist_train in the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dist_train"


def _cached(config: DataConfig, stamp: Sequence[str], build: Callable[[], Splits]) -> Splits:
    """Return the splits that `build` makes, from the cache if the same files were decoded before."""
    key = json.dumps([CACHE_VERSION, config.image_size, config.skip_bad, sys.byteorder, *stamp])
    folder = cache_folder(config) / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if folder.exists():
        try:
            return _read_cache(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("decoded images in %s are damaged (%s) and are decoded anew", folder, error)
    splits = build()
    try:
        _write_cache(folder, splits)
        return _read_cache(folder)
    except OSError as error:
        logger.warning("cannot keep decoded images in %s (%s); set data.cache to another folder", folder, error)
        return splits


def _write_cache(folder: Path, splits: Splits) -> None:
    aside = folder.with_name(f".{folder.name}-{os.getpid()}-{time.time_ns()}")
    aside.mkdir(parents=True)
    try:
        for split, images in splits.items():
            np.save(aside / f"{split}.images.npy", images.images)
            np.save(aside / f"{split}.labels.npy", images.labels)
            meta = {"names": images.names, "classes": images.classes}
            (aside / f"{split}.json").write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.exists():  # else another node on the same file system was first
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
        splits[split] = ImageSet(images, labels, meta["names"], tuple(meta["classes"]))
    if "train" not in splits:
        raise ValueError("no train split")
    return splits
