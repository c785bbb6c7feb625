"""One training from a Config: builds the parts, calls train(), leaves the run folder.

config -> data, model, optimizer -> train -> run folder. Everything that can be wrong with the input is found
before the run folder is touched.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from matplotlib.figure import Figure
from torch.nn import SyncBatchNorm

from dist_train.checkpoint import Checkpointer, Progress, find_checkpoint, on_main
from dist_train.config import Config, InputError
from dist_train.data.images import ImageSet, load_splits
from dist_train.data.loader import ImageLoader
from dist_train.evaluation import evaluate
from dist_train.figures import plot_confusion, plot_history, view_results
from dist_train.model import FaceModel, load_run
from dist_train.optim import build_optimizer, build_schedule
from dist_train.tracking import Tracker, check_tracker
from dist_train.training import History, train

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 24
LISTED_MISTAKES = 64


def run_training(config: Config, *, overwrite: bool = False) -> Path:
    """Train as `config` says and return the run folder; called on every process.

    overwrite: replace an earlier run in the folder. Raises InputError for bad input, before anything is written.
    """
    check_tracker(config.track)
    accelerator = build_accelerator(config)
    run_dir, checkpoint = on_main(accelerator, _choose_run_dir, config, overwrite)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    set_seed(config.train.seed)
    with accelerator.local_main_process_first():
        splits = load_splits(config.data)
    with accelerator.local_main_process_first():
        model = build_model(config, splits[0])
    trainloader, validloader = build_loaders(config, splits, accelerator)
    optimizer = build_optimizer(model, config.optim)
    steps = min(config.train.epochs * len(trainloader), config.train.max_steps or 10**12)
    scheduler = build_schedule(optimizer, config.optim, len(trainloader), steps)

    on_main(accelerator, _start_run_dir, run_dir, config, checkpoint is None)
    progress = Progress(run_id=on_main(accelerator, _run_id, run_dir))
    tracker = Tracker(accelerator, config.track, run_dir, asdict(config), progress.run_id)
    checkpointer = Checkpointer(
        run_dir,
        accelerator,
        keep=config.save.keep,
        every_epochs=config.save.every_epochs,
        every_steps=config.save.every_steps,
        resume_from=checkpoint,
    )
    started = time.perf_counter()
    try:
        history = train(
            model,
            trainloader,
            validloader,
            optimizer,
            config.train.epochs,
            accelerator=accelerator,
            scheduler=scheduler,
            gradient_accumulation=config.train.gradient_accumulation,
            label_smoothing=config.train.label_smoothing,
            clip_grad=config.train.clip_grad,
            ema=config.train.ema,
            patience=config.train.patience,
            max_steps=config.train.max_steps,
            best_on=config.save.best_on,
            seed=config.train.seed,
            log_every=config.track.log_every,
            tracker=tracker,
            checkpointer=checkpointer,
            progress=progress,
        )
        _finish(run_dir, history, validloader, splits[1], tracker, accelerator)
        if accelerator.is_main_process:
            summary = _summarise(progress, time.perf_counter() - started, accelerator)
            _write_json(run_dir / "summary.json", summary)
            logger.info(
                "best validation accuracy %.4f in epoch %d; run folder: %s",
                summary["best_valid_acc"],
                summary["best_epoch"],
                run_dir,
            )
    finally:
        tracker.finish()
    return run_dir


# Where it runs


def build_accelerator(config: Config) -> Accelerator:
    """Return the Accelerator for this machine: on the CPU where no accelerator is there.

    Raises InputError where launcher and Accelerator disagree on the number of processes, and for settings that
    the device cannot do.
    """
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    precision = choose_precision(config.train.precision, cpu)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    _check_processes(accelerator)
    if cpu and config.train.sync_batchnorm:
        raise InputError("train.sync_batchnorm: true is for GPUs; torch has no SyncBatchNorm on a CPU")
    if config.train.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("train.ema: cannot average sharded weights (FSDP); set train.ema: 0")
    _set_threads(accelerator, cpu)
    return accelerator


def choose_precision(precision: str, cpu: bool) -> str:
    """Return no, fp16 or bf16 for a config's precision; InputError for fp16 on a CPU."""
    if precision == "fp16" and cpu:
        raise InputError("train.precision: fp16 needs a GPU; on a CPU use bf16, no, or auto")
    if precision != "auto":
        return precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("fp16", "bf16"):
        return choose_precision(launched, cpu)
    if cpu:
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_computes_bf16() else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _cpu_computes_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _check_processes(accelerator: Accelerator) -> None:
    """Refuse a launcher that asked for more processes than this training found."""
    found = accelerator.num_processes
    for name in ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES"):
        asked = os.environ.get(name, "")
        if asked.isdecimal() and int(asked) != found:
            raise InputError(
                f"{name}: the launcher asks for {asked} processes, but this training is of {found}; "
                "start it with accelerate launch --config_file launch/accelerate/multi_cpu.yaml"
            )
    # accelerate launch sets MASTER_ADDR for several processes, but starts only one with --cpu or MULTI_CPU
    if (
        found == 1
        and "ACCELERATE_MIXED_PRECISION" in os.environ
        and "MASTER_ADDR" in os.environ
        and "RANK" not in os.environ
    ):
        raise InputError(
            "MASTER_ADDR: accelerate launch was asked for several processes but started one (it does so "
            "with --cpu and with distributed_type MULTI_CPU); use launch/accelerate/multi_cpu.yaml, or "
            "unset MASTER_ADDR for one process"
        )


def _set_threads(accelerator: Accelerator, cpu: bool) -> None:
    """Share the cores between the processes of this machine, where the launcher left each with one thread."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if cpu and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


# The parts


def build_model(config: Config, data: ImageSet) -> FaceModel:
    """Return the configured model with a head for the classes of `data`."""
    settings = config.model
    model = FaceModel(
        settings.backbone,
        len(data.classes),
        settings.pretrained,
        settings.weights,
        in_channels=settings.in_channels,
        classes=data.classes,
        image_size=config.data.image_size,
    )
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.sync_batchnorm:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    if config.train.compile:
        model.compile()
    return model


def build_loaders(
    config: Config, splits: tuple[ImageSet, ImageSet], accelerator: Accelerator
) -> tuple[ImageLoader, ImageLoader]:
    """Return the train and validation loaders of this process."""
    place: dict[str, Any] = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "device": accelerator.device,
        "residency": config.data.residency,
    }
    train, validation = splits
    trainloader = ImageLoader(
        train,
        config.train.batch_size,
        shuffle=True,
        augment=config.data.augment,
        mixup=config.train.mixup,
        seed=config.train.seed,
        **place,
    )
    return trainloader, ImageLoader(validation, config.train.batch_size, **place)


# The run folder


def _choose_run_dir(config: Config, overwrite: bool) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to resume from; refuse a folder that is in use."""
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir: {run_dir} is a file; name a folder")
    checkpoint = find_checkpoint(run_dir, config.resume)
    used = run_dir.is_dir() and any(run_dir.iterdir())
    if overwrite and checkpoint:
        raise InputError(f"resume: {config.resume} and --overwrite exclude each other")
    if overwrite and used and not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir: {run_dir} is not a run folder (no config.yaml), so --overwrite will not delete it")
    if used and not overwrite and config.resume == "never":
        raise InputError(f"run_dir: {run_dir} is not empty; name another, or use --resume auto or --overwrite")
    if used and not overwrite and checkpoint is None and not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir: {run_dir} is not empty and not a run folder (no config.yaml); name another")
    writable = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    if not writable.is_dir() or not os.access(writable, os.W_OK):
        raise InputError(f"run_dir: {run_dir} cannot be written: no right to write in {writable}")
    return run_dir, checkpoint


def _start_run_dir(run_dir: Path, config: Config, new: bool) -> None:
    if new and run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def _run_id(run_dir: Path) -> str:
    """Return the id of the W&B run that this folder's training began, or a new one."""
    file = run_dir / "wandb" / "run_id"
    if file.is_file():
        return file.read_text().strip()
    file.parent.mkdir(exist_ok=True)
    run_id = secrets.token_hex(4)
    file.write_text(run_id + "\n")
    return run_id


def _finish(
    run_dir: Path,
    history: History,
    loader: ImageLoader,
    validation: ImageSet,
    tracker: Tracker,
    accelerator: Accelerator,
) -> None:
    """Evaluate the best model once more and leave its pictures, in the folder and with the tracker."""
    if not (run_dir / "best").is_dir():
        logger.warning("no epoch had a finite validation %s; no best model and no pictures", "figure")
        return
    model = load_run(run_dir).to(accelerator.device)
    results = evaluate(model, loader, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    figures = {
        "curves": plot_history(history),
        "predictions": _picture_predictions(model, validation),
        "confusion_matrix": plot_confusion(results.confusion, model.classes),
    }
    figures["curves"].savefig(run_dir / "curves.png")
    figures["predictions"].savefig(run_dir / "predictions.png")
    tracker.log_pictures({name: _pixels(figure) for name, figure in figures.items()})
    columns, rows = _list_mistakes(model, validation)
    tracker.log_table("misclassified", columns, rows)


def _picture_predictions(model: FaceModel, data: ImageSet) -> Figure:
    index = np.random.default_rng(0).permutation(len(data))[:SHOWN_IMAGES]
    return view_results(data.images[index], data.labels[index], model)


def _list_mistakes(model: FaceModel, data: ImageSet) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the wrongest validation images, the most confident first."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        chunks = torch.from_numpy(data.images).split(256)
        shares = torch.cat([model(chunk.to(device)).float().softmax(1).cpu() for chunk in chunks])
    confidence, predicted = shares.max(1)
    wrong = np.flatnonzero(predicted.numpy() != data.labels)
    wrong = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")][:LISTED_MISTAKES]
    rows = [
        [
            data.images[i].transpose(1, 2, 0).squeeze(),
            data.names[i],
            data.classes[data.labels[i]],
            data.classes[int(predicted[i])],
            float(confidence[i]),
        ]
        for i in wrong
    ]
    return ["image", "name", "real", "predicted", "confidence"], rows


def _pixels(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summarise(progress: Progress, seconds: float, accelerator: Accelerator) -> dict[str, Any]:
    last, best = progress.epochs[-1], progress.epochs[max(progress.best_epoch, 1) - 1]
    packages = ("dist_train", "torch", "torchvision", "accelerate", "timm", "wandb")
    return {
        "best_valid_acc": best.valid_acc,
        "best_epoch": best.epoch,
        **{f"final_{name}": getattr(last, name) for name in ("train_loss", "train_acc", "valid_loss", "valid_acc")},
        "epochs": last.epoch,
        "steps": progress.step,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "images_per_second": sum(e.images_per_second for e in progress.epochs) / len(progress.epochs),
        "train_seconds": seconds,
        "wandb_run_id": progress.run_id,
        "versions": {name: version(name) for name in packages},
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    aside.replace(file)
