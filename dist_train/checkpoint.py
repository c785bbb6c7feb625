"""Checkpoints: what changes during a training, saved whole or not at all, rotated, brought back.

A checkpoint is a folder checkpoints/step_<n>/ with model.safetensors (and ema.safetensors) and state.pt: only
tensors, numbers and strings, so nothing in it is executed. Position and sums are global: a training may go on
with another number of processes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from dist_train.config import InputError

logger = logging.getLogger(__name__)

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


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


class Checkpointer:
    """Saves, rotates and restores the checkpoints of one run folder; all methods are called on all processes."""

    def __init__(
        self,
        run_dir: Path,
        accelerator: Accelerator,
        *,
        keep: int = 2,
        every_epochs: int = 1,
        every_steps: int | None = None,
        resume_from: Path | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.best = run_dir / "best"
        self.accelerator = accelerator
        self.keep, self.every_epochs, self.every_steps = keep, every_epochs, every_steps
        self.resume_from = resume_from

    def after_step(self, state: TrainState) -> None:
        """Save if every_steps says so."""
        if self.every_steps and state.progress.step % self.every_steps == 0:
            self.save(state)

    def after_epoch(self, state: TrainState, last: bool) -> None:
        """Save the best model if this epoch is the best, and a checkpoint if every_epochs says so."""
        progress = state.progress
        if progress.best_epoch == progress.epoch:
            self.save_best(state)
        if last or progress.epoch % self.every_epochs == 0:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Write checkpoints/step_<n>/ aside, rename it into place, then delete those beyond `keep`."""
        model, optimizer = _full_state(state)
        rest = {
            "optimizer": optimizer,
            "progress": state.progress.state_dict(),
            "parts": {name: part.state_dict() for name, part in state.parts.items()},
        }
        if self.accelerator.is_main_process:
            target = self.folder / f"step_{state.progress.step:08d}"
            aside = self.folder / f".{target.name}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            safetensors.torch.save_file(model, aside / "model.safetensors")
            if state.ema is not None:
                safetensors.torch.save_file(_contiguous(state.ema.state_dict()), aside / "ema.safetensors")
            torch.save(rest, aside / "state.pt")
            if target.exists():
                target.rename(self.folder / f".old_{target.name}")
            aside.rename(target)
            shutil.rmtree(self.folder / f".old_{target.name}", ignore_errors=True)
            for old in list_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def save_best(self, state: TrainState) -> None:
        """Write best/: the averaged weights if there are any, else the model's own."""
        model = _contiguous(get_model_state_dict(state.model, options=FULL_STATE))
        if self.accelerator.is_main_process:
            unwrapped: Any = self.accelerator.unwrap_model(state.model)
            unwrapped.save(self.best, model if state.ema is None else _contiguous(state.ema.state_dict()))

    def restore(self, state: TrainState) -> bool:
        """Bring `state` back from `resume_from`; return whether there was anything to bring back.

        Raises InputError if the checkpoint cannot be read or was made by another model or optimizer.
        """
        if self.resume_from is None:
            return False
        try:
            model: dict[str, Any] = safetensors.torch.load_file(self.resume_from / "model.safetensors")
            rest = torch.load(self.resume_from / "state.pt", map_location="cpu", weights_only=True)
            ema = safetensors.torch.load_file(self.resume_from / "ema.safetensors") if state.ema is not None else {}
        except Exception as error:  # a damaged file can make either reader fail in any way
            raise InputError(f"resume: {self.resume_from} cannot be read ({_first_line(error)})") from error
        try:
            set_state_dict(
                state.model,
                state.optimizer,
                model_state_dict=model,
                optim_state_dict=rest["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
            if state.ema is not None:
                state.ema.load_state_dict(ema)
            state.progress.load_state_dict(rest["progress"])
            for name, part in state.parts.items():
                part.load_state_dict(rest["parts"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(
                f"resume: {self.resume_from} is of another model, optimizer or setting ({_first_line(error)})"
            ) from error
        if not self.best.is_dir():  # resumed in another folder: its best is yet to come
            state.progress.best_score, state.progress.best_epoch = float("-inf"), state.progress.epoch
        logger.info("resumed from %s: step %d, epoch %d", self.resume_from, state.progress.step, state.progress.epoch)
        return True


def _full_state(state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the whole model and optimizer state by parameter names, however they are wrapped or sharded."""
    model, optimizer = get_state_dict(state.model, state.optimizer, options=FULL_STATE)
    return _contiguous(model), optimizer


def _contiguous(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(
        path
        for path in folder.glob("step_*")
        if (path / "state.pt").is_file() and (path / "model.safetensors").is_file()
    )


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint that `resume` (auto, never or a path) names, or None to start anew."""
    if resume == "never":
        return None
    if resume == "auto":
        found = list_checkpoints(run_dir / "checkpoints")
        return found[-1] if found else None
    path = Path(resume)
    if not (path / "state.pt").is_file():
        raise InputError(f"resume: {path} is not a checkpoint folder; expected auto, never or .../checkpoints/step_N")
    newer = [other.name for other in list_checkpoints(path.parent) if other.name > path.name]
    if newer and path.parent.resolve() == (run_dir / "checkpoints").resolve():
        raise InputError(
            f"resume: {run_dir} has newer checkpoints than {path.name} ({newer[-1]}); name another run_dir"
        )
    return path


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Raise InputError if the checkpoint's weights are not those of `model`, without reading them all."""
    try:
        with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
            saved = {key: list(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise InputError(f"resume: {path} cannot be read ({_first_line(error)})") from error
    own = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if other := sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key)):
        raise InputError(f"resume: {path} is of another model; {len(other)} weights differ, the first is {other[0]}")
