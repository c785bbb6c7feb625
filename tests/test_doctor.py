"""dist-train doctor: faults planted for real where this machine allows it, each found with its remedy."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import may_unshare
from torch.distributed import TCPStore

from dist_train.doctor import judge
from dist_train.rendezvous import gather

needs_root = pytest.mark.skipif(not may_unshare(), reason="needs root: unshare --mount, unshare --net")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def doctor(
    tmp_path: Path, *options: str, mount: str = "", network: bool = True, **variables: object
) -> subprocess.Popen[str]:
    """Start one doctor, with variables of its own, in mount and network namespaces of its own where asked for."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "dist_train", "doctor", "--run_dir", str(tmp_path / "runs"), *options]
    if mount:
        command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    if not network:
        command = ["unshare", "--net", *command]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str], code: int) -> dict[str, tuple[str, str]]:
    """Return verdict and text (found and remedy) by check."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    findings: dict[str, tuple[str, str]] = {}
    for line in out.splitlines():
        if start := re.match(r"(ok|warn|bad) +(\S+(?: \S+)*?)  +(.*)", line):
            check = start[2]
            findings[check] = (start[1], start[3])
        else:
            verdict, text = findings[check]
            findings[check] = (verdict, f"{text} {line.strip()}")
    return findings


def test_who_does_not_answer_in_time_is_waited_for_once():
    store = TCPStore("127.0.0.1", free_port(), is_master=True)
    store.set("seen/1", "[]")
    started = time.monotonic()
    assert gather(store, 4, "seen/{}", 1.0) == [None, [], None, None]
    assert time.monotonic() - started < 2


def test_a_machine_alone_is_well_but_for_the_missing_wandb_key(tmp_path):
    found = finish(doctor(tmp_path), 0)
    assert {check: verdict for check, (verdict, _) in found.items()} == {
        "versions": "ok",
        "GPUs": "ok",
        "/dev/shm": "ok",
        "disk": "ok",
        "W&B": "warn",
    }
    assert "remedy: wandb login, or set WANDB_API_KEY" in found["W&B"][1]
    assert not list(tmp_path.glob(".doctor*"))


@pytest.mark.slow
@needs_root
def test_tiny_shared_memory_and_a_full_disk_are_found(tmp_path):
    mount = f"mount -t tmpfs -o size=64m none /dev/shm && mount -t tmpfs -o size=100m none {tmp_path}"
    found = finish(doctor(tmp_path, mount=mount), 1)
    assert found["/dev/shm"][0] == "bad" and "--shm-size" in found["/dev/shm"][1]
    assert found["disk"][0] == "bad" and "free space, or name another --run_dir" in found["disk"][1]


@pytest.mark.slow
def test_a_closed_port_is_found(tmp_path):
    world = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    verdict, text = finish(doctor(tmp_path, "--wait", "1", **world), 1)["meeting rank 0"]
    assert verdict == "bad"
    assert re.search(r"answers, but port \d+ is closed .*open that port in firewall", text)


@pytest.mark.slow
@needs_root
def test_an_unreachable_master_is_found(tmp_path):
    for host, words in (("192.0.2.1", "cannot be reached"), ("no-such.invalid", "is no known host")):
        world = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": host}
        verdict, text = finish(doctor(tmp_path, "--wait", "1", network=False, **world), 1)["meeting rank 0"]
        assert verdict == "bad"
        assert words in text and "MASTER_ADDR: name the machine of rank 0" in text


@pytest.mark.slow
def test_a_wrong_world_size_and_unlike_versions_are_found(tmp_path):
    """Two processes come, one of which waits for three and finds an older timm."""
    metadata = tmp_path / "older" / "timm-0.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9.0\n")
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first = doctor(tmp_path, "--wait", "20", RANK=0, WORLD_SIZE=3, **world)
    second = doctor(tmp_path, "--wait", "20", RANK=1, WORLD_SIZE=2, PYTHONPATH=metadata.parents[1], **world)
    found = finish(first, 1)
    assert finish(second, 1) == {}  # rank 0 speaks for all
    verdict, text = found["processes"]
    assert verdict == "bad"
    assert "2 came, without rank 2; WORLD_SIZE is 3 on rank 0, 2 on rank 1 remedy: WORLD_SIZE: say on all" in text
    verdict, text = found["versions"]
    assert verdict == "bad"
    assert re.search(r"timm is \S+ on rank 0, 0.9.0 on rank 1 remedy: use the same environment", text)
    assert "all-reduce" not in found


@pytest.mark.slow
@needs_root
def test_processes_that_are_well_measure_the_network_and_find_an_unshared_folder(tmp_path):
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    first = doctor(tmp_path, RANK=0, **world)
    second = doctor(tmp_path, RANK=1, mount=f"mount -t tmpfs -o size=3g none {tmp_path}", **world)
    found = finish(first, 1)
    assert finish(second, 1) == {}
    verdict, text = found["all-reduce"]
    assert verdict in ("ok", "warn") and re.search(r"gloo, 32 MiB in \d+ ms: \d+\.\d\d GB/s", text)
    verdict, text = found["shared folder"]
    assert verdict == "bad" and "--run_dir: name a folder on a file system that all machines mount" in text
    assert found["processes"] == ("ok", "2 on 1 machine(s)")


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_for_several_is_found(tmp_path):
    process = doctor(tmp_path, ACCELERATE_MIXED_PRECISION="no", MASTER_ADDR="127.0.0.1")
    verdict, text = finish(process, 1)["processes"]
    assert verdict == "bad" and "started one" in text and "remedy: see docs/launching.md" in text


def test_two_ranks_on_one_gpu_are_found():
    """From the facts that two processes gathered: without a GPU they cannot gather them here."""

    def facts(rank: int, gpu: str | None) -> dict:
        common = {"world_size": 2, "host": "a", "versions": {}, "gpus": 1, "nvidia": True, "shm": None}
        return common | {"rank": rank, "gpu": gpu, "disk": 2**40, "folder": "runs", "fault": "", "wandb": ("ok", "")}

    by_check = {finding.check: finding for finding in judge([facts(0, "H100 GPU-1"), facts(1, "H100 GPU-1")])}
    assert by_check["GPUs"].verdict == "bad"
    assert "ranks 0, 1 share one GPU of a" in by_check["GPUs"].found
    assert "start one process per GPU" in by_check["GPUs"].remedy
    well = {finding.check: finding for finding in judge([facts(0, "H100 GPU-1"), facts(1, "H100 GPU-2")])}
    assert well["GPUs"].verdict == "ok"
    some = {finding.check: finding for finding in judge([facts(0, "H100 GPU-1"), facts(1, None)])}
    assert some["GPUs"].verdict == "bad" and "ranks 1 have none" in some["GPUs"].found
