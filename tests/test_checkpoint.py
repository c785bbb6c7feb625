from __future__ import annotations

import csv
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from dist_train import load_run
from dist_train.checkpoint import list_checkpoints


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(list_checkpoints(run_dir / "checkpoints")[-1] / "model.safetensors")


def losses(run_dir: Path) -> list[tuple[str, str, str]]:
    with (run_dir / "history.csv").open() as file:
        return [(row["epoch"], row["train_loss"], row["valid_loss"]) for row in csv.DictReader(file)]


OPTIONS = ("--model.backbone", "timm/resnet10t", "--train.max_steps", "18", "--train.epochs", "3", "--train.ema", "0.9")


@pytest.mark.parametrize("every_steps", ["4", "6", "100"])
def test_a_resumed_training_is_the_undisturbed_one_to_the_last_bit(smoke, tmp_path, monkeypatch, every_steps):
    """Of 12 steps an epoch: cut off after 8, after 12 but before validation, and after the first epoch."""
    whole = smoke("whole", *OPTIONS)

    from dist_train import checkpoint

    class Cut(Exception):
        pass

    save = checkpoint.Checkpointer.save

    def save_and_die(self, state):
        save(self, state)
        if state.progress.step >= 8 or every_steps == "100":
            raise Cut

    options = (*OPTIONS, "--save.every_steps", every_steps)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", save_and_die)
        with pytest.raises(Cut):
            smoke("cut", *options)
    assert 4 <= int(list_checkpoints(tmp_path / "cut" / "checkpoints")[-1].name[5:]) < 18
    cut = smoke("cut", *options, "--resume", "auto")

    assert losses(cut) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(cut)[name]), name
    best, same = load_run(whole).state_dict(), load_run(cut).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in best.items())


def test_only_the_newest_checkpoints_and_the_best_model_are_kept(smoke):
    run_dir = smoke("run", *OPTIONS, "--save.every_steps", "2", "--save.keep", "3")
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["step_00000014", "step_00000016", "step_00000018"]
    assert load_run(run_dir).classes[0] == "angry"


def test_resume_auto_starts_anew_in_an_empty_folder_and_ends_at_once_when_finished(smoke, tmp_path):
    (tmp_path / "run").mkdir()
    run_dir = smoke("run", *OPTIONS, "--resume", "auto")
    before = (run_dir / "history.csv").read_text()
    smoke("run", *OPTIONS, "--resume", "auto")
    assert (run_dir / "history.csv").read_text() == before


def test_a_named_checkpoint_is_resumed_in_a_new_folder(smoke):
    first = smoke("first", *OPTIONS, "--save.every_steps", "9", "--save.keep", "9")
    checkpoint = first / "checkpoints" / "step_00000009"
    second = smoke("second", *OPTIONS, "--resume", str(checkpoint))
    assert losses(second) == losses(first)


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--model.backbone", "resnet18"), "another model"), (("--optim.name", "adamw"), "another model")],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(smoke, capsys, options, said):
    run_dir = smoke("run", *OPTIONS)
    smoke("run", *OPTIONS, *options, "--resume", "auto", code=2)
    assert said in capsys.readouterr().err
    assert list_checkpoints(run_dir / "checkpoints")


def test_nothing_in_a_checkpoint_is_executed(smoke, capsys):
    run_dir = smoke("run", *OPTIONS)
    torch.save({"optimizer": Accelerator}, list_checkpoints(run_dir / "checkpoints")[-1] / "state.pt")
    smoke("run", *OPTIONS, "--resume", "auto", code=2)
    assert "cannot be read" in capsys.readouterr().err
