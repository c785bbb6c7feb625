from __future__ import annotations

import csv
import json
import shutil

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_file import KEYS, find_runs, read_config, read_history

from dist_train.wandb_log import read_records

FILES = (
    "config.yaml",
    "history.csv",
    "summary.json",
    "curves.png",
    "predictions.png",
    "best/model.safetensors",
    "best/config.json",
)
SUMMARY = {
    "best_valid_acc",
    "best_epoch",
    "final_train_loss",
    "final_train_acc",
    "final_valid_loss",
    "final_valid_acc",
    "epochs",
    "world_size",
    "precision",
    "device",
    "images_per_second",
    "train_seconds",
    "wandb_run_id",
    "versions",
}


def test_a_run_leaves_its_folder_and_an_offline_wandb_run(smoke, capsys):
    run_dir = smoke("run", "--track.tool", "wandb", "--track.tags", "[a, b]")
    for name in FILES:
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    (file,) = find_runs(run_dir)
    assert f"kept offline; upload it with: wandb sync {file.parent}" in capsys.readouterr().err

    history = read_history(file)
    assert {key for row in history for key in row} >= KEYS | {"curves", "confusion_matrix", "predictions"}
    steps = [row["step"] for row in history if "train/loss" in row]
    assert steps == sorted(set(steps)) == list(range(2, 13, 2))
    assert read_config(file)["train"]["batch_size"] == 32
    (run,) = [record.run for record in read_records(file) if record.HasField("run")]
    assert run.run_id == summary["wandb_run_id"]
    assert list(run.tags) == ["a", "b"]

    with (run_dir / "history.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "train_acc",
        "valid_loss",
        "valid_acc",
        "lr",
        "images_per_second",
        "seconds",
    ]
    valid = [row["valid/accuracy"] for row in history if "valid/accuracy" in row]
    assert [float(row["valid_acc"]) for row in rows] == pytest.approx(valid)
    assert summary["best_valid_acc"] == max(valid)


def test_the_resolved_config_can_be_trained_again_with_the_same_result(smoke, tmp_path):
    first = smoke("first", "--train.seed", "5")
    assert yaml.safe_load((first / "config.yaml").read_text())["train"]["seed"] == 5
    second = smoke("second", "--config", str(first / "config.yaml"), "--run_dir", str(tmp_path / "second"))

    def losses(run_dir):
        with (run_dir / "history.csv").open() as table:
            return [(row["train_loss"], row["valid_loss"]) for row in csv.DictReader(table)]

    assert losses(first) == losses(second)


def test_a_resumed_training_goes_on_with_its_wandb_run_without_repeating_a_step(smoke):
    """The second part starts at a checkpoint that lies before what the first part has logged last."""
    options = ("--track.tool", "wandb", "--save.every_steps", "5")
    run_dir = smoke("run", *options, "--train.max_steps", "11")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000011")
    smoke("run", *options, "--train.epochs", "3", "--train.max_steps", "16", "--resume", "auto")
    files = find_runs(run_dir)
    ids = {record.run.run_id for file in files for record in read_records(file) if record.HasField("run")}
    assert len(files) == 2 and len(ids) == 1
    rows = [row for file in files for row in read_history(file)]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, 17, 2))
    # the first part ended its first epoch early, at step 11
    assert [(row["epoch"], row["step"]) for row in rows if "epoch" in row] == [(1, 11), (1, 12), (2, 16)]


def test_a_run_whose_id_was_chosen_is_resumed_without_it_being_named_again(smoke, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "exp-7_b")
        run_dir = smoke("run", "--track.tool", "wandb", "--train.max_steps", "3")
    smoke("run", "--track.tool", "wandb", "--train.max_steps", "5", "--resume", "auto")
    records = [record for file in find_runs(run_dir) for record in read_records(file)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {"exp-7_b"}


def test_tensorboard(smoke):
    run_dir = smoke("run", "--track.tool", "tensorboard")
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= KEYS - {"step"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 13, 2))
    assert [event.step for event in events.Scalars("valid/loss")] == [12]
    assert "curves" in events.Tags()["images"]


def test_wandb_disabled_leaves_nothing_behind(smoke):
    run_dir = smoke("run", "--track.tool", "wandb", "--track.wandb", "disabled")
    assert not (run_dir / "wandb").exists()
    assert (run_dir / "history.csv").exists()
    assert json.loads((run_dir / "summary.json").read_text())["wandb_run_id"] is None
