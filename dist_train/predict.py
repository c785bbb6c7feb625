"""predict(): labels for photographs and videos as a table, and drawn into the pictures.

In: a run folder and what to judge. Out: a row for each face (without `faces`: for each picture).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dist_train.config import InputError
from dist_train.inference import Face, Predictor
from dist_train.sources import Fault, Shot, list_files, printable, read_shots
from dist_train.table import open_table
from dist_train.tracks import Smoother

logger = logging.getLogger(__name__)

CHUNK = 32  # pictures judged at a time
INK, PAPER = "#ffffff", "#14181d"


def predict(
    run_dir: str | os.PathLike[str],
    inputs: Sequence[str],
    out: Path | None = None,
    *,
    faces: bool = False,
    pictures: Path | None = None,
    smoothing: float = 0.6,
    every: int = 1,
) -> list[Fault]:
    """Judge `inputs` (files, folders, globs, "-" for a list on standard input) with the best model of a run.

    out: a .csv, .jsonl or .parquet file, written whole or not at all; None: CSV on standard output. faces: judge each
    face that is found, not each picture. pictures: folder for annotated pictures. smoothing: share that the past has in
    a face's probabilities over a video, 0 to below 1. every: judge every n-th frame of a video. Returns the files that
    cannot be read. Raises InputError if there is nothing to judge, and for `out` or `pictures` that cannot be written.
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"--smoothing: {smoothing} is not allowed; expected a number from 0 up to, not including, 1")
    if every < 1:
        raise InputError(f"--every: {every} is not allowed; expected a whole number >= 1")
    files = list_files(inputs)
    if not files:
        raise InputError(f"{' '.join(inputs)}: no pictures or videos there")
    if pictures:
        try:
            pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--pictures: {pictures} cannot be written: {error.strerror}") from error
    predictor = Predictor(run_dir, faces=faces)
    faults: list[Fault] = []
    smoothers: dict[Path, Smoother] = {}
    shown = found = 0
    started = time.perf_counter()
    with open_table(out, columns(predictor.classes)) as write:
        for shots in _chunks(read_shots(files, every), faults):
            for shot, judged in zip(shots, predictor.judge([shot.picture for shot in shots]), strict=True):
                if shot.frame is not None:
                    judged = smoothers.setdefault(shot.file, Smoother(smoothing))(judged)
                write([_row(shot, face, predictor.classes) for face in judged])
                if pictures:
                    _save(annotate(shot.picture, judged, predictor.classes), pictures, shot, shown)
                shown, found = shown + 1, found + len(judged)
        if not shown:
            last = faults[-1]
            raise InputError(f"none of {len(files)} files can be read; {printable(last.file)}: {last.reason}")
    speed = shown / (time.perf_counter() - started)
    logger.info("predict: %d rows from %d pictures, %.1f pictures/s", found, shown, speed)
    for fault in faults:
        logger.warning("predict: skipped %s: %s", printable(fault.file), fault.reason)
    return faults


def columns(classes: Sequence[str]) -> dict[str, type]:
    """Return the table's columns and their types."""
    boxes = dict.fromkeys(("left", "top", "right", "bottom"), int)
    shares = {f"p_{name}": float for name in classes}
    return {"file": str, "frame": int, **boxes, "label": str, "confidence": float, **shares}


def annotate(picture: Image.Image, faces: Sequence[Face], classes: Sequence[str]) -> Image.Image:
    """Return the picture in RGB with each face's box, label and confidence."""
    picture = picture.convert("RGB")
    draw = ImageDraw.Draw(picture)
    unit = max(1, round(max(picture.size) / 400))
    font = ImageFont.load_default(max(11, 8 * unit))
    for face in faces:
        left, top, right, bottom = face.box or (0, 0, *picture.size)
        for inset, colour in ((0, PAPER), (unit, INK), (2 * unit, PAPER)):  # seen on dark and on light
            edges = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
            if edges[2] > edges[0] and edges[3] > edges[1]:
                draw.rectangle(edges, outline=colour, width=unit)
        best = int(face.probabilities.argmax())
        text = f"{classes[best]} {100 * face.probabilities[best]:.0f} %"
        x0, y0, x1, y1 = draw.textbbox((0, 0), text, font)
        y = top - y1 - 2 * unit if top > y1 + 2 * unit else top
        draw.rectangle((left, y, left + x1 + 4 * unit, y + y1 + 2 * unit), fill=PAPER)
        draw.text((left + 2 * unit - x0, y + unit - y0 // 2), text, INK, font)
    return picture


def _chunks(found: Iterator[Shot | Fault], faults: list[Fault]) -> Iterator[list[Shot]]:
    """Yield the shots in lists of up to CHUNK; put the faults aside."""
    while chunk := list(islice(found, CHUNK)):
        faults += [item for item in chunk if isinstance(item, Fault)]
        yield [item for item in chunk if isinstance(item, Shot)]


def _row(shot: Shot, face: Face, classes: Sequence[str]) -> dict[str, Any]:
    best = int(face.probabilities.argmax())
    box = [round(edge * shot.scale) for edge in face.box] if face.box else [None] * 4
    shares = [round(float(share), 6) for share in face.probabilities]
    values = [printable(shot.file), shot.frame, *box, classes[best], shares[best], *shares]
    return dict(zip(columns(classes), values, strict=True))


def _save(picture: Image.Image, folder: Path, shot: Shot, number: int) -> None:
    """Write an annotated picture under a name that cannot leave the folder or meet another's."""
    stem = re.sub(r"[^\w.-]", "_", shot.file.stem, flags=re.ASCII)[:60]
    frame = "" if shot.frame is None else f"-{shot.frame:06d}"
    picture.save(folder / f"{number:06d}-{stem}{frame}.jpg", quality=90)
