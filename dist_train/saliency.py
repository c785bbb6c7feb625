"""explain(): which pixels a classifier's answer rests on, as heat maps; works for any backbone.

In: a model, images and the classes asked about. Out: one map per image. captum gives gradient times activation in a
layer; summed over the layer's channels this is HiResCAM, which equals Grad-CAM in the last layer before a global pool.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.model import eval_mode

MIN_SIDE = 5
"""Positions along a side that a layer needs; the last layers of a small image have 1 to 3 and point at nothing."""


class _Layer(NamedTuple):
    """A layer whose outputs have places; `channels` is the axis of its channels."""

    module: nn.Module
    channels: int


def explain(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return heat maps, float32 [N, H, W] in 0..1, of what speaks for `targets` in `images`.

    images: uint8 in 0..255 or float in 0..1 [N, 1 or 3, H, W], on any device; targets: int64 [N], classes. Each map
    reaches 1 where most speaks for the class, and is 0 where nothing does. The model keeps its mode; its
    parameters get no gradients. Raises ValueError for a model without a layer that has places.
    """
    device = next(model.parameters()).device
    inputs = images.to(device)
    inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
    targets = targets.to(device)
    with eval_mode(model):
        layer = _choose_layer(model, inputs[:1], targets[:1])
        (shares,) = _attribute(model, [layer], inputs, targets)
        maps = _as_grid(shares.sum(layer.channels), model)
    maps = F.interpolate(maps[:, None], inputs.shape[-2:], mode="bicubic", align_corners=False)[:, 0].clamp(min=0)
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)).cpu()


def overlay(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Return the images, uint8 [N, 1 or 3, H, W], in gray under the glow of their maps: uint8 [N, H, W, 3]."""
    gray = images.mean(1)[..., None] / 255
    glow = colormaps["inferno"](maps)[..., :3]
    share = 0.75 * maps[..., None]
    return (255 * ((1 - share) * gray + share * glow)).round().astype(np.uint8)


def _choose_layer(model: nn.Module, image: Tensor, target: Tensor) -> _Layer:
    """Return the last layer whose places say something.

    Behind a last attention only the class token counts, and before a LayerNorm the channels' shares add up to nothing.
    """
    layers = _find_layers(model, image)
    if not layers:
        raise ValueError("model: no layer has places that its answer could rest on")
    for layer, shares in zip(layers, _attribute(model, layers, image, target), strict=True):
        if _as_grid(shares.sum(layer.channels), model).abs().sum() > 1e-3 * shares.abs().sum():
            return layer
    return layers[0]


def _attribute(model: nn.Module, layers: list[_Layer], inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Return for each layer how much each of its outputs speaks for the targets."""
    from captum.attr import LayerGradientXActivation  # it imports much, and only this function needs it

    with torch.inference_mode(False), torch.enable_grad():
        # clones: these may be the caller's own, or of inference mode, in which there are no gradients
        inputs, targets = inputs.detach().clone().requires_grad_(), targets.clone()
        attribution = LayerGradientXActivation(model, [layer.module for layer in layers])
        return [shares.detach() for shares in attribution.attribute(inputs, target=targets)]


def _find_layers(model: nn.Module, image: Tensor) -> list[_Layer]:
    """Return the layers whose outputs have places, the last first; those with less than MIN_SIDE a side at the end."""
    found: dict[nn.Module, list[tuple[int, ...]]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        found.setdefault(module, []).append(tuple(output.shape) if isinstance(output, Tensor) else ())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    layers: list[_Layer] = []
    small: list[_Layer] = []
    for module, shapes in reversed(found.items()):
        axis, places = _places(shapes[0], image.shape[-2] / image.shape[-1])
        if len(shapes) == 1 and places >= 4:  # one that is called twice, as a shared ReLU, is no single layer
            (layers if places >= MIN_SIDE**2 else small).append(_Layer(module, axis))
    return layers + small


def _places(shape: tuple[int, ...], ratio: float) -> tuple[int, int]:
    """Return the axis of channels and the number of places of [N, C, h, w], [N, h, w, C] or tokens [N, T, C].

    ratio: the image's height to its width, which tells maps from the heads of an attention, [N, heads, T, C].
    """
    if len(shape) == 3:
        return 2, math.isqrt(shape[1]) ** 2
    if len(shape) != 4:
        return 0, 0
    last = shape[1] == shape[2] != shape[3]
    height, width = shape[1:3] if last else shape[2:]
    is_map = min(height, width) > 1 and abs(height - ratio * width) <= 1
    return (3 if last else 1), height * width if is_map else 0


def _as_grid(values: Tensor, model: nn.Module) -> Tensor:
    """Return [N, h, w] of what is so already or, for tokens, [N, T]: class and register tokens come first."""
    if values.ndim == 3:
        return values
    side = math.isqrt(values.shape[1] - getattr(getattr(model, "backbone", model), "num_prefix_tokens", 0))
    return values[:, values.shape[1] - side * side :].unflatten(1, (side, side))
