"""train(): the loop. For epoch, for batch: forward, loss, backward, step, count.

In: a model, two loaders, an optimizer. Out: the history. Tracking and checkpoints, where given, are called
after a step and after an epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dist_train.checkpoint import Checkpointer
from dist_train.config import InputError
from dist_train.data.loader import Batch, ImageLoader
from dist_train.evaluation import evaluate, shard_exactly, split_batch
from dist_train.faults import Watch
from dist_train.metrics import Meter, Results
from dist_train.processes import default_accelerator
from dist_train.profiling import Profiler
from dist_train.state import Epoch, Progress, TrainState
from dist_train.tracking import Tracker

logger = logging.getLogger(__name__)


class History(NamedTuple):
    """What train() returns: four lists with one value per epoch; losses in nats, accuracies in 0..1."""

    train_loss: list[float]
    train_acc: list[float]
    valid_loss: list[float]
    valid_acc: list[float]


def train(
    model: nn.Module,
    trainloader: DataLoader | ImageLoader,
    validloader: DataLoader | ImageLoader,
    optimizer: torch.optim.Optimizer,
    num_epochs: int = 20,
    *,
    accelerator: Accelerator | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    gradient_accumulation: int = 1,
    label_smoothing: float = 0.0,
    clip_grad: float | None = None,
    ema: float = 0.0,
    patience: int | None = None,
    max_steps: int | None = None,
    best_on: str = "accuracy",
    seed: int | None = None,
    log_every: int = 20,
    tracker: Tracker | None = None,
    checkpointer: Checkpointer | None = None,
    watch: Watch | None = None,
    profiler: Profiler | None = None,
    progress: Progress | None = None,
) -> History:
    """Train `model` and return (train_loss, train_acc, valid_loss, valid_acc), one value per epoch.

    trainloader, validloader: DataLoaders of (images, labels int64 [B]) batches, or ImageLoaders. A DataLoader's
    batch size is each process's own, as everywhere in accelerate, and accelerate completes its last training
    batch with samples from its first; validation counts every sample once.

    scheduler: stepped once after every optimizer step. gradient_accumulation: parts that a batch is computed in.
    ema: decay of an average of the weights, which is what is then validated; it rises to that value in the first
    steps (timm's warm-up). patience: epochs without a better
    `best_on` (accuracy, macro_f1 or loss of validation) after which training stops. seed: makes dropout and
    the like a function of seed, step and process. watch: may end the training early, by an exception. profiler:
    is told which part of a step begins. progress: is kept up to date with where the training stands.

    The model is trained in place and ends with its last weights (not the average, which `checkpointer` saves).
    """
    accelerator = accelerator or default_accelerator()
    if accelerator.gradient_accumulation_steps > 1:
        raise InputError("accelerator: made with gradient_accumulation_steps; give gradient_accumulation to train()")
    if accelerator.distributed_type != DistributedType.FSDP:
        model.to(accelerator.device)  # prepare() leaves a model that it has met before where it is
    averaged = ModelEmaV3(model, ema, use_warmup=True).to(accelerator.device) if ema else None
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = trainloader if isinstance(trainloader, ImageLoader) else _DataLoaderBatches(trainloader, accelerator)
    validloader = shard_exactly(validloader, accelerator)
    tracker, checkpointer = tracker or NOTHING, checkpointer or NOTHING
    watch, profiler = watch or NOTHING, profiler or NOTHING
    progress, meter = progress or Progress(), Meter(accelerator)
    state = TrainState(model, getattr(optimizer, "optimizer", optimizer), progress, averaged and averaged.module)
    if isinstance(batches, ImageLoader):  # an ordinary DataLoader has no position: its epoch begins anew
        state.parts = {"batches": batches, "meter": meter}
    state.parts |= {"scheduler": scheduler} if scheduler else {}
    state.parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    checkpointer.restore(state)

    while not _finished(progress, num_epochs, max_steps, patience):
        batches.set_epoch(progress.epoch)
        model.train()
        meter.start_clock()
        profiler.begin("data")
        with _progress_bar(batches, progress.epoch, num_epochs, accelerator) as bar:
            for batch in watch.batches(bar, state) or bar:
                profiler.begin("forward")
                _seed_step(seed, progress.step, accelerator.process_index)
                watch.before_step(model)
                outputs = []
                for images, labels, last in batch.micro_batches(gradient_accumulation):
                    with nullcontext() if last else accelerator.no_sync(model):
                        profiler.begin("forward")
                        logits = model(images)
                        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
                        watch.see(loss)
                        profiler.begin("backward")
                        accelerator.backward(loss * batch.scale)
                    outputs.append((loss, logits, labels))
                profiler.begin("agree")
                bad = watch.agree()
                if bad and accelerator.scaler:
                    _spoil_gradients(model)
                profiler.begin("optimizer")
                progress.step += 1
                logs = progress.step % log_every == 0
                norm = _gradient_norm(model, clip_grad, accelerator) if logs or clip_grad else None
                progress.rate = optimizer.param_groups[0]["lr"]
                if not bad or accelerator.scaler:  # a scaler skips the step by itself, and learns from it
                    optimizer.step()
                    stepped = not accelerator.optimizer_step_was_skipped
                    if scheduler and stepped:
                        scheduler.step()
                    if averaged and stepped:
                        averaged.update(accelerator.unwrap_model(model), progress.step)
                optimizer.zero_grad()
                profiler.begin("logging")
                for output in () if bad else outputs:
                    meter.update(*output)
                if logs:
                    _log_step(meter, norm, progress, tracker, bar)
                if progress.step == max_steps:
                    break
                if not bad:  # else it would be newer than the state before the bad steps, which giving up saves
                    checkpointer.after_step(state)
                watch.after_step(state, batch)
                profiler.begin("data")
            profiler.begin("validation")
            trained, speed = meter.end_epoch()
            valid = _validate(state, validloader, accelerator)
            bar.set_postfix(_shown(trained) | {f"valid_{name}": text for name, text in _shown(valid).items()})
        row = Epoch(
            progress.epoch + 1,
            trained.loss,
            trained.accuracy,
            valid.loss,
            valid.accuracy,
            progress.rate,
            speed,
            meter.seconds,
        )
        progress.add(row, _score(valid, best_on))
        _report(row, num_epochs)
        tracker.after_epoch(progress.step, progress.epochs, valid)
        checkpointer.after_epoch(state, last=_finished(progress, num_epochs, max_steps, patience))
    profiler.close()
    for held, own in ((accelerator._models, model), (accelerator._optimizers, optimizer)):
        held[:] = [item for item in held if item is not own]  # a next training with this Accelerator must not meet them
    rows = progress.epochs
    return History(
        [row.train_loss for row in rows],
        [row.train_acc for row in rows],
        [row.valid_loss for row in rows],
        [row.valid_acc for row in rows],
    )


class _Nothing:
    """Stands in for what a training goes without: every method may be called, does nothing and returns None."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


NOTHING: Any = _Nothing()


class _DataLoaderBatches:
    """An ordinary DataLoader, sharded by accelerate, in the form of an ImageLoader without a position."""

    def __init__(self, loader: DataLoader, accelerator: Accelerator) -> None:
        self.loader = accelerator.prepare(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            images, labels = split_batch(batch)
            yield Batch(images, labels, 1 / len(labels), len(labels), torch.arange(0), 0)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


def _finished(progress: Progress, num_epochs: int, max_steps: int | None, patience: int | None) -> bool:
    if progress.epoch >= num_epochs or (max_steps and progress.step >= max_steps):
        return True
    return patience is not None and progress.epoch - progress.best_epoch >= patience


def _seed_step(seed: int | None, step: int, rank: int) -> None:
    """Seed dropout and the like for one step, so that no generator's state has to be saved."""
    if seed is not None:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _spoil_gradients(model: nn.Module) -> None:
    """Let a scaler skip the step: of a loss that is not finite it may see finite gradients."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)


def _gradient_norm(model: nn.Module, clip_grad: float | None, accelerator: Accelerator) -> Tensor:
    norm = accelerator.clip_grad_norm_(model.parameters(), clip_grad or float("inf"))
    assert norm is not None
    return norm


def _validate(state: TrainState, loader: DataLoader | ImageLoader, accelerator: Accelerator) -> Results:
    """Evaluate the averaged weights if there are any, with the main process's batch statistics on all."""
    if accelerator.num_processes > 1:
        for module in (state.model, state.ema):
            if module is not None:
                distribute_bn(module, accelerator.num_processes, reduce=False)
    return evaluate(state.model if state.ema is None else state.ema, loader, accelerator=accelerator)


def _score(valid: Results, best_on: str) -> float:
    """Return what chooses the best epoch; nan, which never is the best, if the loss is not finite."""
    score = {"accuracy": valid.accuracy, "macro_f1": valid.macro_f1, "loss": -valid.loss}[best_on]
    return score if math.isfinite(valid.loss) else math.nan


def _progress_bar(batches: Any, epoch: int, num_epochs: int, accelerator: Accelerator) -> tqdm:
    # disable=None: no bar where the output is not a terminal
    return tqdm(batches, f"epoch {epoch + 1}/{num_epochs}", disable=None if accelerator.is_main_process else True)


def _shown(results: Results) -> dict[str, str]:
    return {"loss": f"{results.loss:.4f}", "acc": f"{results.accuracy:.4f}"}


def _log_step(meter: Meter, norm: Tensor | None, progress: Progress, tracker: Tracker, bar: tqdm) -> None:
    total, recent, speed = meter.look()
    bar.set_postfix(_shown(total))
    tracker.log(
        {
            "train/loss": recent.loss,
            "train/accuracy": recent.accuracy,
            "train/lr": progress.rate,
            "train/images_per_second": speed,
            "train/grad_norm": float(norm) if norm is not None else float("nan"),
        },
        progress.step,
    )


def _report(row: Epoch, num_epochs: int) -> None:
    logger.info(
        "epoch %d/%d: train loss %.4f, accuracy %.4f; valid loss %.4f, accuracy %.4f; %.0f images/s, %.1f s",
        row.epoch,
        num_epochs,
        row.train_loss,
        row.train_acc,
        row.valid_loss,
        row.valid_acc,
        row.images_per_second,
        row.seconds,
    )
