"""The learning-rate range test: a short training whose rate rises until the loss does, too.

After Smith, "Cyclical Learning Rates for Training Neural Networks" (2017, section 3.3). In: the config of a training.
Out: a suggestion for optim.lr, with its curve. It is train() itself with another schedule, so that model, data,
augmentation, loss, precision and processes are those of the training; no weights are kept.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch.optim.lr_scheduler import ExponentialLR

from dist_train.batch_size import with_batch_size
from dist_train.config import Config, InputError, TrackConfig
from dist_train.data.images import load_splits
from dist_train.faults import TrainingError
from dist_train.figures import plot_rates
from dist_train.files import write_file
from dist_train.processes import build_accelerator, local_main_first, on_main
from dist_train.run import build_parts, step_settings
from dist_train.tracking import Tracker
from dist_train.training import train

LOWEST, HIGHEST = 1e-6, 10.0
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss, an exponential mean without the bias of its start."""
DIVERGED = 1.5
"""Times the lowest smoothed loss that ends the test. fastai and Lightning wait for 4, which networks with batch
normalisation need not reach: their loss goes up to twice its lowest, and then back to that of guessing."""
FIELDS = ("lr", "loss", "smoothed_loss")


def find_rate(config: Config, out: Path, steps: int = 100) -> float:
    """Return the suggested learning rate; leave lr_find.csv and lr_find.png in `out`. Called on every process.

    It is a tenth of the rate at which the smoothed loss is lowest (the rule `minimum` of fastai's lr_find), the first
    tenth of the steps left aside. Raises InputError for bad input, before anything is trained, and TrainingError
    if the loss does not fall.
    """
    if steps < 20:
        raise InputError(f"--steps: {steps} is not allowed; expected a whole number >= 20")
    accelerator = build_accelerator(config.train)
    on_main(accelerator, _check_folder, out)
    splits = local_main_first(accelerator, load_splits, config.data)
    build = partial(build_parts, splits=splits, accelerator=accelerator)
    config = with_batch_size(config, accelerator, build)
    start = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=LOWEST))
    model, trainloader, validloader, optimizer = build(start)
    recorder = Recorder(accelerator, out, steps)
    with suppress(Ended):
        train(
            model,
            trainloader,
            validloader,
            optimizer,
            math.ceil(steps / len(trainloader)),
            accelerator=accelerator,
            scheduler=ExponentialLR(optimizer, (HIGHEST / LOWEST) ** (1 / (steps - 1))),
            log_every=1,
            tracker=recorder,
            **step_settings(config.train),
        )
    rate = suggest_rate(recorder.rates, recorder.smoothed, steps // 10)
    on_main(accelerator, _write, out, recorder, rate, config.optim.lr)
    accelerator.end_training()
    return rate


class Ended(Exception):
    """The test has seen enough."""


class Recorder(Tracker):
    """In the tracker's place: keeps rate and loss of each step, the same on all processes, and ends the test."""

    def __init__(self, accelerator: Accelerator, out: Path, steps: int) -> None:
        super().__init__(accelerator, TrackConfig(tool="none"), out, {}, None)
        self.steps, self._sum = steps, 0.0
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []

    def log(self, values: dict[str, float], step: int) -> None:
        """Keep a step; raise Ended after the last, or if the loss is not finite or far above its lowest."""
        self.rates.append(values["train/lr"])
        self.losses.append(values["train/loss"])
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * values["train/loss"]
        self.smoothed.append(self._sum / (1 - SMOOTHING**step))
        judged = self.smoothed[self.steps // 10 :]
        if step == self.steps or not math.isfinite(self._sum) or (judged and judged[-1] > DIVERGED * min(judged)):
            raise Ended

    def after_epoch(self, *_: object) -> None:
        """Leave no history."""


def suggest_rate(rates: list[float], smoothed: list[float], skip: int) -> float:
    """Return a tenth of the rate with the lowest of the smoothed losses, the first `skip` left aside."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in smoothed[skip:]]
    lowest = int(np.argmin(finite)) if finite else 0
    if lowest == 0:
        raise TrainingError("the loss does not fall at any learning rate; look at the data, the model and optim.name")
    return rates[skip + lowest] / 10


def _check_folder(out: Path) -> None:
    """Refuse files that are not of an earlier test."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder")
    table, picture = out / "lr_find.csv", out / "lr_find.png"
    own = table.is_file() and table.read_bytes().startswith(",".join(FIELDS).encode())
    for file in (table, picture):
        if file.is_symlink() or (file.exists() and not own):
            raise InputError(f"--out: {file} is not of an earlier lr-find; name another folder")


def _write(out: Path, recorder: Recorder, rate: float, configured: float) -> None:
    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            writer.writerows(zip(recorder.rates, recorder.losses, recorder.smoothed, strict=True))

    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "lr_find.csv", write)
    figure = plot_rates(recorder.rates, recorder.losses, recorder.smoothed, rate, configured)
    write_file(out / "lr_find.png", lambda aside: figure.savefig(aside, format="png"))
