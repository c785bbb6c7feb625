"""How well faces are found: recall, false alarms and milliseconds per picture, on photographs composed here.

    python bench/faces.py [--data DIR] [--pictures 150] [--json FILE]

Each picture, 640 x 480, has up to three faces of 64 to 200 pixels on a textured wall with shapes: drawn faces and, from
DIR (train/<class>/*, validation/<class>/*), real ones. A face counts as found if a box overlaps it by more than 0.3
(intersection over union); every other box is a false alarm.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from reporting import software, write_report

from dist_train.data.decode import read_image
from dist_train.data.synthetic import draw_faces
from dist_train.faces import Box, FaceFinder
from dist_train.tracks import SAME_FACE, overlap

SIZE = (640, 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with real faces, validation/<class>/*")
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    kinds = {"drawn": [Image.fromarray(image[0]) for image in draw_faces(300, seed=9, size=96)[0]]}
    if options.data:
        files = sorted(options.data.glob("validation/*/*"))
        real = [read_image(file) for file in random.Random(1).sample(files, min(400, len(files)))]
        kinds["real"] = [face for face in real if np.asarray(face).std() > 5]  # some are blank
    report = {
        **{kind: measure(faces, options.pictures) for kind, faces in kinds.items()},
        "machine": {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        **software("facenet-pytorch", "torch", "pillow"),
    }
    write_report(report, options.json)


def measure(faces: list[Image.Image], count: int) -> dict[str, Any]:
    """Return the figures over `count` pictures made of `faces`."""
    finder, chance = FaceFinder(torch.device("cpu")), random.Random(5)
    scenes = [compose(faces, chance) for _ in range(count)]
    finder.find(scenes[0][0])  # the first call is slow
    started = time.perf_counter()
    found = [finder.find(scene) for scene, _ in scenes]
    seconds = time.perf_counter() - started
    right = boxes = shown = 0
    for (_, real), own in zip(scenes, found, strict=True):
        right += sum(any(overlap(box, face) > SAME_FACE for box in own) for face in real)
        boxes, shown = boxes + len(own), shown + len(real)
    return {
        "faces": shown,
        "recall": round(right / shown, 3),
        "false_alarms_per_picture": round((boxes - right) / count, 3),
        "milliseconds_per_picture": round(1000 * seconds / count, 1),
    }


def compose(faces: list[Image.Image], chance: random.Random) -> tuple[Image.Image, list[Box]]:
    """Return a picture and the squares of the faces in it."""
    tones = np.random.default_rng(chance.randrange(2**31))
    wall = np.zeros((SIZE[1], SIZE[0], 3))
    for cells in (4, 16, 64, 160):
        noise = Image.fromarray(tones.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        wall += np.asarray(noise.resize(SIZE, Image.Resampling.BICUBIC)) / 4
    picture = Image.fromarray(wall.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(chance.randrange(15)):
        x, y, width, height = (chance.randrange(n) for n in (*SIZE, 120, 120))
        shape = chance.choice([draw.ellipse, draw.rectangle])
        shape((x, y, x + width, y + height), fill=tuple(chance.randrange(256) for _ in range(3)))
    squares: list[Box] = []
    for _ in range(chance.randrange(4)):
        side = chance.randrange(64, 200)
        x, y = chance.randrange(SIZE[0] - side), chance.randrange(SIZE[1] - side)
        square = (x, y, x + side, y + side)
        if not any(overlap(square, other) for other in squares):
            picture.paste(chance.choice(faces).resize((side, side), Image.Resampling.BICUBIC), (x, y))
            squares.append(square)
    return picture, squares


if __name__ == "__main__":
    main()
