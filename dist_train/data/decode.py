"""Image files to uint8 arrays: one, or many in parallel; what cannot be read is named.

In: paths of whatever PIL reads. Out: squares, gray if the file is gray, else RGB.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from dist_train.config import DataConfig, InputError

logger = logging.getLogger(__name__)

GRAY_MODES = ("1", "L", "LA")
MAX_PIXELS = 64_000_000  # bounds the memory that one file can take
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for a bad file
SHOWN = 20


def tell_bad(bad: Sequence[str], of: str, skip: bool) -> None:
    """Name all that cannot be read: in an InputError, or in a warning where it is to be left out."""
    if bad:
        listed = "; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        message = f"{len(bad)} of {of} cannot be read: {listed}"
        if not skip:
            raise InputError(f"{message}. Mend or delete them, or set data.skip_bad: true")
        logger.warning("%s. Left out (data.skip_bad)", message)


def decode_files(files: Sequence[Path], config: DataConfig) -> tuple[dict[Path, np.ndarray | None], list[str]]:
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


def stack(arrays: Sequence[np.ndarray | None], size: int) -> np.ndarray:
    """Stack decoded images to uint8 [N, C, size, size]: gray if all are gray, else RGB."""
    images = [array for array in arrays if array is not None]
    if all(image.ndim == 2 for image in images):
        return np.stack(images)[:, None] if images else np.zeros((0, 1, size, size), np.uint8)
    colour = [np.broadcast_to(i[..., None], (size, size, 3)) if i.ndim == 2 else i for i in images]
    return np.ascontiguousarray(np.stack(colour).transpose(0, 3, 1, 2))
