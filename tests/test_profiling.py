from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from training import SMALL

from dist_train.profiling import PARTS, STEPS

PROFILE = ("--model.backbone", "timm/test_resnet", "--train.profile", "true")


def table(run_dir: Path) -> dict[str, float]:
    """Return profile.csv's milliseconds by part."""
    with (run_dir / "profile.csv").open() as file:
        return {row["part"]: float(row["ms_per_step"]) for row in csv.DictReader(file)}


def traced(run_dir: Path) -> list[dict]:
    """Return the regions of trace.json: the steps and the parts that train() names."""
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation"]


@pytest.mark.parametrize("accumulation", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_the_parts_add_up_to_the_steps_of_the_trace(smoke, capsys, accumulation):
    options = ("--train.max_steps", "16", "--train.gradient_accumulation", accumulation)
    run_dir = smoke("run", *PROFILE, *options)
    parts, regions = table(run_dir), traced(run_dir)
    assert list(parts) == [*PARTS, "step", "reduce hidden by backward"]
    assert parts["reduce"] == parts["reduce hidden by backward"] == 0  # one process
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["step"], abs=0.01)
    steps = [region["dur"] / 1000 for region in regions if region["name"].startswith("ProfilerStep")]
    outside = [region["dur"] / 1000 for region in regions if region["name"] == "validation"]
    assert len(steps) == STEPS["active"] and len(outside) == 1  # an epoch has 12 steps
    assert parts["step"] == pytest.approx((sum(steps) - sum(outside)) / len(steps), rel=0.1, abs=1)
    assert {region["name"] for region in regions} >= set(PARTS) - {"reduce"}
    said = capsys.readouterr().err
    assert "profile of 10 steps" in said and "trace.json and" in said


@pytest.mark.slow
def test_a_training_of_few_steps_is_recorded_as_far_as_it_goes(smoke, capsys):
    run_dir = smoke("some", *PROFILE, "--train.max_steps", "8")
    assert "profile of 3 steps" in capsys.readouterr().err
    assert table(run_dir)["step"] > 0
    for steps in ("4", "5"):
        run_dir = smoke(steps, *PROFILE, "--train.max_steps", steps)
        assert "ended before its step 6, nothing was recorded" in capsys.readouterr().err
        assert not (run_dir / "trace.json").exists()
    assert not (smoke("plain", "--model.backbone", "timm/test_resnet") / "trace.json").exists()


@pytest.mark.slow
def test_two_processes_wait_for_their_all_reduces(launch, tmp_path):
    run_dir = tmp_path / "run"
    place = ("--num_processes", "2", "--main_process_port", "0")
    options = ("--run_dir", str(run_dir), "--track.tool", "none", "--train.max_steps", "16", *PROFILE)
    done = launch("multi_cpu", *place, "-m", "dist_train", "train", *SMALL, *options)
    parts = table(run_dir)
    assert parts["reduce"] > 0 and parts["backward"] > 0
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["step"], abs=0.01)
    assert done.stderr.count("profile of") == 1
