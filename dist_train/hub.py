"""A Hugging Face Hub folder of a run: weights, config and model card, which timm and load_run both read.

In: a model and its run folder. Out: model.safetensors, config.json, README.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from jinja2 import Template

from dist_train.config import InputError
from dist_train.files import sha256
from dist_train.model import FaceModel, weights_file

logger = logging.getLogger(__name__)


def write_hub_folder(model: FaceModel, run_dir: Path, folder: Path) -> None:
    """Write the folder; where timm has no equal architecture, config.json names none and only load_run reads it."""
    weights = {name.removeprefix("backbone."): t.contiguous() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    size = model.image_size or 48
    own = {**model.settings, "classes": model.classes}
    config = {
        "architecture": str(model.settings["backbone"]).removeprefix("timm/").split(".")[0],
        "num_classes": len(model.classes),
        "label_names": model.classes,
        "model_args": {"in_chans": model.in_channels},
        "pretrained_cfg": {
            "input_size": [model.in_channels, size, size],
            "fixed_input_size": False,
            "mean": [round(value, 6) for value in model.mean.flatten().tolist()],
            "std": [round(value, 6) for value in model.std.flatten().tolist()],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(model.classes),
        },
        "dist_train": own,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (timm_reads := _timm_agrees(model, folder)):
        (folder / "config.json").write_text(json.dumps({"dist_train": own}, indent=2) + "\n")
        logger.info("export: timm has no equal of %s; load_run reads the folder", model.settings["backbone"])
    (folder / "README.md").write_text(model_card(model, run_dir, timm_reads))


def push_folder(folder: Path, repository: str) -> None:
    """Upload a folder to a model repository of the Hub, which is made (private) if it is not there."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # no login, no network, no such user: the client has an exception for each
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--push: {repository} cannot be written ({reason[:300]}); {folder} is complete. Log in with "
            "`hf auth login` and run `hf upload`"
        ) from error
    logger.info("export: https://huggingface.co/%s", repository)


def _timm_agrees(model: FaceModel, folder: Path) -> bool:
    """Say whether timm builds the very same function, but for the temperature, from the folder."""
    images = torch.rand(2, 1, *[model.image_size or 48] * 2).expand(-1, model.in_channels, -1, -1)
    images = (images - model.mean) / model.std
    try:
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            return torch.allclose(other(images), model.backbone(images), atol=1e-4)
    except Exception as error:  # timm raises all sorts where names or shapes of weights differ
        logger.debug("timm: %s", error)
        return False


def model_card(model: FaceModel, run_dir: Path, timm_reads: bool) -> str:
    """Return the text of README.md: results, use, limits, training data, licence, as far as the run folder tells."""
    summary, report = (_read_json(run_dir / name) for name in ("summary.json", "report.json"))
    if report.get("weights") != sha256(weights_file(run_dir)):
        report = {}  # of a model before this one
    config_file = run_dir / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
    return Template(
        (Path(__file__).parent / "templates" / "model_card.md").read_text(),
        trim_blocks=True,
        keep_trailing_newline=True,
    ).render(
        backbone=model.settings["backbone"],
        classes=model.classes,
        size=model.image_size or 48,
        gray=model.gray,
        version=version("dist_train"),
        timm_reads=timm_reads,
        judged=bool(report),
        temperature=model.temperature,
        results=list(_results(summary, report, model.temperature)),
        per_class=report.get("classes", []),
        built_in=bool(config) and config["data"]["path"] is None,
        pretrained=not config or config["model"]["pretrained"] or config["model"]["weights"],
    )


def _results(summary: dict[str, Any], report: dict[str, Any], temperature: float) -> Iterator[tuple[str, str]]:
    """Yield the names and values of the card's table."""
    if report:
        low, high = (f"{100 * edge:.1f}" for edge in report["accuracy_interval"])
        of = f"{report['images']:,} {report['split']} images" + (", ten views of each" if report["tta"] else "")
        yield f"accuracy on {of}", f"{report['accuracy']:.1%} (95 %: {low} to {high})"
        if report["clean_accuracy"] is not None:
            yield f"accuracy on the {report['clean_images']:,} that are not in train", f"{report['clean_accuracy']:.1%}"
        yield "macro-F1", f"{report['macro_f1']:.3f}"
        yield "top-2 accuracy", f"{report['top2_accuracy']:.1%}"
        if report["model_temperature"] == temperature:  # else it was calibrated afterwards
            yield "calibration error (ECE)", f"{report['ece']:.3f}"
    elif summary:
        yield "validation accuracy", f"{summary['best_valid_acc']:.1%}"
    if summary:
        yield "epochs trained; best", f"{summary['epochs']}; {summary['best_epoch']}"
        yield "precision, processes", f"{summary['precision']}, {summary['world_size']}"


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
