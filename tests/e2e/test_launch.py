"""Real launches: accelerate launch with one, two and three processes (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from wandb_file import KEYS, find_runs, read_history

SMOKE = ("-m", "dist_train", "train", *SMALL)
PORT = ("--main_process_port", "0")


def summary(run_dir) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_a_fixed_model_has_the_same_accuracy_on_1_2_and_3_processes(launch, tmp_path):
    found = {}
    for count in (1, 2, 3):
        recipe = ("cpu",) if count == 1 else ("multi_cpu", "--num_processes", str(count), *PORT)
        launch(*recipe, str(ROOT / "tests/e2e/fixed_model.py"), str(tmp_path / f"{count}.json"))
        found[count] = json.loads((tmp_path / f"{count}.json").read_text())
        assert found[count]["processes"] == count
    for count, result in found.items():
        for (accuracy, loss, samples, confusion), same in zip(result["figures"], found[1]["figures"], strict=True):
            assert samples == 101, count
            assert [accuracy, confusion] == [same[0], same[3]], count
            assert loss == pytest.approx(same[1], abs=1e-6), count


def test_training_losses_agree_step_by_step_on_1_2_and_3_processes(launch, tmp_path):
    """A backbone without batch statistics, in fp32; data and batches that neither 2 nor 3 divides."""
    losses = {}
    for count in (1, 2, 3):
        recipe = ("cpu",) if count == 1 else ("multi_cpu", "--num_processes", str(count), *PORT)
        run_dir = tmp_path / str(count)
        launch(
            *recipe,
            *SMOKE,
            "--run_dir",
            str(run_dir),
            "--model.backbone",
            "timm/test_convnext",
            "--data.count",
            "83",
            "--train.batch_size",
            "11",
            "--track.log_every",
            "1",
            "--train.mixup",
            "0.2",
            "--optim.lr",
            "0.01",
        )
        assert summary(run_dir)["world_size"] == count
        (file,) = find_runs(run_dir)
        history = read_history(file)
        losses[count] = [row["train/loss"] for row in history if "train/loss" in row]
        losses[count] += [row["valid/loss"] for row in history if "valid/loss" in row]
    assert len(losses[1]) == 14
    for count in (2, 3):
        assert losses[count] == pytest.approx(losses[1], abs=1e-4)


def test_two_processes_stream_one_wandb_run_with_falling_loss(launch, tmp_path):
    run_dir = tmp_path / "run"
    done = launch(
        "multi_cpu",
        "--num_processes",
        "2",
        *PORT,
        *SMOKE,
        "--run_dir",
        str(run_dir),
        "--data.count",
        "84",  # few enough to be learnt by heart in seconds
        "--train.epochs",
        "20",
        "--train.max_steps",
        "60",
        "--optim.name",
        "adamw",
        "--optim.lr",
        "0.002",
    )
    (file,) = find_runs(run_dir)
    history = read_history(file)
    keys = {key for row in history for key in row}
    assert keys >= KEYS | {"curves", "confusion_matrix", "predictions", "misclassified"}
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/misclassified*.table.json")
    assert json.loads(table.read_text())["columns"][:2] == ["image", "saliency"]
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert done.stderr.count("epoch 1/20:") == 1  # only the main process speaks
    cores = len(os.sched_getaffinity(0))
    assert (summary(run_dir)["world_size"], summary(run_dir)["threads"]) == (2, max(1, cores // 2))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpu", "multi_gpu", "fsdp"])
def test_every_recipe_of_one_machine_trains_here(launch, tmp_path, recipe):
    """Without a GPU, the recipes of GPUs start gloo processes on the CPU."""
    world_size = 1 if recipe == "gpu" else 2
    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        pytest.skip("needs no GPU, or two")
    run_dir = tmp_path / "run"
    processes = ("--num_processes", "2", *PORT) if world_size == 2 else ()
    launch(recipe, *processes, *SMOKE, "--run_dir", str(run_dir), "--track.tool", "none")
    assert summary(run_dir)["world_size"] == world_size
    if len(os.sched_getaffinity(0)) == os.cpu_count():  # accelerate launch counts cores, not those it may use
        assert summary(run_dir)["threads"] == max(1, os.cpu_count() // world_size)


@pytest.mark.slow
def test_dist_train_launch_starts_one_training_on_two_processes(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dist_train", "launch", "--processes", "2", "--log_dir", str(tmp_path / "logs")]
    command += [*SMOKE[2:], "--run_dir", str(run_dir), "--track.tool", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("accelerate launch --multi_gpu --num_processes 2 ")
    assert summary(run_dir)["world_size"] == 2
    assert {file.parent.name for file in (tmp_path / "logs").rglob("stderr.log")} == {"0", "1"}


def test_launches_that_start_fewer_processes_than_asked_are_refused(launch, tmp_path):
    (tmp_path / "multi_cpu.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: true\n"
    )
    for options in (("--cpu", "--num_processes", "2"), ("--config_file", str(tmp_path / "multi_cpu.yaml"))):
        done = launch(None, *options, *SMOKE, "--run_dir", str(tmp_path / "run"), succeeds=False)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist-train: error:")]
        assert "asked for several processes but started one" in line
        assert "exit status 2" in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "ACCELERATE_NUM_PROCESSES"])
def test_a_number_of_processes_that_was_not_found_is_refused(smoke, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    smoke("run", code=2)
    assert name in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_resumes_on_two_and_on_one(launch, tmp_path):
    """In the middle of an epoch, with a backbone without batch statistics."""
    options = ("--model.backbone", "timm/test_convnext", "--optim.lr", "0.01", "--track.tool", "none")
    whole = tmp_path / "whole"
    saves = ("--save.every_steps", "5", "--save.keep", "9")
    launch("multi_cpu", *PORT, *SMOKE, *options, *saves, "--run_dir", str(whole))
    checkpoint = ("--resume", str(whole / "checkpoints" / "step_00000005"))
    launch("multi_cpu", *PORT, *SMOKE, *options, *checkpoint, "--run_dir", str(tmp_path / "two"))
    launch("cpu", *SMOKE, *options, *checkpoint, "--run_dir", str(tmp_path / "one"))
    for name in ("final_train_loss", "final_valid_loss", "final_train_acc"):
        assert summary(tmp_path / "two")[name] == summary(whole)[name]
        assert summary(tmp_path / "one")[name] == pytest.approx(summary(whole)[name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [("cpu",), ("multi_cpu", *PORT)], ids=["one process", "two processes"])
def test_a_compiled_model_trains_alike(launch, tmp_path, recipe):
    losses = []
    for compiled in ("false", "true"):
        run_dir = tmp_path / compiled
        options = ("--optim.lr", "0.001", "--track.tool", "none")
        launch(*recipe, *SMOKE, *options, "--run_dir", str(run_dir), "--train.compile", compiled)
        losses.append(summary(run_dir)["final_train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.slow
def test_bf16_reaches_the_accuracy_of_fp32(tmp_path):
    accuracy = {}
    for precision in ("no", "bf16"):
        run_dir = tmp_path / precision
        command = [
            sys.executable,
            "-m",
            "dist_train",
            "train",
            "--run_dir",
            str(run_dir),
            "--data.count",
            "2000",
            "--data.source",
            "synthetic",
            "--model.backbone",
            "timm/resnet10t",
            "--model.pretrained",
            "false",
            "--train.epochs",
            "6",
            "--optim.name",
            "adamw",
            "--optim.lr",
            "0.002",
            "--train.batch_size",
            "64",
            "--track.tool",
            "none",
            "--train.precision",
            precision,
        ]
        assert subprocess.run(command, timeout=900).returncode == 0
        assert summary(run_dir)["precision"] == precision
        accuracy[precision] = summary(run_dir)["best_valid_acc"]
    assert accuracy["no"] > 0.85
    assert accuracy["bf16"] == pytest.approx(accuracy["no"], abs=0.04)
