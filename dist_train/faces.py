"""FaceFinder: where in a picture faces are, as the squares that the classifier wants.

In: pictures. Out: square boxes in their pixels. The detector is MTCNN (Zhang et al. 2016) as facenet-pytorch ships
it, weights included: nothing is downloaded. bench/faces.py measures it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dist_train.config import InputError

CANVAS = 800  # longer side, in pixels, to which pictures are brought
MARGIN = 80  # least side of what the detector sees: it fails on less
SMALLEST = 40  # side of the smallest face that is sought in it: a twentieth of the picture
THRESHOLDS = [0.5, 0.6, 0.7]  # of MTCNN's three networks
CONFIDENCE = 0.8
SHARE = 0.95  # of the longer side of MTCNN's box, to show as much of a face as FER2013's squares do

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside


class FaceFinder:
    """Finds faces with MTCNN on `device`. Raises InputError if facenet-pytorch is not installed."""

    def __init__(self, device: torch.device) -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise InputError("--faces needs a face detector: pip install 'dist_train[predict]'") from error
        self.detector = MTCNN(keep_all=True, min_face_size=SMALLEST, thresholds=THRESHOLDS, device=device)

    def find(self, picture: Image.Image) -> list[Box]:
        """Return the squares around the faces of a picture, in its pixels, the largest face first."""
        scale = CANVAS / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        small = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        canvas = np.full((max(small.height, MARGIN), max(small.width, MARGIN), 3), 127, np.uint8)
        canvas[: small.height, : small.width] = np.asarray(small)
        boxes, confidences = self.detector.detect(canvas)
        if boxes is None:
            return []
        found = [box / scale for box, confidence in zip(boxes, confidences, strict=True) if confidence >= CONFIDENCE]
        return [square for box in found if (square := _square(box, picture.size))]


def _square(box: np.ndarray, size: tuple[int, int]) -> Box | None:
    """Return the square that shows a face as the training images do; None outside the picture."""
    left, top, right, bottom = box
    side = round(min(SHARE * max(right - left, bottom - top), *size))
    x = round(min(max((left + right - side) / 2, 0), size[0] - side))
    y = round(min(max((top + bottom - side) / 2, 0), size[1] - side))
    return (x, y, x + side, y + side) if side >= 1 else None
