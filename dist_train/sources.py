"""Where pictures to be judged come from: files, folders, globs, a list on standard input; photographs and videos.

In: what the user named. Out: a stream of Shots in bounded memory, and a Fault for each file that cannot be read.
"""

from __future__ import annotations

import glob
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from dist_train.config import InputError
from dist_train.data.decode import MAX_PIXELS, read_image

DECODERS = 4  # threads; each may hold a picture of MAX_PIXELS
AHEAD = 32  # pictures decoded ahead
LONGEST = 1600  # side, in pixels, to which larger pictures are reduced
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# A video file can name other files and addresses to read from: only containers that hold their own frames are opened.
SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf"}


@dataclass(frozen=True)
class Shot:
    """A picture to be judged (mode L or RGB): a file or a numbered frame of it, `scale` times smaller than it was."""

    file: Path
    frame: int | None
    picture: Image.Image
    scale: float


@dataclass(frozen=True)
class Fault:
    """A file that cannot be read, and why."""

    file: Path
    reason: str


def list_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files that `inputs` name, once each: folders are searched, globs expanded, "-" reads a list."""
    kinds = Image.registered_extensions()
    endings = {ending for ending, kind in kinds.items() if kind in Image.OPEN} | set(VIDEOS)
    found: list[Path] = []
    for name in inputs:
        lines = sys.stdin.read().splitlines() if name == "-" else [name]
        for path in [Path(line) for line in lines if line]:
            if _holds(path.is_dir):
                found += sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
            elif glob.has_magic(str(path)) and not _holds(path.exists):
                matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (it may begin anywhere)
                found += sorted(map(Path, matches)) or [path]
            else:
                found.append(path)
    return list(dict.fromkeys(found))


def read_shots(files: Sequence[Path], every: int = 1) -> Iterator[Shot | Fault]:
    """Yield the pictures of `files`, then every `every`-th frame of the videos among them, and the faults.

    Raises InputError for a video if PyAV is not installed.
    """
    pictures = [file for file in files if file.suffix.lower() not in VIDEOS]
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    bar = tqdm(total=len(files), unit="file", disable=None)
    for found in _read_ahead(pictures):
        yield found
        bar.update()
    for file in videos:
        try:
            for number, picture in tqdm(_frames(file, every), file.name, unit="frame", leave=False, disable=None):
                yield _reduced(file, number, picture)
        except InputError:
            raise
        except Exception as error:  # a damaged file can make a decoder fail in any way
            yield Fault(file, _reason(error))
        bar.update()
    bar.close()


def printable(name: object) -> str:
    """Return a file's name as one line of text that is valid in UTF-8, whatever bytes it has."""
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except (OSError, ValueError):  # a name that is too long or holds a NUL
        return False


def _read_ahead(files: Iterable[Path]) -> Iterator[Shot | Fault]:
    """Yield each file's picture in order, while threads decode the next ones."""
    waiting: deque[Future[Shot | Fault]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for file in files:
            waiting.append(pool.submit(read_shot, file))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_shot(file: Path) -> Shot | Fault:
    try:
        _check_regular(file)
        return _reduced(file, None, read_image(file))
    except Exception as error:  # a damaged file can make a decoder fail in any way
        return Fault(file, _reason(error))


def _frames(file: Path, every: int) -> Iterator[tuple[int, Image.Image]]:
    """Yield the number and picture, upright RGB, of every `every`-th frame of a video."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"{file} is a video; pip install 'dist_train[predict]' to read it") from error
    _check_regular(file)
    with av.open(str(file), options=SAFE) as container:
        if not container.streams.video:
            raise ValueError("no pictures in it")
        stream = container.streams.video[0]
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise ValueError(f"frames of more than {MAX_PIXELS:,} pixels")
        number = -1
        for number, frame in enumerate(container.decode(stream)):
            if number % every == 0:
                yield number, frame.to_image().rotate(frame.rotation, expand=True)
        if number < 0:
            raise ValueError("no pictures in it")


def _check_regular(file: Path) -> None:
    """Refuse folders, and pipes and devices, which may never end."""
    if not file.is_file():
        raise ValueError("not a file" if file.exists() else "does not exist")


def _reduced(file: Path, frame: int | None, picture: Image.Image) -> Shot:
    scale = max(1.0, max(picture.size) / LONGEST)
    if scale > 1:
        size = max(1, round(picture.width / scale)), max(1, round(picture.height / scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return Shot(file, frame, picture, scale)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known kind"
    words = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return " ".join(words.split()) or type(error).__name__
