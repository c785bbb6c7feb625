"""Photographs composed for tests: drawn faces on a textured wall, and files that mean no good."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dist_train.data.synthetic import draw_faces

Square = tuple[int, int, int, int]


def compose(squares: list[Square], seed: int = 0, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Return a photograph, RGB, with a drawn face in each of the squares (left, top, right, bottom)."""
    noise = np.random.default_rng(seed).integers(90, 170, (6, 8, 3), dtype=np.uint8)
    scene = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    faces, _ = draw_faces(max(1, len(squares)), seed=seed, size=96)
    for face, (left, top, right, _) in zip(faces[:, 0], squares, strict=False):
        side = right - left
        shape = Image.new("L", (side, side))
        ImageDraw.Draw(shape).rounded_rectangle((2, 2, side - 2, side - 2), side // 3, 255)
        scene.paste(
            Image.fromarray(face).resize((side, side)).convert("RGB"), (left, top), shape.filter(ImageFilter.BoxBlur(2))
        )
    return scene
