"""What a finished training leaves: summary.json, pictures, a table of its worst mistakes."""

from __future__ import annotations

import json
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dist_train.data.imageset import ImageSet
from dist_train.evaluation import judge
from dist_train.figures import plot_confusion, plot_history
from dist_train.files import write_file
from dist_train.model import FaceModel, load_run
from dist_train.pictures import view_results
from dist_train.processes import on_main
from dist_train.saliency import explain, overlay
from dist_train.scores import count_confusion, find_mistakes
from dist_train.state import PACKAGES, Progress
from dist_train.tracking import Tracker
from dist_train.training import History

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 24
LISTED_MISTAKES = 64
MISTAKE_COLUMNS = ["image", "saliency", "name", "real", "predicted", "confidence"]


def leave_pictures(
    run_dir: Path, history: History, validation: ImageSet, tracker: Tracker, accelerator: Accelerator
) -> None:
    """Judge the validation images with the best model; leave the figures in the folder and with the tracker.

    Called on every process, as all judge.
    """
    model = on_main(accelerator, _load_best, run_dir)  # on a shared disk others may not see the newest files yet
    if model is None:
        logger.warning("no epoch had a finite validation figure: there is no best model and there are no pictures")
        return
    shares = judge(model, validation.images, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    some = np.random.default_rng(0).permutation(len(validation))[:SHOWN_IMAGES]
    figures = {
        "curves": plot_history(history),
        "predictions": view_results(
            validation.images[some], validation.labels[some], classes=model.classes, probabilities=shares[some]
        ),
        "confusion_matrix": plot_confusion(count_confusion(shares, validation.labels), model.classes),
    }
    pictures = {name: _pixels(figure) for name, figure in figures.items()}
    for name in ("curves", "predictions"):
        Image.fromarray(pictures[name]).save(run_dir / f"{name}.png")
    tracker.log_pictures(pictures)
    if tracker.kind == "wandb":
        tracker.log_table("misclassified", MISTAKE_COLUMNS, _list_mistakes(model, validation, shares))


def _load_best(run_dir: Path) -> FaceModel | None:
    return load_run(run_dir) if (run_dir / "best").is_dir() else None


def _list_mistakes(model: FaceModel, data: ImageSet, shares: np.ndarray) -> list[list[Any]]:
    """Return a row for each of the most confident mistakes; shares: float [N, K], summing to 1."""
    wrong = find_mistakes(shares, data.labels)[:LISTED_MISTAKES]
    if not len(wrong):
        return []
    images, predicted = data.images[wrong], shares[wrong].argmax(1)
    glowing = overlay(images, explain(model, torch.from_numpy(images), torch.from_numpy(predicted)).numpy())
    return [
        [
            images[row].transpose(1, 2, 0).squeeze(),
            glowing[row],
            data.names[i],
            data.classes[data.labels[i]],
            data.classes[predicted[row]],
            float(shares[i].max()),
        ]
        for row, i in enumerate(wrong)
    ]


def _pixels(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_summary(run_dir: Path, progress: Progress, run_id: str | None, accelerator: Accelerator) -> None:
    if not progress.epochs:
        logger.warning("no epoch was finished: there is no summary")
        return
    last = progress.epochs[-1]
    best = progress.epochs[progress.best_epoch - 1] if progress.best_epoch else None
    final = {name: getattr(last, name) for name in History._fields}
    summary = {
        "best_valid_acc": best and best.valid_acc,
        "best_epoch": best and best.epoch,
        **{f"final_{name}": value if math.isfinite(value) else None for name, value in final.items()},
        "epochs": last.epoch,
        "steps": progress.step,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "images_per_second": sum(row.images_per_second for row in progress.epochs) / len(progress.epochs),
        "train_seconds": sum(row.seconds for row in progress.epochs),
        "wandb_run_id": run_id,
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_file(run_dir / "summary.json", lambda file: file.write_text(json.dumps(summary, indent=2) + "\n"))
    if best:
        logger.info("best validation accuracy %.4f in epoch %d; run folder: %s", best.valid_acc, best.epoch, run_dir)
