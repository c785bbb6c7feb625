"""The record of a run: history.csv in the run folder, and W&B or TensorBoard through accelerate's trackers.

Only the main process writes. A W&B server that is slow or absent never stops a training: the run goes offline.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import is_tensorboard_available

from dist_train.checkpoint import Epoch
from dist_train.config import InputError, TrackConfig
from dist_train.metrics import Results

logger = logging.getLogger(__name__)

INIT_SECONDS = 30


def check_tracker(config: TrackConfig) -> None:
    """Raise InputError if the configured tracker cannot be used here, before any time is spent."""
    if config.tool == "tensorboard" and not is_tensorboard_available():
        raise InputError("track.tool: tensorboard is not installed; pip install 'dist_train[tensorboard]'")
    if config.tool == "wandb" and config.wandb == "online" and not _has_wandb_login():
        raise InputError(
            "track.wandb: online, but no W&B login is here; run `wandb login`, set WANDB_API_KEY, "
            "or use track.wandb: offline"
        )


class Tracker:
    """Writes the figures of one training; a resumed one continues its W&B run by `run_id`."""

    def __init__(
        self, accelerator: Accelerator, config: TrackConfig, run_dir: Path, settings: dict[str, Any], run_id: str
    ) -> None:
        self.accelerator, self.run_dir, self.run_id = accelerator, run_dir, run_id
        self.kind = config.tool if config.wandb != "disabled" or config.tool != "wandb" else "none"
        self.step = 0
        if accelerator.is_main_process and self.kind != "none":
            start = _start_wandb if self.kind == "wandb" else _start_tensorboard
            accelerator.trackers = [start(config, run_dir, run_id)]
            flat = self.kind == "tensorboard"  # its hyperparameters are scalars and strings
            accelerator.trackers[0].store_init_configuration(_flatten(settings) if flat else settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log values at an optimizer step."""
        self.step = step
        self.accelerator.log({**values, "step": step}, step=step)

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
            write_history(self.run_dir / "history.csv", epochs)

    def log_pictures(self, pictures: dict[str, np.ndarray]) -> None:
        """Log pictures, uint8 [H, W, 3] each, by key."""
        options = {"dataformats": "NHWC"} if self.kind == "tensorboard" else {}
        for tracker in self.accelerator.trackers:
            tracker.log_images({key: picture[None] for key, picture in pictures.items()}, step=self.step, **options)

    def log_table(self, key: str, columns: list[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table to W&B; cells that are arrays, uint8 [H, W] or [H, W, 3], become pictures."""
        if self.kind == "wandb" and self.accelerator.is_main_process:
            import wandb

            data = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            self.accelerator.trackers[0].log_table(key, columns=columns, data=data, step=self.step)

    def finish(self, failed: bool = False) -> None:
        """Close the tracker, as failed or not; say how to upload an offline run."""
        offline = None
        if self.kind == "wandb" and self.accelerator.is_main_process:
            run = self.accelerator.trackers[0].tracker
            offline = Path(run.dir).parent if run.settings._offline else None
            run.finish(exit_code=int(failed))
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        if offline:
            logger.info("W&B run kept offline; upload it with: wandb sync %s", offline)


def write_history(file: Path, epochs: Sequence[Epoch]) -> None:
    """Write one row per epoch."""
    aside = file.with_suffix(".tmp")
    with aside.open("w", newline="") as out:
        writer = csv.DictWriter(out, [column.name for column in fields(Epoch)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in epochs)
    aside.replace(file)


def _has_wandb_login() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False))


def _wandb_mode(config: TrackConfig) -> str:
    if config.wandb != "auto":
        return config.wandb
    return os.environ.get("WANDB_MODE") or ("online" if _has_wandb_login() else "offline")


def _start_wandb(config: TrackConfig, run_dir: Path, run_id: str) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    options: dict[str, Any] = {
        "entity": config.entity,
        "name": config.name or run_dir.name,
        "tags": config.tags,
        "dir": str(run_dir),
        "id": run_id,
        "resume": "allow",
        "settings": wandb.Settings(init_timeout=INIT_SECONDS),
    }
    mode = _wandb_mode(config)
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


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _start_tensorboard(config: TrackConfig, run_dir: Path, run_id: str) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=run_dir)
    tracker.start()
    return tracker
