"""Tests of dist_train.evaluation.judge: each image's probabilities, in order, of one view or ten."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dist_train import FaceModel, evaluate
from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.data.loader import ImageLoader
from dist_train.evaluation import judge

FACES = load_splits(DataConfig(count=600, validation_share=0.5, image_size=24))[1]


class Pixels(nn.Module):
    """Gives the first three pixels of a row in the middle as logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 12, 10:13].float() / 10


def test_each_image_is_judged_in_order_as_evaluate_judges_it():
    model = FaceModel("timm/test_resnet", pretrained=False).train()
    shares = judge(model, FACES.images)
    assert shares.shape == (300, 7) and shares.dtype == np.float32 and model.training
    assert np.allclose(shares.sum(1), 1, atol=1e-5)
    with torch.inference_mode():
        some = torch.tensor([0, 17, 255, 256, 299])
        expected = model.eval()(torch.from_numpy(FACES.images[some.numpy()])).softmax(1)
    assert np.allclose(shares[some], expected, atol=1e-5)
    results = evaluate(model, ImageLoader(FACES, 64))
    assert (shares.argmax(1) == FACES.labels).mean() == results.accuracy


def test_ten_views_are_the_mirrored_and_shifted_ones():
    mean = np.zeros((300, 3))
    for mirror in (1, -1):
        for down, right in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            view = np.roll(FACES.images[..., ::mirror], (down, right), (2, 3))  # what is looked at is no edge
            logits = view[:, 0, 12, 10:13] / 10
            mean += np.exp(logits) / np.exp(logits).sum(1, keepdims=True) / 10
    assert np.allclose(judge(Pixels(), FACES.images, tta=True), mean, atol=1e-5)
    assert not np.allclose(judge(Pixels(), FACES.images), mean, atol=1e-2)
