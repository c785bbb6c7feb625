from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from conftest import SMALL

from dist_train import FaceModel, load_run
from dist_train.checkpoint import Checkpointer, find_checkpoint, list_checkpoints
from dist_train.cli import main
from dist_train.config import InputError, OptimConfig
from dist_train.files import SUMS, find_fault, seal_folder, write_file
from dist_train.optim import build_optimizer, build_schedule
from dist_train.state import Progress, TrainState


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(list_checkpoints(run_dir / "checkpoints")[-1] / "model.safetensors")


def losses(run_dir: Path) -> list[tuple[str, str, str]]:
    with (run_dir / "history.csv").open() as file:
        return [(row["epoch"], row["train_loss"], row["valid_loss"]) for row in csv.DictReader(file)]


OPTIONS = ("--train.max_steps", "18", "--train.epochs", "3", "--train.ema", "0.9")


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
    [
        (("--model.backbone", "resnet18"), 'model.backbone is "resnet18"'),
        (("--optim.lr", "0.5"), "optim.lr is 0.5"),
        (("--data.augment.flip", "0"), "data.augment is"),
        (("--data.count", "421"), "the train data is"),
    ],
)
def test_other_settings_or_data_than_the_checkpoints_are_refused(smoke, capsys, options, said):
    run_dir = smoke("run", *OPTIONS)
    config = (run_dir / "config.yaml").read_text()
    smoke("run", *OPTIONS, *options, "--resume", "auto", code=2)
    error = capsys.readouterr().err
    assert said in error and "resume_changed" in error
    assert (run_dir / "config.yaml").read_text() == config
    assert list_checkpoints(run_dir / "checkpoints")


def test_other_data_is_accepted_where_told_but_never_another_model(smoke, capsys):
    smoke("run", *OPTIONS)
    changed = ("--resume", "auto", "--resume_changed", "true")
    smoke("run", *OPTIONS, "--data.count", "421", "--train.max_steps", "20", *changed)
    smoke("run", *OPTIONS, "--model.backbone", "resnet18", *changed, code=2)
    assert "weights differ" in capsys.readouterr().err


def test_a_training_without_a_scaler_goes_on_with_one(smoke):
    """As one in bf16 does on a GPU that has fp16 only."""
    (checkpoint,) = list_checkpoints(smoke("run", *OPTIONS, "--save.keep", "1") / "checkpoints")
    model = FaceModel("timm/test_resnet", pretrained=False)
    optimizer = build_optimizer(model, OptimConfig())
    build_schedule(optimizer, OptimConfig(), 12, 18)
    state = TrainState(model, optimizer, Progress(), None)
    state.parts = {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}
    Checkpointer(checkpoint.parent, Accelerator(cpu=True), resume_from=checkpoint, origin={}).restore(state)
    assert state.progress.step == 18
    assert state.parts["scaler"].get_scale() == 8.0


def test_a_resumed_training_remembers_for_how_long_nothing_has_improved(smoke):
    """A model without batch statistics that learns nothing stops after the third epoch."""
    options = ("--model.backbone", "timm/convnext_atto", "--optim.lr", "1e-12", "--train.patience", "2")
    options += ("--train.epochs", "9", "--data.count", "105", "--train.max_steps")
    run_dir = smoke("run", *options, "6")  # two epochs
    smoke("run", *options, "27", "--resume", "auto")
    assert [epoch for epoch, _, _ in losses(run_dir)] == ["1", "2", "3"]


def test_momentum_that_was_saved_in_another_memory_format_is_the_same_momentum(smoke):
    whole = smoke("whole", *OPTIONS, "--save.every_steps", "6", "--save.keep", "9")
    checkpoint = whole / "checkpoints" / "step_00000006"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    kept = state["optimizer"]["state"]
    strided = [key for key, value in kept.items() for tensor in value.values() if not tensor.is_contiguous()]
    assert strided  # of channels_last
    contiguous = {key: {n: tensor.contiguous() for n, tensor in value.items()} for key, value in kept.items()}
    state["optimizer"]["state"] = contiguous
    torch.save(state, checkpoint / "state.pt")
    (checkpoint / SUMS).unlink()
    seal_folder(checkpoint.rename(checkpoint.parent / "forged"), checkpoint)
    resumed = smoke("resumed", *OPTIONS, "--resume", str(checkpoint))
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_nothing_in_a_checkpoint_is_executed(smoke, capsys):
    run_dir = smoke("run", *OPTIONS)
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    torch.save({"optimizer": Accelerator}, checkpoint / "state.pt")
    (checkpoint / SUMS).unlink()
    aside = checkpoint.rename(checkpoint.parent / "forged")
    seal_folder(aside, checkpoint)
    smoke("run", *OPTIONS, "--resume", "auto", code=2)
    assert "Weights only load failed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    assert main(["train", *SMALL, "--run_dir", str(run_dir), "--track.tool", "none", *OPTIONS]) == 0
    return run_dir


def damaged(kind: str, content: bytes) -> bytes:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    return {"truncated": content[:-1], "halved": content[: len(content) // 2], "flipped": bytes(flipped)}[kind]


PARTS = ("model.safetensors", "ema.safetensors", "state.pt", "origin.json", "SHA256SUMS")


@pytest.mark.parametrize("kind", ["truncated", "halved", "flipped", "deleted"])
@pytest.mark.parametrize("part", PARTS)
def test_any_damage_is_named_and_the_checkpoint_before_is_used(saved, tmp_path, caplog, part, kind):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    older, newest = list_checkpoints(run_dir / "checkpoints")
    assert {file.name for file in newest.iterdir()} == set(PARTS)
    assert find_checkpoint(run_dir, "auto") == newest
    file = newest / part
    if kind == "deleted":
        file.unlink()
    else:
        file.write_bytes(damaged(kind, file.read_bytes()))
    assert find_checkpoint(run_dir, "auto") == older
    assert f"{newest} is skipped" in caplog.text
    assert part in caplog.text or part == SUMS  # a flipped bit there may spoil a name or a sum
    with pytest.raises(InputError, match=str(newest)):
        find_checkpoint(run_dir, str(newest))
    (older / part).write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in"):
        find_checkpoint(run_dir, "auto")


@pytest.mark.parametrize("written", [["--run_dir", "{}"], ["--run_dir={}"]], ids=" ".join)
def test_a_resumed_run_needs_no_config_but_its_own(saved, tmp_path, written):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    assert main(["train", *(word.format(run_dir) for word in written), "--resume", "auto"]) == 0
    assert losses(run_dir) == losses(saved)


@pytest.mark.parametrize("link", ["best", "checkpoints/step_00000099", "best/config.json", "report.html"])
def test_a_run_folder_that_holds_links_to_elsewhere_is_refused(saved, tmp_path, capsys, link):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(saved, run_dir)
    shutil.copytree(next((saved / "checkpoints").iterdir()), elsewhere)
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    place = run_dir / link
    if place.exists():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(elsewhere)
    train = ["train", "--config", str(run_dir / "config.yaml"), "--run_dir", str(run_dir), "--resume", "auto"]
    for command in (train, ["evaluate", str(run_dir)]):
        assert main(command) == 2
        assert f"{place} is a link" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == before


def test_a_link_where_a_file_is_written_aside_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / ".config.yaml").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "config.yaml", lambda file: file.write_text("seed: 0"))
    assert (tmp_path / "precious").read_text() == "years of work"
    assert (tmp_path / "config.yaml").read_text() == "seed: 0"


def test_training_goes_on_behind_a_damaged_checkpoint(smoke, capsys):
    whole = smoke("whole", *OPTIONS)
    run_dir = smoke("run", *OPTIONS, "--save.keep", "1", "--save.every_steps", "6")
    (newest,) = list_checkpoints(run_dir / "checkpoints")
    shutil.copytree(list_checkpoints(whole / "checkpoints")[0], newest.parent / "step_00000012")
    (newest / "state.pt").write_bytes(b"torn")
    smoke("run", *OPTIONS, "--save.keep", "1", "--resume", "auto")
    assert "state.pt is damaged" in capsys.readouterr().err
    assert losses(run_dir) == losses(whole)
    assert [find_fault(path) for path in list_checkpoints(run_dir / "checkpoints")] == [None]
    assert len(list(newest.parent.glob("damaged_*"))) == 1
