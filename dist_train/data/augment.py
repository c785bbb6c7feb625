"""Batch augmentation on the device: every sample has its own row of random numbers, so its own change.

In: uint8 images and draws in 0..1. Out: float images in 0..1. The draws are an input, not a side effect,
so that a sample's change is a function of seed, epoch and position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train.config import AugmentConfig

DRAWS = 12
"""Random numbers that one sample uses."""


def augment(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Flip, turn, shift, scale, light and erase a batch.

    images: uint8 [B, C, H, W]; draws: float32 [B, DRAWS] in 0..1, on the same device.
    Returns float32 [B, C, H, W] in 0..1.
    """
    signed = draws * 2 - 1
    changed = images.float() / 255
    if config.flip or config.rotate or config.translate or config.scale:
        changed = _warp(changed, draws, signed, config)
    if config.brightness or config.contrast:
        changed = _light(changed, signed, config)
    if config.erase:
        changed = _erase(changed, draws, config)
    return changed


def _warp(images: Tensor, draws: Tensor, signed: Tensor, config: AugmentConfig) -> Tensor:
    """Resample once for flip, rotation, scale and shift together; what comes in from outside repeats the edge."""
    angle = signed[:, 1] * math.radians(config.rotate)
    zoom = 1 + signed[:, 2] * config.scale
    mirror = torch.where(draws[:, 0] < config.flip, -1.0, 1.0)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    shift = 2 * config.translate * signed[:, 3:5]
    rows = [mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]]
    matrix = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _light(images: Tensor, signed: Tensor, config: AugmentConfig) -> Tensor:
    contrast = (1 + signed[:, 5] * config.contrast).view(-1, 1, 1, 1)
    brightness = (signed[:, 6] * config.brightness).view(-1, 1, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brightness).clamp(0, 1)


def _erase(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Gray a rectangle of 2 to 20 % of the area, sides 1:3 to 3:1 (random erasing, Zhong et al. 2017)."""
    height, width = images.shape[-2:]
    area = 0.02 + 0.18 * draws[:, 8]
    ratio = torch.exp((draws[:, 9] * 2 - 1) * math.log(3))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)
    corner = draws[:, 10:12] * (1 - sides)
    y = ((torch.arange(height, device=images.device) + 0.5) / height).view(1, -1, 1)
    x = ((torch.arange(width, device=images.device) + 0.5) / width).view(1, 1, -1)
    top, left = corner.view(-1, 2, 1, 1).unbind(1)
    bottom, right = (corner + sides).view(-1, 2, 1, 1).unbind(1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    chosen = (draws[:, 7] < config.erase).view(-1, 1, 1)
    return torch.where((inside & chosen)[:, None], 0.5, images)
