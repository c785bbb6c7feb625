"""One training from a Config: builds the parts, calls train(), leaves the run folder.

config -> data, model, optimizer -> train -> run folder. Everything that can be wrong with the input is found
before the run folder is touched.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm

from dist_train.batch_size import with_batch_size
from dist_train.checkpoint import Checkpointer, check_checkpoint, find_checkpoint, set_aside_damaged
from dist_train.config import Config, InputError, TrainConfig
from dist_train.data.images import load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.loader import ImageLoader, UnreadableImage
from dist_train.faults import Interrupted, TrainingError, Watch
from dist_train.files import OWN_FILES, refuse_links, write_file
from dist_train.model import FaceModel
from dist_train.optim import build_optimizer, build_schedule
from dist_train.outputs import leave_pictures, write_summary
from dist_train.processes import build_accelerator, local_main_first, on_main
from dist_train.profiling import Profiler
from dist_train.state import Progress
from dist_train.tracking import Tracker, check_tracker, tracker_kind
from dist_train.training import train

logger = logging.getLogger(__name__)

ORIGIN = (
    "data.image_size",
    "data.augment",
    "model.backbone",
    "model.in_channels",
    "model.stem_stride",
    "train.batch_size",
    "train.seed",
    "train.ema",
    "train.label_smoothing",
    "train.mixup",
    "train.clip_grad",
    "optim.name",
    "optim.lr",
    "optim.weight_decay",
    "optim.schedule",
    "optim.warmup_epochs",
    "save.best_on",
)


def run_training(config: Config, *, overwrite: bool = False) -> Path:
    """Train as `config` says and return the run folder; called on every process.

    overwrite: replace an earlier run in the folder. Raises InputError for bad input, before anything is written.
    """
    check_tracker(config.track)
    accelerator = build_accelerator(config.train)
    run_dir, checkpoint = on_main(accelerator, _choose_run_dir, config, overwrite)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    splits = local_main_first(accelerator, load_splits, config.data)
    build = partial(build_parts, splits=splits, accelerator=accelerator)
    config = with_batch_size(config, accelerator, build, checkpoint)
    model, trainloader, validloader, optimizer = build(config)
    origin = on_main(accelerator, _origin, config, splits)
    if checkpoint:
        on_main(accelerator, check_checkpoint, checkpoint, model, origin, config.resume_changed)
    steps = min(config.train.epochs * len(trainloader), config.train.max_steps or 10**12)
    scheduler = build_schedule(optimizer, config.optim, len(trainloader), steps)

    run_id = on_main(accelerator, _start_run_dir, run_dir, config, checkpoint, overwrite)
    progress = Progress()
    checkpointer = Checkpointer(
        run_dir,
        accelerator,
        keep=config.save.keep,
        every_epochs=config.save.every_epochs,
        every_steps=config.save.every_steps,
        resume_from=checkpoint,
        origin=origin,
    )
    watch = Watch(accelerator, checkpointer, max_bad_steps=config.train.max_bad_steps, names=splits[0].names)
    tracker = Tracker(accelerator, config.track, run_dir, asdict(config), run_id)
    with watch.signals():
        try:
            history = train(
                model,
                trainloader,
                validloader,
                optimizer,
                config.train.epochs,
                accelerator=accelerator,
                scheduler=scheduler,
                patience=config.train.patience,
                max_steps=config.train.max_steps,
                best_on=config.save.best_on,
                log_every=config.track.log_every,
                tracker=tracker,
                checkpointer=checkpointer,
                watch=watch,
                profiler=Profiler(accelerator, run_dir) if config.train.profile else None,
                progress=progress,
                **step_settings(config.train),
            )
            checkpointer.flush()
            if accelerator.is_main_process:
                write_summary(run_dir, progress, run_id, accelerator)
            leave_pictures(run_dir, history, splits[1], tracker, accelerator)
            tracker.finish()
        except (Interrupted, UnreadableImage):  # both on all processes
            tracker.finish(failed=True)
            accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has left
            accelerator.end_training()
            raise
        except RuntimeError as error:
            raise watch.explain(error) or error from error
        except OSError as error:
            if error.filename and not Path(error.filename).absolute().is_relative_to(run_dir.absolute()):
                raise
            raise TrainingError(
                f"{run_dir} cannot be written ({error}); mend it and go on with --resume auto"
            ) from error
        finally:
            checkpointer.flush()
            tracker.finish(failed=True)
    accelerator.end_training()
    return run_dir


# The parts


class Parts(NamedTuple):
    """What is trained, on what, and how."""

    model: FaceModel
    trainloader: ImageLoader
    validloader: ImageLoader
    optimizer: torch.optim.Optimizer


def build_parts(config: Config, splits: tuple[ImageSet, ImageSet], accelerator: Accelerator) -> Parts:
    """Return the parts of a training as they are before its first step, by the seed; called on every process."""
    set_seed(config.train.seed)
    model = local_main_first(accelerator, build_model, config, splits[0])
    fused = accelerator.device.type == "cuda" and accelerator.scaler is None
    optimizer = build_optimizer(model, config.optim, fused)
    return Parts(model, *build_loaders(config, splits, accelerator), optimizer)


def step_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what of a config train() takes that decides what a step does."""
    names = ("gradient_accumulation", "label_smoothing", "clip_grad", "ema", "seed")
    return {name: getattr(config, name) for name in names}


def build_model(config: Config, data: ImageSet) -> FaceModel:
    """Return the configured model with a head for the classes of `data`."""
    settings = config.model
    model = FaceModel(
        settings.backbone,
        len(data.classes),
        settings.pretrained,
        settings.weights,
        in_channels=settings.in_channels,
        stem_stride=settings.stem_stride,
        classes=data.classes,
        image_size=config.data.image_size,
        gray=data.images.shape[1] == 1,
    )
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.sync_batchnorm:
        model = convert_sync_batchnorm(model)
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
    batch_size = config.train.batch_size
    assert isinstance(batch_size, int)  # with_batch_size() puts a number in the place of auto
    trainloader = ImageLoader(
        train,
        batch_size,
        shuffle=True,
        augment=config.data.augment,
        mixup=config.train.mixup,
        seed=config.train.seed,
        **place,
    )
    return trainloader, ImageLoader(validation, batch_size, **place)


# The run folder


def _choose_run_dir(config: Config, overwrite: bool) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to resume from; refuse a folder that is in use."""
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir: {run_dir} is a file; name a folder")
    checkpoint = find_checkpoint(run_dir, config.resume)
    used = run_dir.is_dir() and any(run_dir.iterdir())
    if overwrite and checkpoint:
        raise InputError(f"resume: {config.resume} and --overwrite exclude each other")
    refuse_links(run_dir)
    if overwrite and used and not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir: {run_dir} is not a run folder (no config.yaml), so --overwrite will not delete it")
    if used and not overwrite and config.resume == "never":
        raise InputError(f"run_dir: {run_dir} is not empty; name another, or use --resume auto or --overwrite")
    if used and checkpoint and checkpoint.parent.resolve() != (run_dir / "checkpoints").resolve():
        raise InputError(f"run_dir: {run_dir} is not empty; resuming {checkpoint} needs its own folder or a new one")
    if used and not overwrite and checkpoint is None and not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir: {run_dir} is not empty and not a run folder (no config.yaml); name another")
    writable = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    if not writable.is_dir() or not os.access(writable, os.W_OK):
        raise InputError(f"run_dir: {run_dir} cannot be written: no right to write in {writable}")
    return run_dir, checkpoint


def _start_run_dir(run_dir: Path, config: Config, checkpoint: Path | None, overwrite: bool) -> str | None:
    """Make the folder ready for this training and return the id of its W&B run, if it has one."""
    for old in [run_dir / name for name in OWN_FILES if overwrite]:  # nothing of anybody else's
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    set_aside_damaged(checkpoint, run_dir)
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    write_file(run_dir / "config.yaml", lambda file: file.write_text(text))
    if tracker_kind(config.track) != "wandb":
        return None
    file = run_dir / "wandb" / "run_id"
    if file.is_file() and re.fullmatch(r"[\w-]{1,64}", run_id := file.read_text().strip()):
        return run_id
    file.parent.mkdir(exist_ok=True)
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # the agent of a sweep has chosen one
    write_file(file, lambda aside: aside.write_text(run_id + "\n"))
    return run_id


def _origin(config: Config, splits: tuple[ImageSet, ImageSet]) -> dict[str, Any]:
    """Return what decides a training's course, by key: what a resumed one must share with its checkpoint."""
    settings = {f"{part}.{key}": value for part, values in asdict(config).items() if isinstance(values, dict)
                for key, value in values.items()}  # fmt: skip
    return {key: settings[key] for key in ORIGIN} | {
        f"the {name} data": split.fingerprint() for name, split in zip(("train", "validation"), splits, strict=True)
    }
