"""train.batch_size: auto: the smallest batch that trains at nearly full speed and fits in memory.

In: a config, and what builds the parts of its training. Out: the config with a number in place of auto. Real steps are
timed at growing sizes, on every process at once; their parts are thrown away, and the training's own are built after
them from the seed, so that it is bit-identical to one that was given the number.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.nn import functional as F

from dist_train.config import Config, InputError, TrainConfig
from dist_train.data.loader import ImageLoader
from dist_train.processes import on_main, together

logger = logging.getLogger(__name__)

Build = Callable[[Config], tuple[nn.Module, ImageLoader, ImageLoader, torch.optim.Optimizer]]

SMALLEST, LARGEST = 8, 1024
"""Images per process and step."""
FEWEST_STEPS = 10
"""Steps of an epoch; larger batches would leave fewer."""
ENOUGH = 0.95
"""Share of the best speed that will do; a batch that is no more than this much faster is no reason to double it."""
MEMORY_SHARE = 0.9
"""Of a GPU's memory: the rest is for the buffers of several processes and for fragmentation."""
TIMED_STEPS, TIMED_SECONDS = 3, 0.3


def with_batch_size(config: Config, accelerator: Accelerator, build: Build, checkpoint: Path | None = None) -> Config:
    """Return `config` with a number as train.batch_size: as it is, the checkpoint's, or one that is searched.

    Called on every process, which all get the same. optim.lr is left as it is. Raises InputError where nothing fits.
    """
    if isinstance(config.train.batch_size, int):
        return config
    if checkpoint:
        return _replaced(config, on_main(accelerator, _read_batch_size, checkpoint))
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("train.batch_size: auto cannot try out sharded models (FSDP); give a number")
    speeds = _measure_speeds(config, accelerator, build)
    if not speeds:
        raise InputError(
            f"train.batch_size: not even {SMALLEST} images per process fit in the memory of {accelerator.device}; "
            "take a smaller model.backbone or data.image_size, or give a smaller number"
        )
    chosen = choose(speeds)
    logger.info(
        "train.batch_size: auto chose %d (tried %s images/s); optim.lr stays %g",
        chosen,
        ", ".join(f"{size}: {speed:.0f}" for size, speed in speeds.items()),
        config.optim.lr,
    )
    return _replaced(config, chosen)


def choose(speeds: dict[int, float]) -> int:
    """Return the smallest size that reaches nearly the best of the speeds (images per second, by size)."""
    return min(size for size, speed in speeds.items() if speed >= ENOUGH * max(speeds.values()))


def _measure_speeds(config: Config, accelerator: Accelerator, build: Build) -> dict[int, float]:
    """Return images per second of all processes by global batch size, as far up as memory and gain reach."""
    speeds: dict[int, float] = {}
    before, share, vain = psutil.Process().memory_info().rss, SMALLEST, 0
    while share <= LARGEST and vain < 2:
        size = share * accelerator.num_processes
        own = together(_try_size, _replaced(config, size), accelerator, build, FEWEST_STEPS if speeds else 1)
        # all go on together: at the speed of the slowest, as long as every one has room
        speed = accelerator.num_processes * min(gather_object([own]))
        if speed == 0:
            break
        vain = 0 if ENOUGH * speed > max(speeds.values(), default=0) else vain + 1
        speeds[size], share = speed, 2 * share
        if not all(gather_object([_has_room(accelerator, before)])):
            break
    return speeds


def _try_size(config: Config, accelerator: Accelerator, build: Build, fewest: int) -> float:
    """Return images per second of this process alone, or 0 if memory or an epoch's steps (`fewest`) do not suffice."""
    device, speed = accelerator.device, 0.0
    settings = dataclasses.replace(config.train, compile=False, sync_batchnorm=False)  # no process waits for another
    parts = build(dataclasses.replace(config, train=settings))
    for loader in parts[1:3]:
        loader.go_alone()
    if len(parts[1]) < fewest:
        return speed
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)
    try:
        speed = _time_steps(*parts, config.train, accelerator)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    del parts
    clear_device_cache(garbage_collection=True)
    return speed


def _time_steps(
    model: nn.Module,
    loader: ImageLoader,
    _: ImageLoader,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    accelerator: Accelerator,
) -> float:
    """Return images per second of the fastest step, after one that is not timed."""
    model.to(accelerator.device).train()
    average = copy.deepcopy(model) if config.ema else None  # takes memory
    seconds: list[float] = []
    started = None
    for batch in chain.from_iterable(repeat(loader)):
        for images, labels, _last in batch.micro_batches(config.gradient_accumulation):
            with accelerator.autocast():
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=config.label_smoothing)
            (loss * batch.scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        seconds += [now - started] if started else []
        started = now
        if len(seconds) >= TIMED_STEPS and sum(seconds) >= TIMED_SECONDS:
            break
    del average
    return len(batch.labels) / min(seconds)


def _has_room(accelerator: Accelerator, before: int) -> bool:
    """Return whether the next size may be tried: a GPU says so itself, a CPU's memory must not run out.

    before: bytes that this process held before the search. What it has taken since would be needed once more.
    """
    if accelerator.device.type != "cpu":
        return True
    taken = psutil.Process().memory_info().rss - before
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return taken < psutil.virtual_memory().available / 2 / local


def _replaced(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def _read_batch_size(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "origin.json").read_text())["train.batch_size"])
