"""What is wrong with a folder of images: unreadable and blank files, copies within and across splits, contrary labels.

In: a folder with train/<class>/* and, where there is one, validation/<class>/*. Out: an Audit. Files are copies of one
another if their decoded pixels are equal.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dist_train.config import InputError
from dist_train.data.decode import read_image
from dist_train.data.folders import list_files, split_folders
from dist_train.data.imageset import digest

logger = logging.getLogger(__name__)

BLANK_RANGE = 8
"""Tones, of 256, within which an image shows nothing: JPEG leaves a little noise on a plain area."""
NEAR_BITS = 2
"""Bits of 64 in which the perceptual hashes of near duplicates differ at most."""


class File(NamedTuple):
    """One image file; `pixels` stands for what it shows, `fault` says why it cannot be read, where it cannot.

    bits: its perceptual hash, bool [64]; None without imagehash and for blank images.
    """

    path: Path
    split: str
    label: str
    pixels: bytes = b""
    blank: bool = False
    bits: np.ndarray | None = None
    fault: str = ""


@dataclass(frozen=True)
class Audit:
    """All files of a folder; groups: the copies of one image, for each that has some; near: pairs of look-alikes.

    near is None where imagehash is not installed.
    """

    files: list[File]
    groups: list[list[File]]
    near: list[tuple[File, File]] | None

    def counts(self) -> dict[str, int]:
        """Return the counts that `dist-train audit --json` writes."""
        across, contrary = self.across_splits(), self.conflicting()
        return {
            "files": len(self.files),
            "distinct": len({file.pixels for file in self.files if not file.fault}),
            "duplicate_groups": len(self.groups),
            "duplicate_files": sum(map(len, self.groups)),
            "cross_split_groups": len(across),
            "leaked_validation_files": sum(file.split == "validation" for group in across for file in group),
            "conflicting_groups": len(contrary),
            "conflicting_files": sum(map(len, contrary)),
            "blank_files": len(self.blank()),
            "unreadable_files": len(self.unreadable()),
        }

    def across_splits(self) -> list[list[File]]:
        """Return the groups with files in more than one split."""
        return [group for group in self.groups if len({file.split for file in group}) > 1]

    def conflicting(self) -> list[list[File]]:
        """Return the groups with files in more than one class."""
        return [group for group in self.groups if len({file.label for file in group}) > 1]

    def blank(self) -> list[File]:
        """Return the files that show nothing: one tone, but for a little noise."""
        return [file for file in self.files if file.blank]

    def unreadable(self) -> list[File]:
        """Return the files that cannot be decoded."""
        return [file for file in self.files if file.fault]

    def per_class(self) -> dict[str, dict[str, int]]:
        """Return the number of files of each class in each split."""
        splits = sorted({file.split for file in self.files})
        counted = Counter((file.label, file.split) for file in self.files)
        return {label: {s: counted[label, s] for s in splits} for label in sorted({file.label for file in self.files})}

    def table(self) -> str:
        """Return all counts as lines of text."""
        classes = self.per_class()
        splits = list(next(iter(classes.values()), {}))
        rows = [("", *splits)] + [(name, *(f"{n:,}" for n in found.values())) for name, found in classes.items()]
        width = max(24, *(len(row[0]) for row in rows))
        lines = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows] + [""]
        lines += [f"{name.replace('_', ' ').ljust(width)}{count:>12,}" for name, count in self.counts().items()]
        near = "not looked for: pip install 'dist_train[audit]'" if self.near is None else f"{len(self.near):>12,}"
        return "\n".join([*lines, "near-duplicate pairs".ljust(width) + near])


def audit_folder(folder: str | os.PathLike[str]) -> Audit:
    """Decode and compare all images of a folder; near duplicates as well where imagehash is installed.

    Raises InputError if the folder does not exist or has no train/<class>/* in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder")
    found = [
        File(file, split, file.relative_to(place).parts[0])
        for split, place in split_folders(path).items()
        for file in list_files(place)
    ]
    if not found:
        raise InputError(f"{path} holds no images; expected {path}/train/<class>/*")
    hashing = find_spec("imagehash") is not None
    with ThreadPoolExecutor() as pool:
        looking = pool.map(lambda file: _look(file, hashing), found, chunksize=64)
        files = list(tqdm(looking, "reading", len(found), unit="image", disable=None, leave=False))
    groups: dict[bytes, list[File]] = defaultdict(list)
    for file in files:
        if not file.fault:
            groups[file.pixels].append(file)
    firsts = [group[0] for group in groups.values() if group[0].bits is not None]
    return Audit(files, [group for group in groups.values() if len(group) > 1], _find_near(firsts) if hashing else None)


def _look(file: File, hashing: bool) -> File:
    """Return the file with what its pixels say; a colour image without colours counts as gray."""
    try:
        image = read_image(file.path)
        pixels = np.asarray(image)
    except Exception as error:  # a damaged file can make a decoder fail in any way
        return file._replace(fault=str(error) or type(error).__name__)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = np.ascontiguousarray(pixels[..., 0])
    blank = bool((np.ptp(pixels, axis=(0, 1)) < BLANK_RANGE).all())
    bits = None if blank or not hashing else _hash(image)
    return file._replace(pixels=digest(pixels) + bytes(str(pixels.shape), "ascii"), blank=blank, bits=bits)


def _hash(image: Image.Image) -> np.ndarray:
    import imagehash

    return np.asarray(imagehash.phash(image).hash).ravel()


def _find_near(files: list[File]) -> list[tuple[File, File]]:
    """Return the pairs of look-alikes among files that are no copies of one another."""
    if not files:
        return []
    signs = (
        np.stack([file.bits for file in files if file.bits is not None]).astype(np.float32) * 2 - 1
    )  # product: 64 less twice the bits apart
    pairs: list[tuple[File, File]] = []
    for start in range(0, len(files), 1024):
        close = np.triu(signs[start : start + 1024] @ signs[start:].T >= signs.shape[1] - 2 * NEAR_BITS, 1)
        pairs += [(files[start + a], files[start + b]) for a, b in np.argwhere(close)]
    return pairs
