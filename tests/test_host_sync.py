"""The steady loop never makes the host wait for a number from the device, but where it logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dist_train import FaceModel, train
from dist_train.config import AugmentConfig, DataConfig
from dist_train.data.images import load_splits
from dist_train.data.loader import ImageLoader
from dist_train.faults import Watch

SYNCS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "cudaStreamSynchronize"}
ALL = (
    *("--train.mixup", "0.2", "--train.ema", "0.9", "--train.clip_grad", "1", "--train.gradient_accumulation", "2"),
    *("--train.label_smoothing", "0.1", "--data.augment.erase", "0.5", "--track.tool", "tensorboard"),
)
LOG_EVERY = 5


def count_syncs(run_dir: Path) -> dict[int, list[str]]:
    """Return, by step, the operations of its recorded trace that read a number from the device."""
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if "dur" in event}
    steps = {int(name[13:]) + 1: span for name, span in spans.items() if name.startswith("ProfilerStep#")}
    assert len(steps) == 10
    return {
        step: [event["name"] for event in events if event["name"] in SYNCS and start <= event["ts"] <= end]
        for step, (start, end) in steps.items()
    }


def profiled(smoke, *options: str) -> dict[int, list[str]]:
    every = ("--data.count", "700", "--train.max_steps", "15", "--track.log_every", str(LOG_EVERY))  # one epoch
    return count_syncs(
        smoke("run", "--model.backbone", "timm/test_resnet", "--train.profile", "true", *every, *options)
    )


@pytest.mark.parametrize("options", [(), ALL], ids=["default", "all"])
def test_only_steps_that_log_read_from_the_device(smoke, options):
    syncs = profiled(smoke, *options)
    for step, found in syncs.items():
        assert bool(found) == (step % LOG_EVERY == 0), f"step {step}: {found}"


def test_a_loss_that_is_read_in_each_step_would_be_found(smoke, monkeypatch):
    see = Watch.see
    monkeypatch.setattr(Watch, "see", lambda self, loss: (loss.item(), see(self, loss)))
    assert all(profiled(smoke).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residency", ["device", "host"])
def test_no_step_on_a_gpu_synchronises(residency):
    """But for the event of Watch.agree, which torch does not count."""

    class Strict(ImageLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                yield batch
                torch.cuda.set_sync_debug_mode("error" if number < 8 else "default")  # the first step allocates

    accelerator = Accelerator()
    faces = load_splits(DataConfig(count=420))
    model = FaceModel("timm/test_resnet", pretrained=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    place = {"device": accelerator.device, "residency": residency}
    loader = Strict(faces[0], 32, shuffle=True, augment=AugmentConfig(erase=0.5), mixup=0.2, **place)
    options = {"ema": 0.9, "clip_grad": 1.0, "log_every": 100, "watch": Watch(accelerator, None)}
    try:
        train(model, loader, ImageLoader(faces[1], 64, **place), optimizer, 1, accelerator=accelerator, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
