"""launch/slurm/train.sbatch on a real SLURM cluster: two virtual nodes on this machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, may_unshare
from wandb_file import find_runs, read_history, read_run_id

CLUSTER = Path(__file__).parent / "slurm" / "cluster.sh"
PLACE = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
TRAINING = (
    "--config",
    str(ROOT / "configs/smoke.yaml"),
    "--model.backbone",
    "timm/resnet10t",
    "--train.epochs",
    "4",
    "--train.max_steps",
    "48",
    "--track.log_every",
    "1",
    "--track.wandb",
    "offline",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") or not may_unshare(),
        reason="needs root and SLURM: apt-get install slurm-wlm munge",
    ),
]


def shell(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster, and a folder to submit from that holds launch/."""
    cluster = tmp_path / "cluster"
    monkeypatch.setenv("SLURM_CONF", str(cluster / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "launch", "launch")
    try:
        # its daemons keep what they inherit: no pipes
        subprocess.run([CLUSTER, "start", cluster], check=True, timeout=60)
        yield
    finally:
        subprocess.run([CLUSTER, "stop", cluster], check=True, timeout=60)


def submit(*place: str, run_dir: str | None = None) -> str:
    """Submit the recipe with sbatch's options `place` and return the job."""
    folder = ("--run_dir", run_dir) if run_dir else ()
    return shell("sbatch", "--parsable", *PLACE, *place, "launch/slurm/train.sbatch", *TRAINING, *folder).strip()


def show(job: str) -> dict[str, str]:
    """Return what SLURM knows of a job."""
    return dict(pair.split("=", 1) for pair in shell("scontrol", "show", "job", job).split() if "=" in pair)


def wait_until(condition: Callable[[], bool], seconds: float, log: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, Path(log).read_text()[-4000:] if Path(log).exists() else f"no {log}"
        time.sleep(0.5)


def losses(run_dir: Path) -> tuple[list[list[str]], dict[int, float], set[str]]:
    """Return the epochs' losses and accuracies, the loss of each step, and the ids of the W&B runs."""
    with (run_dir / "history.csv").open() as file:
        epochs = [list(row.values())[:5] for row in csv.DictReader(file)]
    runs = find_runs(run_dir)
    steps = {row["step"]: row["train/loss"] for run in runs for row in read_history(run) if "train/loss" in row}
    return epochs, steps, {read_run_id(run) for run in runs}


@pytest.mark.usefixtures("slurm")
def test_a_signalled_job_saves_is_queued_again_and_finishes_as_if_undisturbed():
    whole, cut = Path("runs/whole"), Path("runs/cut")
    job = submit(run_dir=str(whole))
    wait_until(lambda: show(job)["JobState"] == "COMPLETED", 300, f"dist_train-{job}.log")
    assert json.loads((whole / "summary.json").read_text())["world_size"] == 2

    job = submit(run_dir=str(cut))
    log = f"dist_train-{job}.log"
    wait_until((cut / "history.csv").exists, 240, log)
    shell("scancel", "--signal=USR1", job)
    wait_until(lambda: show(job)["Restarts"] == "1", 60, log)
    assert not (cut / "summary.json").exists()
    assert list((cut / "checkpoints").glob("step_*"))
    wait_until(lambda: show(job)["JobState"] == "PENDING", 60, log)
    shell("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM lets a job that it queues again wait for 2 min
    wait_until(lambda: show(job)["JobState"] == "COMPLETED", 300, log)

    assert "resumed from" in Path(log).read_text()
    epochs, steps, ids = losses(whole)
    assert len(epochs) == 4 and len(steps) == 48 and len(ids) == 1
    again, same, one = losses(cut)
    assert again == epochs
    assert same == steps
    assert len(one) == 1
    assert {file.parent.name for file in Path("logs", job).rglob("stderr.log")} == {"0"}
    assert {file.name for file in Path("logs", job).iterdir()} == {"node0", "node1"}


@pytest.mark.usefixtures("slurm")
def test_an_array_trains_once_for_each_line_of_the_sweep():
    Path("launch/slurm/sweep.txt").write_text(
        "--optim.lr 0.01 --train.max_steps 2\n--optim.lr 0.02 --train.max_steps 2\n"
    )
    options = ("--track.tool", "none")
    job = shell("sbatch", "--parsable", "--array=1-2", *PLACE, "launch/slurm/train.sbatch", *TRAINING, *options).strip()
    wait_until(lambda: not shell("squeue", "-h", "-u", "root"), 240, f"dist_train-{job}.log")
    rates = {folder.joinpath("config.yaml").read_text().split("\n  lr: ")[1][:4] for folder in Path("runs").iterdir()}
    assert rates == {"0.01", "0.02"}
