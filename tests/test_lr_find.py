"""The learning-rate range test through the command line."""

from __future__ import annotations

import csv
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from dist_train.cli import main
from dist_train.faults import TrainingError
from dist_train.lr_find import suggest_rate

ROOT = Path(__file__).parents[1]
SMOKE = ["lr-find", "--config", str(ROOT / "configs" / "smoke.yaml")]
SMALL = ["--model.backbone", "timm/resnet10t", "--data.count", "140", "--steps", "30"]


def read_curve(out: Path) -> list[dict[str, float]]:
    with (out / "lr_find.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def suggestion(text: str) -> float:
    found = re.search(r"suggested optim\.lr: (\S+) ", text)
    assert found
    return float(found[1])


def test_it_says_one_line_and_leaves_a_curve(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*SMOKE, *SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(out / "lr_find.png") in said
    rows = read_curve(out)
    rates = [row["lr"] for row in rows]
    assert rates[0] == pytest.approx(1e-6) and rates[-1] <= 10.001
    assert all(b / a == pytest.approx(1e7 ** (1 / 29)) for a, b in pairwise(rates))
    judged = rows[3:]
    lowest = min(judged, key=lambda row: row["smoothed_loss"])
    assert suggestion(said) == pytest.approx(lowest["lr"] / 10, rel=0.05)
    with Image.open(out / "lr_find.png") as picture:
        assert picture.width == 1008
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "cache") == ["out"]  # no run folder
    assert main([*SMOKE, *SMALL, "--out", str(out)]) == 0  # its own files may be replaced
    assert read_curve(out) == rows  # and nothing is left to chance


def test_its_steps_are_those_of_training(tmp_path, monkeypatch):
    """At the lowest rate the weights hardly move: the first losses are training's, with smoothing, mixup and all."""
    monkeypatch.setattr("dist_train.lr_find.suggest_rate", lambda *_: 0.1)  # whether so few steps learn is not asked
    settings = [*SMALL[:4], "--train.label_smoothing", "0.1", "--train.mixup", "0.2", "--optim.name", "adamw"]
    assert main([*SMOKE, *settings, "--steps", "20", "--out", str(tmp_path / "out")]) == 0
    still = ["--optim.lr", "1e-12", "--train.epochs", "1", "--train.max_steps", "1", "--track.tool", "none"]
    run_dir = tmp_path / "run"
    assert main(["train", *SMOKE[1:], *settings, *still, "--run_dir", str(run_dir)]) == 0
    with (run_dir / "history.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert read_curve(tmp_path / "out")[0]["loss"] == pytest.approx(float(epoch["train_loss"]), abs=1e-6)


def test_a_tenth_of_the_rate_with_the_lowest_loss_is_suggested():
    rates = [10.0**n for n in range(-6, 2)]
    assert suggest_rate(rates, [0.1, 2.0, 1.9, 1.5, 1.2, 1.4, 3.0, math.nan], 1) == pytest.approx(1e-3)


@pytest.mark.parametrize("losses", [[2.0, 2.1, 2.2], [2.0, math.nan], [2.0], []])
def test_a_loss_that_does_not_fall_suggests_nothing(losses):
    with pytest.raises(TrainingError, match="does not fall"):
        suggest_rate([1e-6, 1e-5, 1e-4], losses, 0)


@pytest.mark.parametrize("name", ["lr_find.csv", "lr_find.png"])
def test_files_of_others_are_not_replaced(name, tmp_path, capsys):
    (tmp_path / name).write_text("years of work")
    assert main([*SMOKE, *SMALL, "--out", str(tmp_path)]) == 2
    assert f"{name} is not of an earlier lr-find" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "years of work"


def test_too_few_steps_are_refused(capsys):
    assert main([*SMOKE, "--steps", "3"]) == 2
    assert "--steps: 3 is not allowed; expected a whole number >= 20" in capsys.readouterr().err


@pytest.mark.slow
def test_one_and_two_processes_suggest_the_same(launch, tmp_path):
    """A backbone without batch statistics, in fp32; a batch that two do not divide."""
    options = ["--model.backbone", "timm/convnext_atto", "--train.batch_size", "11", "--steps", "25"]
    found = []
    for recipe in (["cpu"], ["multi_cpu", "--num_processes", "2", "--main_process_port", "0"]):
        out = tmp_path / recipe[0]
        done = launch(*recipe, "-m", "dist_train", *SMOKE, "--data.count", "83", *options, "--out", str(out))
        assert done.stdout.count("suggested optim.lr") == 1
        found.append((suggestion(done.stdout), [row["loss"] for row in read_curve(out)]))
    (rate, losses), (same_rate, same_losses) = found
    assert same_rate == rate
    assert same_losses == pytest.approx(losses, rel=1e-3)
