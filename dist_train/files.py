"""Files that are whole or absent: written aside, brought to the disk, renamed into place, checked by their sums."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from dist_train.config import InputError

OWN_FILES = (
    "config.yaml",
    "history.csv",
    "summary.json",
    "curves.png",
    "predictions.png",
    "report.json",
    "report.html",
    "bad_samples.txt",
    "trace.json",
    "profile.csv",
    "best",
    "checkpoints",
    "wandb",
    "tensorboard",
)
"""What a run writes into its folder."""
SUMS = "SHA256SUMS"
"""Name of a sealed folder's list of checksums, which `sha256sum -c` reads too."""


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `file`, then put it in its place."""
    aside = file.with_name(f".{file.name}")
    try:
        aside.unlink(missing_ok=True)  # it may be a link to elsewhere
        write(aside)
        _sync(aside)
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def refuse_links(run_dir: Path) -> None:
    """Raise InputError if what a run writes is a link, or holds one: it would write elsewhere.

    In its own folder W&B makes links to other files there.
    """
    for part in (run_dir / name for name in OWN_FILES):
        inside = part.rglob("*") if part.name != "wandb" else ()
        for path in (part, *inside):
            if path.is_symlink():
                raise InputError(f"run_dir: {path} is a link; a run writes only into its own folder")


def seal_folder(folder: Path, target: Path) -> None:
    """Add the checksums of `folder`'s files to it, check them, then put it in the place of `target`."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines))
    for path in (*folder.iterdir(), folder):
        _sync(path)
    if fault := find_fault(folder):
        raise OSError(f"what was written is not what is there: {fault}")
    old = target.with_name(f".old_{target.name}")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    _sync(target.parent)
    if old.exists():
        remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder of files; its checksums go first, so that it is at no time taken for whole."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name != SUMS):
        file.unlink()
    folder.rmdir()


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder, or None if every file is as it was written."""
    try:
        text = (folder / SUMS).read_bytes()
        if not re.fullmatch(rb"(?:[0-9a-f]{64}  [\w.]+\n)+", text):
            return f"{SUMS} is damaged"
        sums = {name: digest for digest, name in (line.split("  ") for line in text.decode().splitlines())}
        files = {file.name for file in folder.iterdir()} - {SUMS}
        if missing := sorted(sums.keys() ^ files):
            return f"{missing[0]} is {'not listed in ' + SUMS if missing[0] in files else 'missing'}"
        damaged = [name for name, digest in sums.items() if sha256(folder / name) != digest]
        return f"{damaged[0]} is damaged" if damaged else None
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
