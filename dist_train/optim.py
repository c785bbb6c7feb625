"""Optimizer and learning-rate schedule, built from config."""

from __future__ import annotations

import math

import timm.optim
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_train.config import InputError, OptimConfig, nearest

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that can update all parameters in one kernel."""


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = False) -> torch.optim.Optimizer:
    """Return the named optimizer over the model's parameters, without weight decay on biases and norms.

    fused: take the fused form, where there is one; not with a GradScaler, whose skipped steps it hides.
    """
    names = timm.optim.list_optimizers()
    if config.name not in names:
        raise InputError(f"optim.name: no optimizer {config.name!r}{nearest(config.name, names)}")
    form = {"fused": True} if fused and timm.optim.get_optimizer_class(config.name, False) in FUSED else {}
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            model, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **form
        )
    except (AssertionError, ImportError, RuntimeError) as error:
        raise InputError(f"optim.name: {config.name} cannot be used here ({error})") from error
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, epoch_steps: int, steps: int) -> LambdaLR:
    """Return the schedule, to be stepped once after every optimizer step, for `steps` steps in all."""
    warmup = min(round(config.warmup_epochs * epoch_steps), steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if config.schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)
