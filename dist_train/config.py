"""The whole configuration of a training as dataclasses: every key with its default, meaning and check.

Attribute docstrings become the command line's help. A value out of range raises InputError when the
dataclass is built, from YAML, from the command line and from Python alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

CLASSES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")


class InputError(ValueError):
    """Bad input (configuration, data, weights, run folder): one line that says what is wrong and the way out."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known word closest to `word`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _require(key: str, value: Any, passes: bool, allowed: str) -> None:
    if not passes:
        raise InputError(f"{key}: {value!r} is not allowed; expected {allowed}")


def _require_share(key: str, value: float) -> None:
    _require(key, value, 0 <= value < 1, "a number from 0 up to, not including, 1")


def _require_not_negative(key: str, value: float) -> None:
    _require(key, value, 0 <= value < float("inf"), "a number >= 0")


def _require_positive(key: str, value: float | None) -> None:
    _require(key, value, value is None or 0 < value < float("inf"), "a number > 0")


@dataclass
class AugmentConfig:
    """Random changes of training images, one draw per sample."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotate: float = 10.0
    """Largest rotation, in degrees, either way."""
    translate: float = 0.08
    """Largest shift, as a share of the image's side, either way."""
    scale: float = 0.1
    """Largest change of size: factors 1-scale to 1+scale."""
    brightness: float = 0.2
    """Largest change of brightness, as a share of white, either way."""
    contrast: float = 0.2
    """Largest change of contrast: factors 1-contrast to 1+contrast."""
    erase: float = 0.0
    """Probability that a rectangle of 2 to 20 % of the image is grayed (random erasing)."""

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            value = getattr(self, name)
            _require(f"data.augment.{name}", value, 0 <= value <= 1, "a probability from 0 to 1")
        _require("data.augment.rotate", self.rotate, 0 <= self.rotate <= 180, "degrees from 0 to 180")
        for name in ("translate", "scale", "brightness", "contrast"):
            _require_share(f"data.augment.{name}", getattr(self, name))


@dataclass
class DataConfig:
    """Which images to train on, and how they are kept and changed."""

    source: Literal["auto", "folder", "csv", "hub", "synthetic"] = "auto"
    """Where images come from; auto: by what path is, and the built-in faces when there is no path."""
    path: str | None = None
    """Folder with train/<class>/* and validation/<class>/*; a fer2013.csv file; of source hub: a data set's name on the
    Hugging Face Hub, or a folder, glob or URL of Parquet or WebDataset (tar) shards."""
    splits: str | None = None
    """CSV file of path (under data.path) and split (train, validation, test), in place of the folders' own split."""
    image_size: int = 48
    """Side of the square images that the model sees, in pixels."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    residency: Literal["auto", "device", "host", "stream"] = "auto"
    """Where the decoded images stay; stream: nowhere, each is decoded when needed; auto: stream if they would take half
    of the machine's free memory, else device if they take less than half of the device's, else host."""
    workers: int = 0
    """Threads of each process that decode images; 0: the machine's cores, shared out."""
    cache: str | None = None
    """Folder for decoded images; null: dist_train in the user's cache folder."""
    skip_bad: bool = False
    """Leave unreadable images out, with a warning, instead of stopping."""
    drop_leaked: bool = False
    """Leave out of validation the images whose pixels are also in train."""
    validation_share: float = 0.15
    """Share of train, by class, that becomes validation where the data has no validation split."""
    count: int = 5000
    """Number of built-in faces drawn, train and validation together."""

    def __post_init__(self) -> None:
        _require("data.image_size", self.image_size, 16 <= self.image_size <= 1024, "16 to 1024 pixels")
        _require("data.workers", self.workers, self.workers >= 0, "a whole number >= 0")
        share = self.validation_share
        _require("data.validation_share", share, 0 < share < 1, "a number between 0 and 1")
        _require("data.count", self.count, self.count >= 70, "at least 70 faces")
        if self.source in ("folder", "csv", "hub") and self.path is None:
            raise InputError(f"data.path: missing; data.source {self.source} needs the path of the data")
        if self.source == "synthetic" and self.path is not None:
            raise InputError(f"data.path: {self.path} given, but data.source synthetic draws its own faces")
        if self.splits is not None and (self.path is None or self.source == "csv"):
            raise InputError(f"data.splits: {self.splits} given, but it is for the images of a folder (data.path)")


@dataclass
class ModelConfig:
    """The classifier: a backbone of torchvision or timm with a head for the data's classes."""

    backbone: str = "resnet18"
    """A torchvision classifier's name, or timm/NAME."""
    pretrained: bool = True
    """Start from the backbone's published weights; false: from random weights."""
    weights: str | None = None
    """A local .safetensors or .pth file to start from, in place of published weights."""
    in_channels: Literal[1, 3] = 3
    """Channels that the backbone sees; gray images are repeated to three."""
    stem_stride: Literal[1, 2] | None = None
    """For small images: 1 or 2, the shrinking of a 3x3 stem that replaces a ResNet's 7x7 one of 4; null: keep it."""


@dataclass
class TrainConfig:
    """The training itself."""

    epochs: int = 15
    """Passes over the training images."""
    batch_size: int | Literal["auto"] = 128
    """Images per optimizer step over all processes and micro-batches together; auto: the smallest near full speed."""
    gradient_accumulation: int = 1
    """Micro-batches that each process splits its share of a batch into, to save memory."""
    precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Mixed precision; auto: bf16 where the device computes in it, else fp16 on a GPU, else none."""
    seed: int = 0
    """Seed of the head's weights, the order of samples and every random draw."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = True
    """Keep the weights of convolutions, and so what they compute, in channels-last memory order."""
    sync_batchnorm: bool = False
    """Share batch statistics between processes (GPUs only)."""
    bf16_gradients: bool = False
    """Send gradients between processes in bf16, half the bytes of fp32; one process has none to send."""
    ema: float = 0.0
    """Decay of the moving average of weights that is validated and saved as best; 0: none."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: none."""
    clip_grad: float | None = None
    """Largest gradient norm; null: no clipping."""
    patience: int | None = None
    """Stop after this many epochs without a better validation figure (save.best_on); null: never."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if the epochs do not end sooner."""
    max_bad_steps: int = 3
    """Give up after this many steps in a row whose loss is not finite; such steps change no weights."""
    profile: bool = False
    """Record some of the first steps: trace.json and, of where their time goes, profile.csv in the run folder."""

    def __post_init__(self) -> None:
        size = self.batch_size
        _require("train.batch_size", size, size == "auto" or size >= 1, "a whole number >= 1, or auto")
        for name in ("epochs", "gradient_accumulation", "max_bad_steps"):
            _require(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        for name in ("patience", "max_steps"):
            value = getattr(self, name)
            _require(f"train.{name}", value, value is None or value >= 1, "a whole number >= 1, or null")
        _require("train.seed", self.seed, 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1")
        _require_share("train.ema", self.ema)
        _require_share("train.label_smoothing", self.label_smoothing)
        _require_not_negative("train.mixup", self.mixup)
        _require_positive("train.clip_grad", self.clip_grad)


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "sgd"
    """Any optimizer of timm by name: sgd (with Nesterov momentum 0.9), adam, adamw, ..."""
    lr: float = 0.05
    """Highest learning rate."""
    weight_decay: float = 5e-4
    """Weight decay of all weights but biases and normalisation."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up, down to 0 at the last step (constant: no fall)."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        _require_positive("optim.lr", self.lr)
        _require_not_negative("optim.weight_decay", self.weight_decay)
        _require_not_negative("optim.warmup_epochs", self.warmup_epochs)


@dataclass
class TrackConfig:
    """Where loss and accuracy are streamed to."""

    tool: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Tracker; the run folder's own history is written in any case."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode; auto: online where a login is found, else offline."""
    project: str = "dist_train"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: your default one."""
    name: str | None = None
    """Name of the run; null: the run folder's name."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    log_every: int = 20
    """Optimizer steps between two points of the training curves."""

    def __post_init__(self) -> None:
        _require("track.log_every", self.log_every, self.log_every >= 1, "a whole number >= 1")
        _require("track.project", self.project, bool(self.project.strip()), "a name")


@dataclass
class SaveConfig:
    """When checkpoints are written and which are kept."""

    every_epochs: int = 1
    """Epochs between two checkpoints; the last epoch always makes one."""
    every_steps: int | None = None
    """Optimizer steps between two checkpoints besides; null: none within an epoch."""
    keep: int = 2
    """Newest checkpoints kept; the best model is kept besides."""
    best_on: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    """Validation figure that chooses the best model."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "keep"):
            _require(f"save.{name}", getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        steps = self.every_steps
        _require("save.every_steps", steps, steps is None or steps >= 1, "a whole number >= 1, or null")


@dataclass
class Config:
    """One training: data -> model -> training -> run folder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    run_dir: str | None = None
    """Folder that this training leaves; null: runs/ and the time of the start."""
    resume: str = "never"
    """never; auto: go on from the run folder's newest checkpoint, if there is one; or a checkpoint's path."""
    resume_changed: bool = False
    """Resume although data or settings differ from the checkpoint's; the optimizer keeps the checkpoint's."""

    def __post_init__(self) -> None:
        _require("run_dir", self.run_dir, self.run_dir is None or bool(self.run_dir.strip()), "a folder")
        _require("resume", self.resume, bool(self.resume.strip()), "auto, never or a path")
