"""The multi_node recipe over a real network: two network namespaces, joined by a cable, as two machines."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import SMALL, accelerate_launch, may_unshare
from training import find_trainings

MACHINES = ("dist_train_a", "dist_train_b")
LINK = "cable0"
LONGEST_WAIT = 20  # seconds for DIST_TRAIN_TIMEOUT
TRAINING = (*SMALL, "--train.epochs", "8", "--train.max_steps", "96", "--track.tool", "none")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("ip") or not may_unshare(), reason="needs root and iproute2: ip netns"),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two machines, 10.77.0.1 and 10.77.0.2."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", LINK)
    monkeypatch.setenv("DIST_TRAIN_TIMEOUT", str(LONGEST_WAIT))
    try:
        for machine in MACHINES:
            ip("netns", "add", machine)
        ends = [["name", LINK, "netns", machine] for machine in MACHINES]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, machine in enumerate(MACHINES, start=1):
            ip("-n", machine, "address", "add", f"10.77.0.{number}/24", "dev", LINK)
            ip("-n", machine, "link", "set", "lo", "up")
            ip("-n", machine, "link", "set", LINK, "up")
        yield
    finally:
        for machine in MACHINES:
            subprocess.run(["ip", "netns", "delete", machine], timeout=20)


def cable(state: str) -> None:
    """Plug the cable in (up) or out (down)."""
    ip("-n", MACHINES[1], "link", "set", LINK, state)


def start(run_dir: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Start the training on both machines."""
    commands = [
        accelerate_launch(
            "multi_node",
            *("--num_processes", "2", "--main_process_ip", "10.77.0.1", "--machine_rank", str(rank)),
            *("-m", "dist_train", "train", *TRAINING, "--run_dir", str(run_dir), *options),
        )
        for rank in range(2)
    ]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", machine, *command], cwd=run_dir.parent, stderr=subprocess.PIPE, text=True
        )
        for machine, command in zip(MACHINES, commands, strict=True)
    ]


def finish(machines: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Return what each machine wrote; kill what has not ended in time."""
    try:
        return [machine.communicate(timeout=seconds)[1] for machine in machines]
    finally:
        for child in find_trainings(psutil.Process(), recursive=True):
            child.kill()


def wait_for_an_epoch(run_dir: Path, machines: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 240
    while not (run_dir / "history.csv").exists():
        assert time.monotonic() < end and all(machine.poll() is None for machine in machines), finish(machines, 1)
        time.sleep(0.2)
    assert not (run_dir / "summary.json").exists()


def losses(run_dir: Path) -> list[list[str]]:
    with (run_dir / "history.csv").open() as file:
        return [list(row.values())[:5] for row in csv.DictReader(file)]


@pytest.mark.usefixtures("network")
def test_a_cable_pulled_for_a_while_is_sat_out_and_for_good_ends_both_machines_in_time(tmp_path):
    sat_out = tmp_path / "sat_out"
    machines = start(sat_out)
    wait_for_an_epoch(sat_out, machines)
    cable("down")
    time.sleep(5)
    assert not (sat_out / "summary.json").exists()
    cable("up")
    finish(machines, 240)
    assert [machine.returncode for machine in machines] == [0, 0]
    assert json.loads((sat_out / "summary.json").read_text())["world_size"] == 2

    ended = tmp_path / "ended"
    machines = start(ended)
    wait_for_an_epoch(ended, machines)
    cable("down")
    pulled = time.monotonic()
    errors = finish(machines, LONGEST_WAIT + 60)
    assert time.monotonic() - pulled > LONGEST_WAIT - 5
    assert [machine.returncode for machine in machines] == [1, 1]
    for text in errors:
        assert "has lost contact" in text and "--resume auto" in text
    assert not (ended / "summary.json").exists()

    cable("up")
    machines = start(ended, "--resume", "auto")
    finish(machines, 240)
    assert [machine.returncode for machine in machines] == [0, 0]
    assert len(losses(sat_out)) == 8
    assert losses(ended) == losses(sat_out)
