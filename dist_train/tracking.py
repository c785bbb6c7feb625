"""The record of a run: history.csv in the run folder, and W&B or TensorBoard through accelerate's trackers.

Only the main process writes, in a thread of its own: a W&B server that is slow, absent or broken never holds up a
training. W&B keeps everything in the run folder as well, so nothing is lost that has not been uploaded.
"""

from __future__ import annotations

import csv
import http.client
import logging
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import is_tensorboard_available

from dist_train.config import InputError, TrackConfig
from dist_train.files import write_file
from dist_train.metrics import Results
from dist_train.state import Epoch
from dist_train.wandb_log import last_steps

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5
INIT_SECONDS = 15
EXIT_SECONDS = 30


def check_tracker(config: TrackConfig) -> None:
    """Raise InputError if the configured tracker cannot be used here, before any time is spent."""
    if config.tool == "tensorboard" and not is_tensorboard_available():
        raise InputError("track.tool: tensorboard is not installed; pip install 'dist_train[tensorboard]'")
    if config.tool == "wandb" and config.wandb == "online" and not has_wandb_login():
        raise InputError(
            "track.wandb: online, but no W&B login is here; run `wandb login`, set WANDB_API_KEY, "
            "or use track.wandb: offline"
        )


def tracker_kind(config: TrackConfig) -> str:
    """Return wandb, tensorboard or none."""
    return "none" if config.tool == "wandb" and config.wandb == "disabled" else config.tool


class Tracker:
    """Writes the figures of one training; a resumed one continues its W&B run by `run_id`.

    What was logged before, up to the step at which it was cut off, is not logged again.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrackConfig, run_dir: Path, settings: dict[str, Any], run_id: str | None
    ) -> None:
        self.accelerator, self.run_dir, self.run_id = accelerator, run_dir, run_id
        self.kind = tracker_kind(config) if accelerator.is_main_process else "none"
        self.step = 0
        self._failed = self._closing = False
        self._logged = last_steps(run_dir / "wandb") if self.kind == "wandb" else {}
        self._tracker: GeneralTracker | None = None
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        # a daemon: where W&B hangs, the program ends all the same
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        if self.kind != "none":
            self._thread.start()
            self._jobs.put(lambda: self._start(config, settings))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log values at an optimizer step, but those that an earlier part of the run has logged."""
        self.step = step
        new = {key: value for key, value in values.items() if step > self._logged.get(key, -1)}
        if new and self.kind == "tensorboard":
            self._soon(lambda tracker: tracker.log(new, step=step))
        elif new:
            self._soon(lambda tracker: tracker.log({**new, "step": step}))

    def after_epoch(self, step: int, epochs: Sequence[Epoch], valid: Results) -> None:
        """Log the validation figures and write history.csv."""
        self.log(
            {
                "valid/loss": valid.loss,
                "valid/accuracy": valid.accuracy,
                "valid/macro_f1": valid.macro_f1,
                "epoch": epochs[-1].epoch,
            },
            step,
        )
        if self.accelerator.is_main_process:
            try:
                write_history(self.run_dir / "history.csv", epochs)
            except OSError as error:
                logger.warning("history.csv cannot be written (%s); the next epoch tries again", error)

    def log_pictures(self, pictures: dict[str, np.ndarray]) -> None:
        """Log pictures, uint8 [H, W, 3] each, by key."""
        options = {"step": self.step, "dataformats": "NHWC"} if self.kind == "tensorboard" else {}
        batches = {key: picture[None] for key, picture in pictures.items()}
        self._soon(lambda tracker: tracker.log_images(batches, **options))

    def log_table(self, key: str, columns: list[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table to W&B; cells that are arrays, uint8 [H, W] or [H, W, 3], become pictures."""

        def write(tracker: GeneralTracker) -> None:
            import wandb

            data = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            tracker.log_table(key, columns=columns, data=data)

        if self.kind == "wandb":
            self._soon(write)

    def finish(self, failed: bool = False) -> None:
        """Close the tracker, as failed or not, within EXIT_SECONDS; say how to upload what has not been."""
        if not self._thread.is_alive() or self._closing:
            return
        self._closing = True
        self._jobs.put(lambda: self._close(failed))
        self._jobs.put(None)
        self._thread.join(EXIT_SECONDS)
        if self.kind == "wandb" and (self._thread.is_alive() or self._failed or self._offline()):
            for folder in sorted((self.run_dir / "wandb").glob("*run-*"))[-1:]:
                logger.info("W&B run kept offline; upload it with: wandb sync %s", folder)
        if self._thread.is_alive():
            logger.warning("W&B did not end within %d s and is left behind", EXIT_SECONDS)

    def _soon(self, job: Callable[[GeneralTracker], None]) -> None:
        if self.kind != "none":
            self._jobs.put(lambda: job(self._tracker) if self._tracker else None)

    def _work(self) -> None:
        """Do the jobs in order; whatever ails the tracker, the training goes on."""
        while job := self._jobs.get():
            try:
                job()
            except Exception as error:
                if not self._failed:
                    logger.warning("%s fails (%s); the training goes on", self.kind, str(error).split("\n")[0])
                self._failed = True

    def _start(self, config: TrackConfig, settings: dict[str, Any]) -> None:
        if self.kind == "wandb":
            self._tracker = _start_wandb(config, self.run_dir, self.run_id)
            self._tracker.store_init_configuration(settings)
        else:
            self._tracker = _start_tensorboard(self.run_dir)
            self._tracker.store_init_configuration(_flatten(settings))  # its hyperparameters are scalars and strings

    def _offline(self) -> bool:
        return bool(self._tracker and self._tracker.tracker.settings._offline)

    def _close(self, failed: bool) -> None:
        if self.kind == "wandb" and self._tracker:
            self._tracker.tracker.finish(exit_code=int(failed))
        elif self._tracker:
            self._tracker.finish()


def write_history(file: Path, epochs: Sequence[Epoch]) -> None:
    """Write one row per epoch."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as out:
            writer = csv.DictWriter(out, [column.name for column in fields(Epoch)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in epochs)

    write_file(file, write)


def has_wandb_login() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False))


def _wandb_mode(config: TrackConfig) -> str:
    if config.wandb != "auto":
        return config.wandb
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_login() else "offline")


def _start_wandb(config: TrackConfig, run_dir: Path, run_id: str | None) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    options: dict[str, Any] = {
        "entity": config.entity,
        "name": config.name or run_dir.name,
        "tags": config.tags,
        "dir": str(run_dir),
        "id": run_id,
        "resume": "allow",
        "settings": wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout=EXIT_SECONDS - 5, finish_timeout_raises=True
        ),
    }
    mode = _wandb_mode(config)
    if mode == "online" and (fault := _find_fault(wandb.setup().settings.base_url)):
        logger.warning("W&B cannot be reached (%s); the run goes on offline", fault)
        mode = "offline"
    tracker = WandBTracker(config.project, mode=mode, **options)
    try:
        tracker.start()
    except Exception as error:  # whatever ails W&B, the training goes on
        logger.warning("W&B cannot be reached (%s); the run goes on offline", str(error).split("\n")[0])
        wandb.teardown()  # else W&B's service still holds the run's id
        tracker = WandBTracker(config.project, mode="offline", **options)
        tracker.start()
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker


def _find_fault(url: str) -> str | None:
    """Return why the server cannot be used, or None if it answers: wandb itself would try for half a minute."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}" if error.code >= 500 else None
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {getattr(error, 'reason', error)}"


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _start_tensorboard(run_dir: Path) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=run_dir)
    tracker.start()
    return tracker
