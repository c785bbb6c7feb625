"""dist-train launch: which command it chooses where, what it refuses, and what becomes of signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.cli import main
from dist_train.launch import find_place, first_host

SLURM_STEP = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu-[007-008]",
    "SLURM_NODEID": "1",
}
TRAIN_JOB = {
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}
PYTORCH_JOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
TOGETHER = (
    "--multi_gpu --num_processes {} --num_machines {} --machine_rank {} --main_process_ip {} --main_process_port {} "
)
TOGETHER += "--rdzv_backend static --same_network "
FLAGS = "--mixed_precision no --dynamo_backend no"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that returns the printed command, for variables set and a number of GPUs."""

    def choose(*options: str, gpus: int = 0, code: int = 0, **variables: str) -> str:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        for name, value in {"OMP_NUM_THREADS": "1", **variables}.items():
            monkeypatch.setenv(name, value)
        assert main(["launch", "--dry-run", *options]) == code
        out, err = capsys.readouterr()
        return err if code else out.strip()

    return choose


@pytest.mark.parametrize(
    ("gpus", "options", "variables", "command"),
    [
        (0, [], {}, f"--cpu --num_processes 1 --num_machines 1 {FLAGS}"),
        (0, ["--processes", "2"], {}, f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 {FLAGS}"),
        (1, [], {}, f"--num_processes 1 --num_machines 1 {FLAGS} --gpu_ids all"),
        (8, [], {}, f"--multi_gpu --num_processes 8 --num_machines 1 --main_process_port 0 {FLAGS} --gpu_ids all"),
        (8, [], {"ACCELERATE_USE_CPU": "true"}, f"--cpu --num_processes 1 --num_machines 1 {FLAGS}"),
        (8, [], SLURM_STEP, TOGETHER.format(16, 2, 1, "gpu-007", 21234) + f"{FLAGS} --gpu_ids all"),
        (0, [], SLURM_STEP, TOGETHER.format(2, 2, 1, "gpu-007", 21234) + FLAGS),
        (4, [], TRAIN_JOB, TOGETHER.format(12, 3, 2, "job-node-0-0.job", 29400) + f"{FLAGS} --gpu_ids all"),
        (0, [], PYTORCH_JOB, TOGETHER.format(2, 2, 1, "job-master-0", 23456) + FLAGS),
        (
            1,
            ["--nodes=2"],
            {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "10.0.0.1"},
            TOGETHER.format(2, 2, 0, "10.0.0.1", 29500) + f"{FLAGS} --gpu_ids all",
        ),
    ],
)
def test_the_command_fits_the_place(chosen, gpus, options, variables, command):
    printed = chosen(*options, "--train.epochs", "3", gpus=gpus, **variables)
    assert printed == f"accelerate launch {command} -m dist_train train --train.epochs 3"


def test_the_rest_belongs_to_the_command_that_is_started(chosen):
    assert chosen("--", "doctor", "--wait", "5").endswith("-m dist_train doctor --wait 5")
    assert chosen("--run_dir", "runs/a b", "--precision", "bf16").endswith(
        "-m dist_train train --run_dir 'runs/a b' --train.precision bf16"
    )
    assert "--tee 3 --log_dir logs/node0" in chosen("--processes=2", "--log_dir", "logs")


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        (["--processes", "0"], {}, "--processes: '0' is not allowed; expected auto or a whole number"),
        (["--processes", "9"], {}, "--processes: 9 on a machine with 8 GPUs"),
        (["--nodes", "2"], {}, "PET_MASTER_ADDR"),
        ([], {"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "--nodes: 2 machines"),
        (["--nodes", "1"], SLURM_STEP, "--nodes: 1 machines, but SLURM says 2"),
        (["--nodes", "1"], TRAIN_JOB, "--nodes: 1 machines, but PET_NNODES says 3"),
        ([], SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "one per node is wanted"),
        ([], {"SLURM_JOB_NUM_NODES": "2"}, "put srun before it"),
        ([], {"LOCAL_RANK": "0"}, "inside another launcher"),
        ([], {"OMPI_COMM_WORLD_SIZE": "2"}, "inside another launcher"),
        ([], {"PET_NNODES": "2", "PET_MASTER_ADDR": "a"}, "PET_NODE_RANK: missing"),
        ([], {"PET_NNODES": "1:4"}, "PET_NNODES: '1:4' is not allowed"),
        ([], PYTORCH_JOB | {"RANK": "2"}, "RANK: 2 is not one of 2 machines"),
        (["--train.epochs", "0"], {}, "train.epochs"),
        (["--trian.epochs", "1"], {}, "trian.epochs: no such key"),
        (["launch"], {}, "cannot launch itself"),
    ],
)
def test_what_would_go_wrong_is_refused_in_one_line(chosen, options, variables, words):
    err = chosen(*options, gpus=8, code=2, **variables)
    assert words in err
    assert err.startswith("dist-train: error: ") and err.count("\n") == 1


def test_the_first_host_of_a_list():
    hosts = {"a": "a", "a,b": "a", "gpu-[007-009,12],login": "gpu-007", "r[1-2]n[03,5]-x": "r1n03-x", "": ""}
    assert {nodelist: first_host(nodelist) for nodelist in hosts} == hosts


def test_a_place_without_variables_is_this_machine():
    assert find_place({}).nodes == 1


PROGRAM = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ.get("LOCAL_RANK", "0")), pathlib.Path(sys.argv[1])
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
(folder / f"ready{rank}").touch()
while not seen:
    time.sleep(0.05)
time.sleep(2 - 2 * rank)  # rank 0 takes longer to save
(folder / f"saved{rank}").write_text(seen[0])
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGUSR1, 2)])
def test_a_signal_reaches_every_process_and_their_exit_code_comes_back(tmp_path: Path, processes, number):
    (tmp_path / "program.py").write_text(PROGRAM)
    kind = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = ["accelerate", "launch", *kind, "--num_processes", str(processes), "--num_machines", "1", *FLAGS.split()]
    start = "import sys; from dist_train.launch import run; sys.exit(run(sys.argv[1:]))"
    launched = subprocess.Popen([sys.executable, "-c", start, *command, "program.py", str(tmp_path)], cwd=tmp_path)
    end = time.monotonic() + 100
    while len(list(tmp_path.glob("ready*"))) < processes:
        assert time.monotonic() < end and launched.poll() is None
        time.sleep(0.1)
    launched.send_signal(number)
    assert launched.wait(60) == 75
    passed_on = "SIGUSR1" if number == signal.SIGUSR1 else "SIGTERM"
    assert [file.read_text() for file in sorted(tmp_path.glob("saved*"))] == [passed_on] * processes
