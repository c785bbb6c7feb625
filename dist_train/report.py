"""The report on a trained run: evaluate_run() judges its validation images and writes report.json and report.html.

In: a run folder and where its data lies. Out: figures, and one page that needs no other file.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.config import Config, DataConfig, InputError, TrainConfig
from dist_train.data.images import find_leaked, load_splits
from dist_train.data.imageset import ImageSet
from dist_train.evaluation import judge
from dist_train.figures import check_history, draw_accuracy, draw_loss, new_figure, plot_reliability
from dist_train.files import refuse_links, sha256, write_file
from dist_train.model import FaceModel, load_run, weights_file
from dist_train.page import embed_figure, embed_picture, write_page
from dist_train.processes import build_accelerator, local_main_first, on_main
from dist_train.saliency import explain, overlay
from dist_train.scores import Bin, describe, find_mistakes

logger = logging.getLogger(__name__)

SHOWN_MISTAKES = 6
SHOWN_EXAMPLES = 8
HISTORY = ("train_loss", "train_acc", "valid_loss", "valid_acc")


def evaluate_run(
    run_dir: Path, config: Config, *, split: str = "validation", tta: bool = False, calibrate: bool = False
) -> dict[str, Any]:
    """Judge the validation images, write report.json and report.html in `run_dir`, return the figures.

    config: the run's, whose data and precision are used. split: "test" judges the test split in their place. tta:
    average over shifted and mirrored views. calibrate: store the fitted temperature with the model, which divides its
    logits from then on; not with "test" or tta. Called on every process, with the same figures for any number of them.
    Raises InputError for a folder that is no run and for data that cannot be read or has other classes than the model.
    """
    if calibrate and split == "test":
        raise InputError("--calibrate: fits the model to the images it judges; use it with --split validation")
    if calibrate and tta:
        raise InputError("--calibrate: fits the model's answers to single images; use it without --tta")
    refuse_links(run_dir)
    precision = config.train.precision if config.train.precision != "fp16" else "auto"  # there may be no GPU here
    accelerator = build_accelerator(TrainConfig(precision=precision))
    model = load_run(run_dir)
    data = dataclasses.replace(config.data, drop_leaked=False)
    train, validation = local_main_first(accelerator, load_splits, data, split)
    model.check_classes(validation.classes, str(run_dir))
    shares = judge(model, validation.images, accelerator=accelerator, tta=tta)
    leaked = find_leaked(train, validation)
    figures = describe(shares, validation.labels, leaked, model.classes)
    report = {
        "run": run_dir.resolve().name,
        "weights": on_main(accelerator, sha256, weights_file(run_dir)),
        "split": split,
        "tta": tta,
        "model_temperature": model.temperature,
        **figures,
    }
    on_main(accelerator, _write, run_dir, report, model, validation, shares, config.data)
    if calibrate:
        on_main(accelerator, _calibrate, run_dir, model, report["temperature"])
    _say(report, run_dir)
    return report


def _write(
    run_dir: Path, report: dict[str, Any], model: FaceModel, data: ImageSet, shares: np.ndarray, source: DataConfig
) -> None:
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_file(run_dir / "report.json", lambda file: file.write_text(text))
    bins = [Bin(row["images"], row["confidence"] or 0, row["accuracy"] or 0) for row in report["reliability"]]
    write_page(
        run_dir / "report.html",
        "report.html",
        report=report,
        version=version("dist_train"),
        backbone=model.settings["backbone"],
        side=data.images.shape[-1],
        source=Path(source.path).resolve().name if source.path else "the built-in faces",
        curves=_draw_curves(run_dir / "history.csv"),
        reliability=embed_figure(plot_reliability(bins), "Share of right answers by confidence"),
        mistakes=_show_mistakes(model, data, shares),
        examples=_show_examples(data, shares),
    )


def _draw_curves(file: Path) -> list[str]:
    """Return the drawings of loss and accuracy over the epochs; none without a readable history.csv."""
    try:
        rows = list(csv.DictReader(file.read_text().splitlines()))
        history = check_history([[float(row[name]) for row in rows] for name in HISTORY])
    except (OSError, KeyError, TypeError, ValueError):
        logger.warning("%s cannot be read; the report shows no curves", file)
        return []
    drawings: list[str] = []
    for name, draw in (("Accuracy", draw_accuracy), ("Loss", draw_loss)):
        figure = new_figure(4.7, 3.5)
        draw(figure.add_axes((0.11, 0.14, 0.7, 0.69)), history)
        drawings.append(embed_figure(figure, f"{name} of train and validation over {len(history[0])} epochs"))
    return drawings


def _show_mistakes(model: FaceModel, data: ImageSet, shares: np.ndarray) -> list[dict[str, Any]]:
    """Return for each real class its most confident mistakes, as pictures with saliency."""
    wrong, predicted = find_mistakes(shares, data.labels), torch.from_numpy(shares.argmax(1))
    own = [wrong[data.labels[wrong] == label] for label in range(len(data.classes))]
    shown = np.concatenate([mistakes[:SHOWN_MISTAKES] for mistakes in own])
    images = data.images[shown]
    glowing = (
        overlay(images, explain(model, torch.from_numpy(images), predicted[shown]).numpy()) if len(shown) else images
    )
    cards: list[list[dict[str, Any]]] = [[] for _ in data.classes]
    for i, glow in zip(shown, glowing, strict=True):
        card = _card(data, shares, i)
        cards[data.labels[i]].append({**card, "glow": embed_picture(glow)})
    counts = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    return [
        {"name": name, "count": len(mistakes), "total": total, "cards": shown}
        for name, mistakes, total, shown in zip(data.classes, own, counts, cards, strict=True)
    ]


def _card(data: ImageSet, shares: np.ndarray, i: int) -> dict[str, Any]:
    """Return what the page says of one image."""
    predicted = int(shares[i].argmax())
    return {
        "name": data.names[i],
        "picture": embed_picture(data.images[i]),
        "right": predicted == data.labels[i],
        "predicted": data.classes[predicted],
        "confidence": float(shares[i].max()),
    }


def _show_examples(data: ImageSet, shares: np.ndarray) -> list[dict[str, Any]]:
    """Return for each class some of its images, drawn by lot, with what the model says of them."""
    random = np.random.default_rng(0)
    groups = []
    for label, name in enumerate(data.classes):
        some = random.permutation(np.flatnonzero(data.labels == label))[:SHOWN_EXAMPLES]
        groups.append({"name": name, "cards": [_card(data, shares, i) for i in some]})
    return groups


def _calibrate(run_dir: Path, model: FaceModel, fitted: float) -> None:
    """Store the temperature in best/config.json, upon the one that the model has."""
    file = run_dir / "best" / "config.json"
    settings = json.loads(file.read_text())
    settings["temperature"] = model.temperature * fitted
    write_file(file, lambda aside: aside.write_text(json.dumps(settings, indent=2) + "\n"))
    logger.info("temperature %.3f is stored in %s", settings["temperature"], file)


def _say(report: dict[str, Any], run_dir: Path) -> None:
    clean = report["clean_accuracy"]
    logger.info(
        "accuracy %.2f %% (95 %%: %.2f to %.2f) on all %d images; %s on the %d not seen in training",
        100 * report["accuracy"],
        *(100 * edge for edge in report["accuracy_interval"]),
        report["images"],
        "–" if clean is None else f"{100 * clean:.2f} %",
        report["clean_images"],
    )
    logger.info(
        "macro-F1 %.4f, top-2 accuracy %.2f %%, calibration error %.4f (%.4f at temperature %.3f)",
        report["macro_f1"],
        100 * report["top2_accuracy"],
        report["ece"],
        report["ece_at_temperature"],
        report["temperature"],
    )
    logger.info("report: %s", run_dir / "report.html")
