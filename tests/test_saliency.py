"""Tests of dist_train.saliency: heat maps of any backbone, which point at what a model looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train import FaceModel
from dist_train.saliency import explain


class Corner(nn.Module):
    """Class 1 is light at the upper left, class 0 light at the lower right."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.look.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = self.look(images)
        return torch.stack([seen[..., 16:, 16:].sum((1, 2, 3)), seen[..., :8, :8].sum((1, 2, 3))], 1)


def test_a_map_points_at_what_the_class_rests_on():
    images = torch.rand(2, 1, 24, 24) / 2 + 0.5
    model = Corner().train()
    (low, high) = explain(nn.Sequential(nn.Identity(), model), images, torch.tensor([0, 1]))
    assert low[16:, 16:].mean() > 0.5 and low[:15, :15].max() < 0.01
    assert high[:8, :8].mean() > 0.5 and high[9:, 9:].max() < 0.01
    assert model.training and model.look.weight.grad is None


def test_the_callers_images_stay_as_they_are():
    model = Corner()
    with torch.inference_mode():
        explain(model, torch.rand(2, 1, 24, 24), torch.tensor([0, 1]))
    images = torch.rand(2, 1, 24, 24)
    explain(model, images, torch.tensor([0, 1]))
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 48),
        pytest.param("vgg11", 64, marks=pytest.mark.slow),
        pytest.param("densenet121", 64, marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", 48, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 48, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 64, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("vit_b_32", 224, marks=pytest.mark.slow),
        ("timm/convnext_atto", 48),
        pytest.param("timm/swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),
        pytest.param("timm/mobilenetv4_conv_small", 64, marks=pytest.mark.slow),
        pytest.param("timm/vit_tiny_patch16_224", 224, marks=pytest.mark.slow),
        pytest.param("timm/mixer_s32_224", 224, marks=pytest.mark.slow),
        pytest.param("timm/mobilevit_xxs", 64, marks=pytest.mark.slow),
    ],
)
def test_any_backbone_is_explained(backbone, size):
    torch.manual_seed(0)
    model = FaceModel(backbone, pretrained=False).eval()
    for weight in [weight for weight in model.parameters() if not weight.any()]:
        nn.init.normal_(weight, std=0.02)  # a head of zeros rests on nothing
    images = torch.randint(0, 256, (3, 1, size, size), dtype=torch.uint8)
    maps = explain(model, images, torch.tensor([0, 3, 6]))
    assert maps.shape == (3, size, size) and maps.dtype == torch.float32
    assert maps.min() >= 0 and torch.allclose(maps.amax((1, 2)), torch.ones(3))
    assert (maps.std((1, 2)) > 0.02).all()
    assert not torch.equal(explain(model, images, torch.tensor([1, 4, 0])), maps)


def test_a_model_without_places_is_refused():
    with pytest.raises(ValueError, match="no layer has places"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(1, 1, 8, 8), torch.tensor([0]))
