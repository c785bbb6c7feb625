"""Run folders for tests, made without a training."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from dist_train import FaceModel
from dist_train.config import Config, DataConfig, TrainConfig
from dist_train.data.images import load_splits
from dist_train.state import Epoch
from dist_train.tracking import write_history


def make_run(run_dir: Path, data: DataConfig) -> Path:
    """Leave what a training leaves of an untrained small model, in fp32."""
    config = Config(data=data, train=TrainConfig(precision="no"))
    classes = load_splits(data)[0].classes
    torch.manual_seed(0)
    model = FaceModel("timm/test_resnet", len(classes), False, classes=classes, image_size=data.image_size)
    model.save(run_dir / "best")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    write_history(
        run_dir / "history.csv", [Epoch(n, 2 / n, 0.2 * n, 2.1 / n, 0.19 * n, 0.1, 100, 1) for n in (1, 2, 3)]
    )
    return run_dir


def links(page: str) -> set[str]:
    """Return what a page refers to, but for data: addresses and its own parts."""
    found = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    return {link for link in found if not link.startswith(("data:", "#"))}
