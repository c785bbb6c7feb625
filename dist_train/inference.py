"""Predictor: a run's model, ready to judge photographs; with `faces`, each face that is found in them.

In: a run folder and pictures. Out: for each picture its Faces: box and probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dist_train.data.decode import fit_square
from dist_train.faces import Box, FaceFinder
from dist_train.model import load_run

BATCH = 64


@dataclass(frozen=True)
class Face:
    """A judged part of a picture: its square in the picture's pixels (None: the whole picture, cropped around the
    centre as in training), and the probabilities of the classes, float32 [K]."""

    box: Box | None
    probabilities: np.ndarray


class Predictor:
    """Judges pictures with the best model of `run_dir`, on the accelerator if there is one.

    faces: find the faces first and judge each; else each picture is one face. Raises InputError for a folder
    without a complete model, and if the detector is not installed.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, faces: bool = False) -> None:
        found = torch.accelerator.current_accelerator(check_available=True)
        self.device = found or torch.device("cpu")
        self.model = load_run(run_dir).to(self.device).to(memory_format=torch.channels_last)
        self.classes = self.model.classes
        self.image_size = self.model.image_size or 48
        # MTCNN's pooling does not run on every accelerator
        self.finder = FaceFinder(self.device if self.device.type == "cuda" else torch.device("cpu")) if faces else None

    def judge(self, pictures: Sequence[Image.Image]) -> list[list[Face]]:
        """Return the faces of each picture (mode L or RGB), the largest first."""
        if not self.finder:
            return [[face] for face in self.judge_whole(pictures)]
        boxes = [self.finder.find(picture) for picture in pictures]
        images = [self.crop(picture, box) for picture, own in zip(pictures, boxes, strict=True) for box in own]
        probabilities = iter(self.classify(images))
        return [[Face(box, next(probabilities)) for box in own] for own in boxes]

    def judge_whole(self, pictures: Sequence[Image.Image]) -> list[Face]:
        """Return each picture as one face."""
        return [Face(None, found) for found in self.classify([self.crop(picture, None) for picture in pictures])]

    def crop(self, picture: Image.Image, box: Box | None) -> np.ndarray:
        """Return what the model is to see of a picture, uint8 [S, S], or [S, S, 3] if it is trained on colour."""
        part = picture.crop(box) if box else picture
        return fit_square(part.convert("L") if self.model.gray else part, self.image_size)

    def classify(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities, float32 [N, K], of images of one size, each uint8 [H, W] or [H, W, 3]."""
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        batches = []
        for start in range(0, len(images), BATCH):
            batch = stack(images[start : start + BATCH])
            with torch.inference_mode():
                logits = self.model(batch.to(self.device).contiguous(memory_format=torch.channels_last))
            batches.append(logits.float().softmax(1).cpu().numpy())
        return np.concatenate(batches)


def stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Return images, each [H, W] or [H, W, 3], as uint8 [N, C, H, W], C 1 if all are gray, else 3."""
    gray = all(image.ndim == 2 for image in images)
    alike = [image[..., None] if image.ndim == 2 else image for image in images]
    depth = 1 if gray else 3
    return torch.from_numpy(np.stack([np.repeat(i, depth // i.shape[2], 2) for i in alike]).transpose(0, 3, 1, 2))
