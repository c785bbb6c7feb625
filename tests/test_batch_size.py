"""train.batch_size: auto, through the command line."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_train import batch_size
from dist_train.batch_size import choose
from dist_train.cli import main
from dist_train.model import FaceModel

DATA = ("--data.count", "210", "--data.image_size", "32")
SMALL = (*DATA, "--train.max_steps", "3")
AUTO = (*SMALL, "--train.batch_size", "auto")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(batch_size, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(batch_size, "TIMED_STEPS", 1)


@pytest.fixture
def give_out(monkeypatch):
    """Return a function that lets the model's memory end above so many images, as a GPU's does."""

    def limit(most: int) -> None:
        forward = FaceModel.forward

        def limited(model: FaceModel, images: torch.Tensor) -> torch.Tensor:
            if model.training and len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return forward(model, images)

        monkeypatch.setattr(FaceModel, "forward", limited)

    return limit


def stored(run_dir) -> int:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["batch_size"]


def tried(text: str) -> list[int]:
    found = re.search(r"auto chose (\d+) \(tried (.*) images/s\); optim.lr stays ", text)
    assert found, text
    return [int(size) for size in re.findall(r"(\d+): ", found[2])]


def test_the_smallest_batch_near_the_best_speed_is_chosen():
    assert choose({64: 410, 128: 510, 256: 540, 512: 545}) == 256
    assert choose({64: 410, 128: 520, 256: 500}) == 128
    assert choose({8: 100}) == 8


def test_auto_trains_as_the_number_that_it_found(smoke, capsys):
    """To the last bit; the search leaves no trace in weights, batch statistics or random draws."""
    dropout = ("--train.ema", "0.9", "--train.mixup", "0.2")
    run_dir = smoke("auto", *AUTO, *dropout)
    sizes = tried(capsys.readouterr().err)
    assert stored(run_dir) in sizes
    assert sizes == [8, 16]  # of 178 images: no epoch of fewer than ten steps
    same = smoke("number", *SMALL, *dropout, "--train.batch_size", str(stored(run_dir)))
    (found,), (expected,) = ((path / "checkpoints").iterdir() for path in (run_dir, same))
    for name in ("model.safetensors", "ema.safetensors"):
        tensors, others = load_file(found / name), load_file(expected / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_a_resumed_run_keeps_its_batch_and_does_not_search(smoke, capsys, monkeypatch):
    run_dir = smoke("run", *AUTO)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    size = json.loads((checkpoint / "origin.json").read_text())["train.batch_size"]
    assert size == stored(run_dir)
    capsys.readouterr()
    monkeypatch.setattr(batch_size, "_measure_speeds", None)  # may not be called
    smoke("run", *AUTO, "--train.max_steps", "5", "--resume", "auto")
    assert "step 3, epoch" in capsys.readouterr().err
    assert stored(run_dir) == size


def test_what_does_not_fit_is_not_chosen(smoke, give_out, capsys):
    give_out(12)
    assert stored(smoke("run", *AUTO)) == 8
    assert tried(capsys.readouterr().err) == [8]


def test_nothing_that_fits_is_bad_input(smoke, give_out, capsys):
    give_out(4)
    run_dir = smoke("run", *AUTO, code=2)
    assert "train.batch_size: not even 8 images per process fit in the memory of cpu" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_step_that_fails_for_other_reasons_is_not_taken_for_full_memory(smoke, monkeypatch):
    def broken(model: FaceModel, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(FaceModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        smoke("run", *AUTO)


def test_a_machine_without_room_is_not_filled(smoke, monkeypatch, capsys):
    full = type("Memory", (), {"available": 0})
    monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda: full)
    assert stored(smoke("run", *AUTO)) == 8
    assert tried(capsys.readouterr().err) == [8]


def test_lr_find_takes_auto_too(tmp_path, capsys):
    options = ["--data.source", "synthetic", "--model.pretrained", "false", "--train.precision", "no", *AUTO[:6]]
    assert main(["lr-find", *options, *AUTO[-2:], "--steps", "20", "--out", str(tmp_path / "out")]) in (0, 1)
    assert tried(capsys.readouterr().err)[0] == 8


@pytest.mark.slow
def test_two_processes_agree(launch, tmp_path, draw_folder):
    """Streamed, too, they go their own ways while they are timed."""
    run_dir = tmp_path / "run"
    data = ["--data.path", str(draw_folder(train=180, validation=35)), "--data.residency", "stream"]
    model = ["--model.backbone", "timm/test_resnet", "--model.pretrained", "false"]
    options = [*data, *model, "--track.tool", "none", *AUTO]
    recipe = ("multi_cpu", "--num_processes", "2", "--main_process_port", "0")
    done = launch(*recipe, "-m", "dist_train", "train", *options, "--run_dir", str(run_dir))
    assert stored(run_dir) in tried(done.stderr)
    assert tried(done.stderr)[0] == 16  # 8 for each process
    assert done.stderr.count("auto chose") == 1
