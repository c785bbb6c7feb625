"""Image files to uint8 arrays: one, or many in parallel; what cannot be read is named.

In: paths or contents of whatever PIL reads. Out: squares, gray if the file is gray, else RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from dist_train.config import InputError

logger = logging.getLogger(__name__)

GRAY_MODES = ("1", "L", "LA")
MAX_PIXELS = 64_000_000  # bounds the memory that one file can take
SHOWN = 20
SUBMITTED = 4096
Result = TypeVar("Result")


def tell_bad(bad: Sequence[str], of: str, skip: bool) -> None:
    """Name all that cannot be read: in an InputError, or in a warning where it is to be left out."""
    if bad:
        listed = "; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        message = f"{len(bad)} of {of} cannot be read: {listed}"
        if not skip:
            raise InputError(f"{message}. Mend or delete them, or set data.skip_bad: true")
        logger.warning("%s. Left out (data.skip_bad)", message)


def attempt_each(function: Callable[[int], Result], count: int, pool: ThreadPoolExecutor) -> list[Result | Exception]:
    """Return what `function` makes of 0 to count - 1, in parallel, or what it raises."""

    def attempt(i: int) -> Result | Exception:
        try:
            return function(i)
        except Exception as error:  # a damaged file can make a decoder fail in any way
            return error

    results: list[Result | Exception] = []
    with tqdm(total=count, desc="reading", unit="image", disable=None, leave=False) as bar:
        for start in range(0, count, SUBMITTED):  # each call that waits takes memory
            for result in pool.map(attempt, range(start, min(start + SUBMITTED, count))):
                results.append(result)
                bar.update()
    return results


def decode_image(file: Path | BytesIO, size: int) -> np.ndarray:
    """Return one image file as uint8 [size, size] if it is gray, else [size, size, 3] RGB.

    It is turned as its EXIF says, then scaled and cropped around the centre to the square. Raises what PIL
    raises for a file it cannot read.
    """
    return fit_square(read_image(file), size)


def is_gray(file: Path | BytesIO) -> bool:
    """Return whether decode_image would make an image file gray, by its header alone.

    Raises what read_image does, as far as the header shows it.
    """
    with Image.open(file) as image:
        _check(image)
        return _gray(image.mode)


def read_image(file: Path | BytesIO) -> Image.Image:
    """Return one image file (of an animation: its first frame) upright, in mode L if it is gray, else RGB.

    Raises what PIL raises for a file it cannot read, and ValueError for more than MAX_PIXELS.
    """
    with Image.open(file) as image:
        _check(image)
        image.load()
        image.getexif()  # kept; without its source PIL does not write it anew, which fails on odd entries
        for original in ("exif", "Raw profile type exif"):
            image.info.pop(original, None)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):  # 16-bit gray: PIL would clip to 8 bits, not scale
            values = np.nan_to_num(np.asarray(upright, dtype=np.float32)).clip(0)
            upright = Image.fromarray((values / max(values.max(), 255.0) * 255).astype(np.uint8))
        return upright.convert("L" if _gray(upright.mode) else "RGB")


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    if image.format == "EPS":  # PIL would have Ghostscript run it
        raise ValueError("EPS is a program, not a picture")


def _gray(mode: str) -> bool:
    return mode in GRAY_MODES or mode.startswith(("I", "F"))


def fit_square(picture: Image.Image, size: int) -> np.ndarray:
    """Return a picture scaled and cropped around the centre: uint8 [size, size] or [size, size, 3]."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))


def stack(arrays: Sequence[np.ndarray], size: int, channels: int) -> np.ndarray:
    """Stack decoded images to uint8 [N, channels, size, size], gray ones repeated for 3 channels."""
    images = np.empty((len(arrays), channels, size, size), np.uint8)
    for image, array in zip(images, arrays, strict=True):
        image[...] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return images
