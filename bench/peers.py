"""Images per second of other programs on the same images: timm's train.py and accelerate's complete_cv_example.

For throughput.py. Both run from a checkout, as they are; what is set is the job: ResNet18 from random weights, all of
it trained, the same images, size, batch and precision. Their own speed counts only from where they have warmed up.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

WARM_UP = 8  # steps
LINE = re.compile(r"Train: 0 \[ *(\d+)/.*\(([\d.]+)s, *[\d.]+/s\)")  # of timm's log: update, mean seconds until then


def link_images(folder: Path, data: str, count: int, seed: int = 0) -> Path:
    """Fill `folder` with links to `count` of the images under data/train, and some of data/validation; return it."""
    for split, most in (("train", count), ("validation", 64)):
        files = sorted((Path(data).resolve() / split).rglob("*.jpg"))
        for file in random.Random(seed).sample(files, most):
            link = folder / split / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return folder


def make_timm(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that trains one epoch with timm's train.py and returns its images per second."""
    folder = Path(tempfile.mkdtemp())
    link_images(folder, options.data, options.batch * (options.steps + WARM_UP))
    amp = ["--amp", "--amp-dtype", "bfloat16"] if options.precision == "bf16" else []
    command = [
        *(sys.executable, "train.py", "--data-dir", str(folder), "--output", str(folder / "output")),
        *("--model", "resnet18", "--num-classes", "7", "--input-size", "3", str(options.size), str(options.size)),
        *("--batch-size", str(options.batch), "--epochs", "1", "--warmup-epochs", "0", "--channels-last", *amp),
        *("--device", "cuda" if torch.cuda.is_available() else "cpu", "--log-interval", "1"),
        *("--workers", str(options.workers), *(["--torchcompile"] if options.compile == "true" else [])),
    ]

    def run() -> float:
        done = subprocess.run(command, cwd=options.timm, capture_output=True, text=True, timeout=900)
        seconds = {
            int(step) + 1: (int(step) + 1) * float(mean) for step, mean in LINE.findall(done.stderr + done.stdout)
        }
        if done.returncode or len(seconds) <= WARM_UP:
            raise RuntimeError(f"timm's train.py failed: {done.stderr[-2000:]}")
        last = max(seconds)
        return options.batch * (last - WARM_UP) / (seconds[last] - seconds[WARM_UP])

    return run


def make_accelerate(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that trains an epoch with complete_cv_example and returns its images per second."""
    folder = Path(tempfile.mkdtemp())
    count = options.batch * (options.steps + WARM_UP)
    links = link_images(folder / "all", options.data, round(count / 0.8) + options.batch)  # the example trains on 80 %
    for link in (links / "train").rglob("*.jpg"):
        (folder / f"{link.parent.name}_{link.stem}.jpg").symlink_to(link.resolve())
    spec = importlib.util.spec_from_file_location("example", options.accelerate / "examples" / "complete_cv_example.py")
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    multiprocessing.set_start_method("fork", force=True)  # as where the example is started by itself
    marks: list[float] = []

    class Schedule(torch.optim.lr_scheduler.OneCycleLR):
        def step(self, *arguments: Any) -> None:
            marks.append(time.perf_counter())
            super().step(*arguments)

    def create_model(*_: Any, num_classes: int, **__: Any) -> torch.nn.Module:
        model: Any = timm.create_model("resnet18", num_classes=num_classes)
        model.get_classifier = lambda: model  # the example freezes all but this
        return model

    example.create_model, example.OneCycleLR = create_model, Schedule
    arguments = argparse.Namespace(
        **{"cpu": not torch.cuda.is_available(), "mixed_precision": options.precision, "with_tracking": False},
        **{"data_dir": str(folder), "use_stateful_dataloader": False, "checkpointing_steps": None, "output_dir": "."},
        **{"resume_from_checkpoint": None, "project_dir": str(folder)},
    )
    config = {"lr": 3e-2, "num_epochs": 1, "seed": 42, "batch_size": options.batch, "image_size": options.size}

    def run() -> float:
        marks.clear()
        example.training_function(config, arguments)
        steps = marks[WARM_UP : WARM_UP + options.steps + 1]
        return options.batch * (len(steps) - 1) / (steps[-1] - steps[0])

    return run
