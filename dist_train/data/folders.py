"""Which image files there are, of which class and split: by folders, or by a CSV of paths and splits.

In: a folder. Out: a Listing. Nothing is decoded here.
"""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from dist_train.config import InputError

SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("validation", "valid", "val", "test")

Listing = dict[str, dict[Path, str]]
"""By split, the class of each file."""


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the splits under `path`; one without split folders is all train."""
    found = {}
    for split, names in (("train", ("train",)), ("validation", VALIDATION_NAMES)):
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder:
            found[split] = folder
    if "train" not in found:
        inside = next((f" (but {kind} has)" for kind in _kinds(path) if (kind / "train").is_dir()), "")
        expected = "expected train/<class>/* and validation/<class>/*"
        raise InputError(f"data.path: {path} has no folder train/{inside}; {expected}")
    return found


def list_files(folder: Path) -> list[Path]:
    """Return all image files under `folder`/<class>/, sorted, by the file endings that PIL knows."""
    endings = Image.registered_extensions()
    files = [file for kind in _kinds(folder) for file in kind.rglob("*") if file.suffix.lower() in endings]
    return sorted(files)


def _kinds(folder: Path) -> list[Path]:
    return [kind for kind in folder.iterdir() if kind.is_dir() and not kind.name.startswith(".")]


def list_folders(path: Path) -> Listing:
    """Return the files of train/<class>/ and validation/<class>/; InputError for a class folder without images."""
    listing: Listing = {}
    for split, folder in split_folders(path).items():
        listing[split] = {file: file.relative_to(folder).parts[0] for file in list_files(folder)}
        found = {kind.name for kind in _kinds(folder)}
        if not found:
            raise InputError(f"{folder}: no class folders; expected {folder}/<class>/*")
        if empty := sorted(found - set(listing[split].values())):
            raise InputError(f"{folder}: no images of class {', '.join(empty)}; add some or delete the folder")
    return listing


def list_splits(table: Path, path: Path) -> Listing:
    """Return the files that `table`, a CSV of path (under `path`) and split, names; the class is their folder's name.

    Raises InputError for a table that cannot be read, rows that are wrong or stand twice, and files that are missing.
    """
    listing: Listing = {split: {} for split in SPLITS}
    seen: set[str] = set()
    try:
        with table.open(newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if missing := {"path", "split"} - set(reader.fieldnames or []):
                raise InputError(f"data.splits: {table} has no column {', '.join(sorted(missing))}")
            for number, row in enumerate(reader, start=2):
                name, split = row["path"] or "", row["split"] or ""
                if split not in SPLITS:
                    raise InputError(f"data.splits: {table}, line {number}: split {split!r} is not {', '.join(SPLITS)}")
                if name in seen:
                    raise InputError(f"data.splits: {table}, line {number}: {name} stands twice")
                seen.add(name)
                listing[split][path / name] = (path / name).parent.name
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.splits: {table} cannot be read as a CSV file ({error})") from error
    if lost := [str(file) for files in listing.values() for file in files if not file.is_file()]:
        raise InputError(f"data.splits: {len(lost)} files of {table} do not exist, such as {lost[0]}")
    if not listing["train"]:
        raise InputError(f"data.splits: {table} has no row of split train")
    return {split: files for split, files in listing.items() if files}
