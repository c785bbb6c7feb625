"""What W&B keeps of a run, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train.wandb_log import read_records, read_rows

# what every training logs; its pictures come at the end
KEYS = {
    "train/loss",
    "train/accuracy",
    "train/lr",
    "train/images_per_second",
    "train/grad_norm",
    "valid/loss",
    "valid/accuracy",
    "valid/macro_f1",
    "epoch",
    "step",
}


def find_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("*run-*/*.wandb"))


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the logged rows, in order."""
    return list(read_rows(file))


def read_config(file: Path) -> dict[str, Any]:
    """Return the run's configuration."""
    config: dict[str, Any] = {}
    for record in read_records(file):
        for update in (record.config, record.run.config):
            for item in update.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config


def read_run_id(file: Path) -> str:
    """Return the run's id."""
    return next(record.run.run_id for record in read_records(file) if record.HasField("run"))
