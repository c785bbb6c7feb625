"""FaceModel: any torchvision or timm backbone with a head for the data's classes, normalisation inside.

In: images as they are stored. Out: logits. Weights come from the backbone's publisher, from a local file, or
from nowhere (random), as told; a model saved with `save` comes back with `load_run`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from dist_train.config import CLASSES, InputError, nearest
from dist_train.files import write_file

logger = logging.getLogger(__name__)

WAYS_OUT = "set model.weights to a local file, or model.pretrained: false for random weights"
STEM = "conv1.weight"
PREFIXES = ("module.", "backbone.", "model.", "_orig_mod.")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode; give each of its modules its mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # model.train() would wake modules that are kept in eval mode
            module.training = mode


class FaceModel(nn.Module):
    """A classifier of face images.

    backbone: a torchvision classifier's name, or timm/NAME; num_classes: width of the head; pretrained: start
    from the published weights; weights: a local .safetensors or .pth file to start from in their place;
    in_channels: 1 or 3, what the backbone sees; stem_stride: 1 or 2, how many times a 3x3 stem shrinks the images
    in place of a ResNet's own 7x7 stem, which shrinks them 4 times; classes: the names behind the labels;
    image_size: side in pixels of the images it is trained on, for those who use the saved model; temperature:
    divides the logits, so that probabilities are as sure as they are right (dist-train evaluate --calibrate finds
    it); gray: it is trained on gray images, so colour is taken out of those it is given.

    Raises InputError for an unknown backbone, for weights that cannot be fetched or read, and for weights
    whose keys or shapes are not the backbone's (the head's may differ: it is then left random).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 7,
        pretrained: bool = True,
        weights: str | os.PathLike[str] | None = None,
        *,
        in_channels: int = 3,
        stem_stride: int | None = None,
        classes: Sequence[str] | None = None,
        image_size: int | None = None,
        temperature: float = 1.0,
        gray: bool = False,
    ) -> None:
        super().__init__()
        self.settings = {
            "backbone": backbone,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "stem_stride": stem_stride,
            "image_size": image_size,
            "temperature": temperature,
            "gray": gray,
        }
        self.in_channels = in_channels
        self.gray = gray or in_channels == 1
        self.image_size = image_size
        self.temperature = temperature
        if classes is None:
            classes = CLASSES if num_classes == len(CLASSES) else [str(n) for n in range(num_classes)]
        self.classes = tuple(classes)
        fetch = pretrained and weights is None
        build = _build_timm if backbone.startswith("timm/") else _build_torchvision
        self.backbone, mean, std = build(backbone, num_classes, in_channels, fetch)
        if stem_stride is not None:
            _shrink_stem(self.backbone, backbone, stem_stride)
        if weights is not None:
            _load_file(self.backbone, Path(weights))
        if in_channels == 1:
            mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [B, K], of images [B, 1 or 3, H, W], uint8 in 0..255 or float in 0..1."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[1] == 3 and self.gray:
            images = rgb_to_grayscale(images)
        if images.shape[1] < self.in_channels:
            images = images.expand(-1, self.in_channels, -1, -1)
        logits: Tensor = self.backbone((images - self.mean) / self.std)
        return logits if self.temperature == 1 else logits / self.temperature

    def check_classes(self, classes: tuple[str, ...], source: str) -> None:
        """Raise InputError if a data set's classes are not those that the model, from `source`, knows."""
        if classes != self.classes:
            raise InputError(
                f"data.path: its classes are {', '.join(classes)}, but those of {source} are {', '.join(self.classes)}"
            )

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write model.safetensors and config.json, all that load_run needs; `state`: in place of its own weights."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in (state or self.state_dict()).items()}
        settings = {**self.settings, "classes": self.classes}
        write_file(folder / "model.safetensors", lambda file: safetensors.torch.save_file(tensors, file))
        write_file(folder / "config.json", lambda file: file.write_text(json.dumps(settings, indent=2) + "\n"))


def weights_file(run_dir: str | os.PathLike[str]) -> Path:
    """Return where the best model's weights are in a run folder, or in its best/ folder itself."""
    folder = Path(run_dir)
    return (folder / "best" if (folder / "best").is_dir() else folder) / "model.safetensors"


def load_run(run_dir: str | os.PathLike[str]) -> FaceModel:
    """Return the best model of a run folder (or of its best/ folder itself), in eval mode, on the CPU.

    Raises InputError if the folder holds no complete model.
    """
    folder = weights_file(run_dir).parent
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} does not exist; {run_dir} is not the folder of a finished epoch")
    try:
        settings = json.loads((folder / "config.json").read_text())
        settings = settings.get("dist_train", settings)  # a Hub folder's config is timm's, with ours in it
        model = FaceModel(pretrained=False, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model: {error}") from error
    state = _read_weights(folder / "model.safetensors")
    if state and not any(key.startswith("backbone.") for key in state):  # timm's names
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    _load_state(model, state, folder / "model.safetensors", head=())
    return model.eval()


def _build_torchvision(
    name: str, num_classes: int, in_channels: int, fetch: bool
) -> tuple[nn.Module, list[float], list[float]]:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(
            f"model.backbone: no torchvision classifier {name!r}{nearest(name, names)}; timm's are written timm/NAME"
        )
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "transform_input": in_channels == 3}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if in_channels == 1:
        _make_gray(model)
    if fetch:
        state = _fetch(name, lambda: torchvision.models.get_model(name, weights=weights, progress=False).state_dict())
        state = {key: tensor for key, tensor in state.items() if options == {} or not key.lower().startswith("aux")}
        _load_state(model, state, name)
    preset = weights.transforms()
    return model, list(preset.mean), list(preset.std)


def _build_timm(
    name: str, num_classes: int, in_channels: int, fetch: bool
) -> tuple[nn.Module, list[float], list[float]]:
    short = name.removeprefix("timm/")
    architecture = short.split(".")[0]
    if architecture not in timm.list_models():
        raise InputError(f"model.backbone: no timm model {architecture!r}{nearest(architecture, timm.list_models())}")

    def create() -> nn.Module:
        return timm.create_model(short, pretrained=fetch, num_classes=num_classes, in_chans=in_channels)

    model: Any = _fetch(name, create) if fetch else create()
    return model, list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"])


def _fetch(name: str, download: Callable[[], Any]) -> Any:
    try:
        return download()
    except Exception as error:  # every hub client has its own exceptions for "no network"
        reason = str(error).split("\n")[0]
        raise InputError(f"model.pretrained: the weights of {name} cannot be fetched ({reason}); {WAYS_OUT}") from error


def _make_gray(model: nn.Module) -> None:
    """Let the first convolution see one channel."""
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.in_channels = 1
    conv.weight = nn.Parameter(adapt_input_conv(1, conv.weight.detach()))


def _shrink_stem(model: nn.Module, name: str, stride: int) -> None:
    """Replace the 7x7 stem of a ResNet by a 3x3 one, as for small images in He et al. 2016, with random weights."""
    stem = getattr(model, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (7, 7) or not hasattr(model, "maxpool"):
        raise InputError(f"model.stem_stride: {name} has no 7x7 stem to replace; set model.stem_stride: null")
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = conv, nn.Identity()


def _head_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier's parameters: of timm's own account, else of the last layer."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if names is None:
        names = [name for name, module in model.named_modules() if next(module.parameters(False), None) is not None][-1]
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file; nothing in the file is executed."""
    if not file.is_file():
        raise InputError(f"model.weights: {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make either reader fail in any way
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model.weights: {file} is not a readable weights file ({reason})") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"model.weights: {file} holds no state dict of tensors")
    return state


def _load_file(model: nn.Module, file: Path) -> None:
    state = _read_weights(file)
    while prefix := next((p for p in PREFIXES if state and all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    _load_state(model, state, file)


def _load_state(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, head: Sequence[str] | None = None
) -> None:
    """Load `state`; a head or stem of another size stays random, any other difference is an InputError naming keys."""
    own = model.state_dict()
    state = dict(state)
    for key in (*_head_keys(model), STEM) if head is None else head:
        if key not in state or key not in own or state[key].shape == own[key].shape:
            continue
        if key != STEM or own[key].shape[-1] == 3 < state[key].shape[-1]:  # by model.stem_stride
            sizes = list(state[key].shape), list(own[key].shape)
            logger.info("%s: %s of shape %s stays behind; a new random one of %s replaces it", source, key, *sizes)
            state[key] = own[key]
    for key, tensor in state.items():
        if key in own and tensor.ndim == 4 and own[key].shape[1] == 1 and tensor.shape[1] == 3:
            state[key] = adapt_input_conv(1, tensor)
            break
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    other = [
        f"{key} {list(tensor.shape)} for {list(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    if missing or unknown or other:
        found = [
            f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", other))
            if keys
        ]
        raise InputError(f"model.weights: {source} does not fit the backbone; keys {'; '.join(found)}")
    model.load_state_dict(state, strict=False)
