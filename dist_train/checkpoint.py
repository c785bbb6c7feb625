"""Checkpoints: what changes during a training, saved whole or not at all, rotated, brought back.

A checkpoint is a folder checkpoints/step_<n>/ with model.safetensors (and ema.safetensors), state.pt (only tensors,
numbers and strings, so nothing in it is executed), origin.json (what it was made with) and SHA256SUMS. Position and
sums are global: a training may go on with another number of processes.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from dist_train.files import SUMS, find_fault, remove_folder, seal_folder
from dist_train.state import TrainState

logger = logging.getLogger(__name__)

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Checkpointer:
    """Saves, rotates and restores the checkpoints of one run folder; all methods are called on all processes.

    A save copies the state and returns; one thread of the main process writes the copies, in order. What cannot be
    written (a full disk) is a warning: the training goes on, earlier checkpoints stay, the next save tries again.
    """

    def __init__(
        self,
        run_dir: Path,
        accelerator: Accelerator,
        *,
        keep: int = 2,
        every_epochs: int = 1,
        every_steps: int | None = None,
        resume_from: Path | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.best = run_dir / "best"
        self.accelerator = accelerator
        self.keep, self.every_epochs, self.every_steps = keep, every_epochs, every_steps
        self.resume_from = resume_from
        self.origin = dict(origin or {})
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writes: list[Future[None]] = []
        self._owed_best: Callable[[], None] | None = None

    def after_step(self, state: TrainState) -> None:
        """Save if every_steps says so."""
        if self.every_steps and state.progress.step % self.every_steps == 0:
            self.save(state)

    def after_epoch(self, state: TrainState, last: bool) -> None:
        """Save the best model if this epoch is the best, and a checkpoint if every_epochs says so."""
        progress = state.progress
        if progress.best_epoch == progress.epoch:
            self._save_best(state)
        elif self._owed_best:
            self._write_soon("best/", self._owed_best)
        if last or progress.epoch % self.every_epochs == 0:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Save checkpoints/step_<n>/, then delete those beyond `keep`."""
        model, optimizer = get_state_dict(state.model, state.optimizer, options=FULL_STATE)
        rest = {
            "optimizer": optimizer,
            "progress": state.progress.state_dict(),
            "parts": {name: part.state_dict() for name, part in state.parts.items()},
        }
        if self.accelerator.is_main_process:
            tensors = {"model.safetensors": _copied(model)}
            if state.ema is not None:
                tensors["ema.safetensors"] = _copied(state.ema.state_dict())
            rest, name = copy.deepcopy(rest), f"step_{state.progress.step:08d}"
            self._write_soon(f"checkpoint {name}", lambda: self._write(name, tensors, rest))

    def flush(self) -> None:
        """Wait until all that was saved is on the disk."""
        while self._writes:
            self._writes.pop(0).result()

    def restore(self, state: TrainState) -> None:
        """Bring `state` back from `resume_from`, if there is one.

        Raises InputError if the checkpoint cannot be read or was made by another model or optimizer.
        """
        if self.resume_from is None:
            return
        try:
            model: dict[str, Any] = safetensors.torch.load_file(self.resume_from / "model.safetensors")
            rest = torch.load(self.resume_from / "state.pt", map_location="cpu", weights_only=True)
            ema = safetensors.torch.load_file(self.resume_from / "ema.safetensors") if state.ema is not None else {}
            set_state_dict(
                state.model,
                state.optimizer,
                model_state_dict=model,
                optim_state_dict=rest["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
            _lay_out(state.optimizer)
            if state.ema is not None:
                state.ema.load_state_dict(ema)
            state.progress.load_state_dict(rest["progress"])
            for name, part in state.parts.items():
                if name != "scaler" or name in rest["parts"]:  # made in another precision
                    part.load_state_dict(rest["parts"][name])
        except Exception as error:  # what does not fit can fail in any way
            raise InputError(
                f"resume: {self.resume_from} is not of this model, optimizer and settings ({_first_line(error)})"
            ) from error
        if not self.best.is_dir():  # resumed in another folder: its best is yet to come
            state.progress.best_score, state.progress.best_epoch = float("-inf"), state.progress.epoch
        logger.info("resumed from %s: step %d, epoch %d", self.resume_from, state.progress.step, state.progress.epoch)

    def _save_best(self, state: TrainState) -> None:
        """Save best/: the averaged weights if there are any, else the model's own."""
        model = get_model_state_dict(state.model, options=FULL_STATE)
        if self.accelerator.is_main_process:
            tensors = _copied(model if state.ema is None else state.ema.state_dict())
            unwrapped: Any = self.accelerator.unwrap_model(state.model)
            self._owed_best = lambda: unwrapped.save(self.best, tensors)
            self._write_soon("best/", self._owed_best)

    def _write_soon(self, what: str, write: Callable[[], None]) -> None:
        """Hand a write to the thread; wait for older ones first, so that at most two copies are held."""

        def attempt() -> None:
            try:
                write()
                self._owed_best = None if write is self._owed_best else self._owed_best
            except Exception as error:  # a full disk shows in many ways: OSError, SafetensorError, RuntimeError
                logger.warning(
                    "%s cannot be saved (%s); the training goes on, what was saved before is kept, and the next save "
                    "tries again",
                    what,
                    _first_line(error),
                )

        while len(self._writes) > 1:
            self._writes.pop(0).result()
        self._writes.append(self._writer.submit(attempt))

    def _write(self, name: str, tensors: dict[str, dict[str, torch.Tensor]], rest: dict[str, Any]) -> None:
        aside = self.folder / f".{name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            for file, values in tensors.items():
                safetensors.torch.save_file(values, aside / file)
            torch.save(rest, aside / "state.pt")
            (aside / "origin.json").write_text(json.dumps(self.origin, indent=2) + "\n")
            seal_folder(aside, self.folder / name)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in list_checkpoints(self.folder)[: -self.keep]:
            remove_folder(old)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give what the optimizer keeps the strides of its parameters, which a fused step takes for granted."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _copied(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first; they may be damaged."""
    return sorted(path for path in folder.glob("step_*") if (path / SUMS).is_file())


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Return the whole checkpoint that `resume` (auto, never or a path) names, or None to start anew.

    auto: the newest whole one; damaged ones are named in a warning. Raises InputError if none is whole.
    """
    if resume == "never":
        return None
    folder = run_dir / "checkpoints"
    if resume == "auto":
        found = [path for path in folder.glob("step_*") if path.is_dir()] if folder.is_dir() else []
        for path in sorted(found, reverse=True):
            if not (fault := find_fault(path)):
                return path
            logger.warning("resume: %s is skipped, it is not whole: %s", path, fault)
        if found:
            raise InputError(f"resume: no checkpoint in {folder} is whole; start anew in another run_dir")
        return None
    path = Path(resume)
    if not (path / SUMS).is_file():
        raise InputError(f"resume: {path} is not a checkpoint folder; expected auto, never or .../checkpoints/step_N")
    if fault := find_fault(path):
        raise InputError(f"resume: {path} is not whole: {fault}; name another, or use --resume auto")
    newer = [other.name for other in list_checkpoints(path.parent) if other.name > path.name]
    if newer and path.parent.resolve() == folder.resolve():
        raise InputError(
            f"resume: {run_dir} has newer checkpoints than {path.name} ({newer[-1]}); name another run_dir"
        )
    return path


def set_aside_damaged(checkpoint: Path | None, run_dir: Path) -> None:
    """Rename what find_checkpoint skipped, so that rotation does not take it for newer; delete unfinished writes."""
    folder = run_dir / "checkpoints"
    for path in folder.glob(".*step_*"):
        shutil.rmtree(path)
    for path in folder.glob("step_*"):
        if checkpoint is not None and path.name > checkpoint.name:
            path.rename(folder / f"damaged_{path.name}_{path.stat().st_mtime_ns}")


def check_checkpoint(path: Path, model: nn.Module, origin: Mapping[str, Any], changed: bool) -> None:
    """Raise InputError if the checkpoint's weights are not those of `model`, or if it has another origin.

    origin: what decides a training's course, by key; changed: let it differ.
    """
    made_with = json.loads((path / "origin.json").read_text())
    other = [key for key in origin if made_with.get(key) != origin[key]]
    if other and not changed:
        key = other[0]
        raise InputError(
            f"resume: {key} is {_shown(origin[key])}, but {path} was made with {_shown(made_with.get(key))}; "
            "put it back, start a new run, or go on with resume_changed: true"
        )
    with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
        saved = {key: list(file.get_slice(key).get_shape()) for key in list(file.keys())}
    own = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if differing := sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key)):
        raise InputError(
            f"resume: {path} is of another model; {len(differing)} weights differ, the first is {differing[0]}"
        )


def _shown(value: Any) -> str:
    return json.dumps(value)
