"""What changes during a training: the state that checkpoints save and resuming brings back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

PACKAGES = ("dist_train", "torch", "torchvision", "accelerate", "timm", "wandb")
"""Whose versions a run records, and all its processes must share."""


class Stateful(Protocol):
    """What can be saved and brought back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Epoch:
    """One row of history.csv; accuracies in 0..1, losses in nats."""

    epoch: int
    train_loss: float
    train_acc: float
    valid_loss: float
    valid_acc: float
    lr: float
    images_per_second: float
    seconds: float


@dataclass
class Progress:
    """Where a training stands: finished epochs, optimizer steps done, the last one's learning rate, the best epoch."""

    step: int = 0
    rate: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)
    best_score: float = float("-inf")
    best_epoch: int = 0

    @property
    def epoch(self) -> int:
        """Number of finished epochs, which is the index of the one under way."""
        return len(self.epochs)

    def add(self, row: Epoch, score: float) -> None:
        """Add a finished epoch; the greatest `score` makes it the best."""
        self.epochs.append(row)
        if score > self.best_score:
            self.best_score, self.best_epoch = score, row.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state`."""
        for name, value in state.items():
            setattr(self, name, [Epoch(**row) for row in value] if name == "epochs" else value)


@dataclass
class TrainState:
    """All that changes during a training; `parts` are the rest that has a state dict, by name."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    ema: nn.Module | None = None
    parts: dict[str, Stateful] = field(default_factory=dict)
