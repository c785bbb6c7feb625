"""Images per second of training: ours, the bare step, and the notebook's loop, side by side in one run.

    python bench/throughput.py --data DIR [--timm CHECKOUT] [--accelerate CHECKOUT] [--json FILE]

DIR: the real data, train/<class>/*. Ours is train() on the settings of configs/fer2013.yaml, with schedule and watch,
without tracker and checkpoints. The bare step is forward, backward and optimizer step of the same model on a batch
that is already in memory, in the same size, batch and precision, compiled or not as ours is. The notebook's loop is
fp32, batch 32, PIL decoding and transforms in a plain DataLoader, Adam, and an .item() in every step. timm's train.py
and accelerate's complete_cv_example join in from checkouts of their repositories (peers.py). All take turns, each in
a process of its own; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from notebook_loop import Notebook
from peers import make_accelerate, make_timm
from reporting import software, write_report
from torch.nn import functional as F

from dist_train import train
from dist_train.checkpoint import Checkpointer
from dist_train.config import Config
from dist_train.data.images import load_splits
from dist_train.faults import Watch
from dist_train.optim import build_schedule
from dist_train.options import train_config
from dist_train.processes import build_accelerator
from dist_train.run import build_parts, step_settings
from dist_train.state import Progress

PEERS = {"timm": make_timm, "accelerate": make_accelerate}
PACKAGES = ("torch", "torchvision", "accelerate", "timm")
CONFIG = Path(__file__).parents[1] / "configs" / "fer2013.yaml"

Maker = Callable[[argparse.Namespace], Callable[[], float]]

contender: Callable[[], float]  # of this process, made by set_up


def main() -> None:
    options = parse_options()
    contenders = {"ours": make_ours, "bare_step": make_bare_step, "notebook": make_notebook}
    contenders |= {name: make for name, make in PEERS.items() if getattr(options, name)}
    speeds = take_turns({name: (make, options) for name, make in contenders.items()}, options.rounds)
    report = make_report(speeds, describe(options))
    write_report(report, options.json)


def take_turns(contenders: dict[str, tuple[Maker, argparse.Namespace]], rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each contender in each round, after one that warms up.

    Each has a process of its own: none gains or suffers from another's settings.
    """
    pools = {name: ProcessPoolExecutor(1, get_context("spawn"), set_up, made) for name, made in contenders.items()}
    speeds: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(rounds + 1):
        for name, pool in pools.items():
            speed = pool.submit(call).result()
            if number:
                speeds[name].append(speed)
    for pool in pools.values():
        pool.shutdown()
    return speeds


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and validation/<class>/*")
    parser.add_argument("--size", type=int, default=48, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=128, help="images per step of ours and of the bare step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="steps of ours and of the bare step in a round")
    parser.add_argument(
        "--compile", choices=("true", "false"), default="false", help="torch.compile for ours and the bare step"
    )
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="of all but the notebook")
    parser.add_argument("--workers", type=int, default=2, help="of timm's train.py: processes that decode images")
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, help=f"checkout of {name}'s repository")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def set_up(make: Maker, options: argparse.Namespace) -> None:
    """Make this process's contender."""
    global contender
    contender = make(options)


def call() -> float:
    """Run a round of this process's contender and return its images per second."""
    return contender()


def build_config(options: argparse.Namespace) -> Config:
    keys = {
        "data.path": options.data,
        "data.image_size": options.size,
        "train.batch_size": options.batch,
        "train.compile": options.compile,
        "train.precision": options.precision,
    }
    given = [f"--{key}={value}" for key, value in (keys | getattr(options, "more", {})).items()]
    return train_config(["train", "--config", str(CONFIG), "--model.pretrained=false", *given])


def make_ours(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that trains one short epoch with train() and returns its images per second."""
    config = build_config(options)
    accelerator = build_accelerator(config.train)
    data = load_splits(config.data)
    few = data[0].subset(torch.randperm(len(data[0]))[: options.steps * options.batch].numpy())
    parts = build_parts(config, (few, data[1].subset(torch.arange(64).numpy())), accelerator)
    watch = Watch(accelerator, Checkpointer(Path("nowhere"), accelerator))  # every loss is finite: it saves nothing
    scheduler = build_schedule(parts.optimizer, config.optim, len(parts.trainloader), 10**6)
    settings: dict[str, Any] = step_settings(config.train) | {"scheduler": scheduler, "watch": watch}

    def run() -> float:
        progress = Progress()
        train(*parts, 1, accelerator=accelerator, progress=progress, **settings)
        return progress.epochs[0].images_per_second

    return run


def make_bare_step(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that repeats the step on one batch in memory and returns its images per second."""
    config = build_config(options)
    accelerator = build_accelerator(config.train)
    model, _, _, optimizer = build_parts(config, load_splits(config.data), accelerator)
    model.to(accelerator.device).train()
    images = torch.rand(options.batch, 3, config.data.image_size, config.data.image_size)
    images = images.to(accelerator.device, memory_format=torch.channels_last)
    labels = torch.randint(0, 7, (options.batch,), device=accelerator.device)

    def run() -> float:
        started = start_clock()
        for _ in range(options.steps):
            with accelerator.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return options.steps * len(labels) / (start_clock() - started)

    return run


def make_notebook(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that runs the notebook's loop and returns its images per second."""
    notebook = Notebook(options.data)

    def run() -> float:
        started = start_clock()
        count = notebook.train(islice(notebook.loader, 2 * options.steps))
        return count / (start_clock() - started)

    return run


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return settings and machine."""
    config = build_config(options)
    accelerator = build_accelerator(config.train)
    gpu = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else None
    return {
        "settings": {
            "image_size": config.data.image_size,
            "batch_size": config.train.batch_size,
            "precision": accelerator.mixed_precision,
            "compile": config.train.compile,
        },
        "machine": {"device": gpu or platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }


def start_clock() -> float:
    """Return the time, in seconds, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_report(speeds: dict[str, list[float]], description: dict[str, Any]) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "ratios": {name: round(median["ours"] / median[name], 3) for name in median if name != "ours"},
        "images_per_second": {name: round(value, 1) for name, value in median.items()},
        "rounds": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        **description,
        **software(*PACKAGES),
    }


if __name__ == "__main__":
    main()
