"""Two hundred files that mean no good, and some that only look so, made in a folder."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ENDINGS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
FACE = "face.png"


class Case(NamedTuple):
    """A file's path, and what is due: "same" answer as for the face, some "answer", "refusal", or "either"."""

    path: str
    due: str


def make_cases(folder: Path, face: Image.Image) -> list[Case]:
    """Write the files to `folder` and return the cases; `face` is a gray picture, also written as FACE."""
    os.chdir(folder)
    face.save(FACE)
    return [
        Case(FACE, "same"),
        *_modes(face),
        *_turned(face),
        *_wrong_endings(face),
        *_damaged(face),
        *_bombs(),
        *_texts(),
        *_paths(folder, face),
        *_videos(),
    ]


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _write(name: str, content: bytes, due: str) -> Case:
    Path(name).write_bytes(content)
    return Case(name, due)


def _modes(face: Image.Image) -> list[Case]:
    """Every colour mode that a format has."""
    deep = Image.fromarray(np.asarray(face).astype(np.uint16) * 257)
    deep_big = Image.fromarray((np.asarray(face).astype(np.uint16) * 257).astype(">u2"))
    floats = Image.fromarray(np.asarray(face, dtype=np.float32))
    nan = Image.fromarray(np.full((48, 48), np.nan, np.float32))
    pages = {"save_all": True, "append_images": [Image.new("RGB", face.size, "red")]}
    cases = [_write(f"mode-{kind}.{ENDINGS[kind]}", _encoded(face, kind), "same") for kind in ("PNG", "BMP", "TIFF")]
    for mode in ("RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        for kind in ("PNG", "TIFF", "GIF", "WEBP"):
            exact = mode in ("RGB", "RGBA", "LA", "P") and kind in ("PNG", "TIFF")
            try:
                picture = Image.merge("LAB", [face] * 3) if mode == "LAB" else face.convert(mode)
                content = _encoded(picture, kind)
            except (OSError, ValueError, KeyError):  # not all formats have all modes
                continue
            cases.append(_write(f"mode-{mode}-{kind}.{ENDINGS[kind]}", content, "same" if exact else "either"))
    return [
        *cases,
        _write("mode-cmyk.jpg", _encoded(face.convert("CMYK"), "JPEG", quality=100), "answer"),
        _write("mode-16bit.png", _encoded(deep, "PNG"), "answer"),
        _write("mode-16bit.tif", _encoded(deep, "TIFF"), "answer"),
        _write("mode-16bit-big.tif", _encoded(deep_big, "TIFF"), "answer"),
        _write("mode-float.tif", _encoded(floats, "TIFF"), "same"),
        _write("mode-nan.tif", _encoded(nan, "TIFF"), "answer"),
        _write("animated.gif", _encoded(face, "GIF", **pages), "same"),
        _write("animated.png", _encoded(face.convert("RGB"), "PNG", **pages), "same"),
        _write("animated.webp", _encoded(face.convert("RGB"), "WEBP", lossless=True, **pages), "same"),
        _write("pages.tif", _encoded(face.convert("RGB"), "TIFF", **pages), "same"),
        _write("one-pixel.png", _encoded(Image.new("L", (1, 1)), "PNG"), "answer"),
        _write("wide.png", _encoded(Image.new("L", (5000, 1)), "PNG"), "answer"),
        _write("tall.png", _encoded(Image.new("RGB", (1, 60000)), "PNG"), "answer"),
    ]


def _turned(face: Image.Image) -> list[Case]:
    """The face stored in the eight ways of EXIF; and with EXIF that makes no sense."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    cases = []
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[274] = orientation
        turned = face.transpose(Image.Transpose(back[orientation])) if orientation in back else face
        for kind in ("PNG", "TIFF", "WEBP"):
            content = _encoded(turned.convert("RGB"), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
            cases.append(_write(f"turned-{orientation}.{ENDINGS[kind]}", content, "same"))
    return [*cases, _write("turned-nonsense.png", _encoded(face, "PNG", exif=b"Exif\0\0" + b"\xff" * 90), "either")]


def _wrong_endings(face: Image.Image) -> list[Case]:
    return [
        _write(f"really-{kind}.{ending}", _encoded(face.convert("RGB"), kind), "same")
        for kind in ("PNG", "BMP", "TIFF")
        for ending in ("jpg", "gif", "webp", "txt")
    ] + [_write("really-PNG.mp4", _encoded(face, "PNG"), "either")]


def _damaged(face: Image.Image) -> list[Case]:
    """Files cut short, and files with bytes changed."""
    cases, random_ = [], random.Random(0)
    for kind, ending in ENDINGS.items():
        whole = _encoded(face, kind)
        for share in (0.0, 0.02, 0.3, 0.6, 0.9):
            length = int(share * len(whole))
            cases.append(_write(f"cut-{length}.{ending}", whole[:length], "either" if length > 60 else "refusal"))
        for number in range(6):
            content = bytearray(whole)
            for _ in range(1 + 4 * number):
                content[random_.randrange(len(content))] = random_.randrange(256)
            cases.append(_write(f"changed-{number}.{ending}", bytes(content), "either"))
    return cases


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _bombs() -> list[Case]:
    """Small files that claim to be huge, one that is (64 million pixels), and files without pixels."""
    squeezed = zlib.compressobj(9)
    bomb = b"".join(squeezed.compress(bytes(9001)) for _ in range(9000)) + squeezed.flush()
    compressor = zlib.compressobj(1)
    largest = b"".join(compressor.compress(bytes(8001)) for _ in range(8000)) + compressor.flush()
    text = zlib.compress(bytes(200_000_000), 9)
    ztxt = b"key\0\0" + text
    chunk = struct.pack(">I", len(ztxt)) + b"zTXt" + ztxt + struct.pack(">I", zlib.crc32(b"zTXt" + ztxt))
    small = _png(8, 8, zlib.compress(bytes(72)))
    bmp = _encoded(Image.new("L", (4, 4)), "BMP")
    gif = _encoded(Image.new("L", (4, 4)), "GIF")
    return [
        _write("bomb.png", _png(9000, 9000, bomb), "refusal"),
        _write("bomb-header.png", _png(60000, 60000), "refusal"),
        _write("bomb-header-2.png", _png(2**31 - 1, 2**31 - 1), "refusal"),
        _write("bomb-long.png", _png(2**31 - 1, 1), "refusal"),
        _write("bomb.bmp", bmp[:18] + struct.pack("<ii", 50000, 50000) + bmp[26:], "refusal"),
        _write("bomb.gif", gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:], "refusal"),
        _write("bomb-text.png", small[:33] + chunk + small[33:], "either"),
        _write("largest.png", _png(8000, 8000, largest), "answer"),
        _write("empty.png", b"", "refusal"),
        _write("empty.gif", b"", "refusal"),
        _write("zero.png", _png(0, 0), "refusal"),
        _write("zero-wide.png", _png(0, 5), "refusal"),
        _write("zero.bmp", bmp[:18] + struct.pack("<ii", 0, 0) + bmp[26:], "refusal"),
        _write("zero.gif", gif[:6] + struct.pack("<HH", 0, 0) + gif[10:13], "refusal"),
    ]


def _texts() -> list[Case]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    laughs = b'<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + svg
    contents = {
        "svg": svg,
        "laughs": laughs,
        "html": b"<script>alert(1)</script>",
        "shell": b"#!/bin/sh\ntouch hacked\n",
        "zip": b"PK\x05\x06" + bytes(18),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(hacked) (w) file closefile\nshowpage\n",
        "pdf": b"%PDF-1.4\n",
        "zeros": bytes(5000),
    }
    endings = {"svg": ("svg", "png", "jpg"), "laughs": ("svg", "png"), "eps": ("eps", "png")}
    return [
        _write(f"text-{name}.{ending}", content, "refusal")
        for name, content in contents.items()
        for ending in endings.get(name, ("png", "jpg"))
    ]


def _paths(folder: Path, face: Image.Image) -> list[Case]:
    """Names and kinds of files that trip programs up."""
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    Path("nowhere.png").symlink_to("gone.png")
    Path("loop.png").symlink_to("loop.png")
    Path("zero-device.png").symlink_to("/dev/zero")
    Path("linked.png").symlink_to(FACE)
    content = _encoded(face, "PNG")
    names = [
        "-strict.png",
        "=cmd().png",
        "a b;rm -rf x.png",
        "ünïcödé.png",
        "back\\slash.png",
        os.fsdecode(b"\xff\xfe.png"),
    ]
    return [
        *(_write(name, content, "same") for name in names),
        Case("linked.png", "same"),
        Case(f"../{folder.name}/{FACE}", "same"),
        *(Case(name, "refusal") for name in ("pipe.png", "nowhere.png", "loop.png", "zero-device.png", "missing.png")),
        *(
            Case(name, "refusal")
            for name in ("nul\0.png", "x" * 300 + ".png", "/dev/null", "/proc/self/mem", "*.nothing")
        ),
    ]


def _videos() -> list[Case]:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    contents = {
        "empty": b"",
        "text": b"not a video",
        "list": playlist,
        "concat": b"ffconcat version 1.0\nfile face.png\n",
    }
    return [
        _write(f"video-{name}.{ending}", content, "refusal")
        for name, content in contents.items()
        for ending in ("mp4", "avi", "webm")
    ]
