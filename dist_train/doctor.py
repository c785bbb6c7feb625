"""Finds what usually goes wrong before a long job: `dist-train doctor`, alone or on every process of a launch.

In: the processes as a launcher started them, and the run folder to be. Out: one finding per check. Nothing here waits
without end: processes meet through torch's TCPStore first, and only when all are there they try an all-reduce.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dist_train.config import InputError
from dist_train.processes import check_launch
from dist_train.rendezvous import Finding, World, all_reduce, find_world, gather, meet, read
from dist_train.state import PACKAGES
from dist_train.tracking import has_wandb_login

GIB = 2**30
SHM_NEEDED = GIB // 2  # containers start with 64 MiB; NCCL and loading processes share memory through it
DISK_NEEDED = 2 * GIB  # a few checkpoints of ResNet18 and W&B's files

Facts = dict[str, Any]


def examine(run_dir: Path, wait: float = 60) -> tuple[list[Finding], bool]:
    """Return this process's findings and whether anything is bad on any; called on every process.

    Rank 0 reports for all; the others report only when they cannot reach it. wait: seconds for all to come.
    """
    try:
        check_launch()
        world = find_world()
    except InputError as error:
        return [Finding("processes", "bad", str(error), "see docs/launching.md for launches that work")], True
    facts = _collect(run_dir, world)
    try:
        if world.size == 1:
            findings = judge([facts])
        else:
            store, findings = meet(world, wait)
            if store is not None:
                return _examine_together(store, world, facts, wait)
            findings += judge([facts])
        return findings, _any_bad(findings)
    finally:
        with suppress(OSError):
            Path(facts["token"]).unlink()


# What each process finds by itself


def _collect(run_dir: Path, world: World) -> Facts:
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.is_dir()).absolute()
    token = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    fault = ""
    try:
        token.write_text("dist-train doctor looks whether all machines see this file\n")
    except OSError as error:
        fault = error.strerror or "cannot be written"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    shm = Path("/dev/shm")
    return {
        "rank": world.rank,
        "world_size": world.size,
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), "CUDA": torch.version.cuda, "NCCL": nccl}
        | {name: version(name) for name in PACKAGES},
        "gpus": torch.cuda.device_count(),
        "gpu": _gpu(world.local_rank),
        "nvidia": Path("/dev/nvidia0").exists(),
        "shm": shutil.disk_usage(shm).free if shm.is_dir() else None,
        "disk": shutil.disk_usage(folder).free,
        "folder": str(folder),
        "token": str(token),
        "fault": fault,
        "wandb": _wandb(),
    }


def _gpu(local_rank: int) -> str | None:
    """Return the identity of the GPU that a training would use on this process."""
    if local_rank >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(local_rank)
    return f"{properties.name} {properties.uuid}"


def _wandb() -> tuple[str, str]:
    """Return a verdict and what was found."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return "ok", f"WANDB_MODE is {mode}"
    if not has_wandb_login():
        return "warn", "no login: runs are kept offline"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    host, _, port = server.partition(":")
    try:
        socket.create_connection((host, int(port or 443)), timeout=5).close()
    except OSError as error:
        return "warn", f"a login, but {server} cannot be reached ({error}): runs are kept offline"
    return "ok", f"a login, and {server} answers"


# What they find together


def _examine_together(store: TCPStore, world: World, facts: Facts, wait: float) -> tuple[list[Finding], bool]:
    """Exchange the facts, try the all-reduce if all came, and report on rank 0."""
    me = f"doctor/{world.rank}"
    if store.add(f"{me}/count", 1) > 1:
        found = f"a second process says that it is rank {world.rank}"
        return [Finding("processes", "bad", found, "RANK: give each process its own, from 0 to WORLD_SIZE - 1")], True
    store.set(me, json.dumps(facts))
    findings: list[Finding] = []
    if world.rank == 0:
        came = [other for other in gather(store, world.size, "doctor/{}", wait) if other is not None]
        findings = [*_judge_processes(came, world.size), *judge(came)]
        together = len(came) == world.size and not any(f.verdict == "bad" and f.check == "GPUs" for f in findings)
        store.set("doctor/plan", json.dumps([other["token"] for other in came] if together else None))
    plan = read(store, "doctor/plan", 2 * wait)
    if plan:
        store.set(f"{me}/seen", json.dumps([other for other in plan if not Path(other).exists()]))
        speed = all_reduce(store, world, wait)
        if world.rank == 0:
            unseen = gather(store, world.size, "doctor/{}/seen", wait)  # None of a process that has left: not seen
            findings += [_judge_folder(came, [files != [] for files in unseen]), speed]
    if world.rank == 0:
        store.set("doctor/bad", json.dumps(_any_bad(findings)))
        with suppress(dist.DistError):  # the store ends with this process: let the others read first
            store.wait([f"doctor/{other['rank']}/left" for other in came[1:]], timedelta(seconds=10))
        return findings, _any_bad(findings)
    bad = read(store, "doctor/bad", 2 * wait)
    store.set(f"{me}/left", "")
    return [], bad is not False


# Verdicts


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """Return a finding for each check on the facts of the processes that came."""
    return [_judge_versions(facts), _judge_gpus(facts), *_judge_space(facts), _judge_wandb(facts)]


def _judge_processes(came: Sequence[Facts], size: int) -> list[Finding]:
    here = {facts["rank"] for facts in came}
    missing = [str(rank) for rank in range(size) if rank not in here]
    sizes = {facts["world_size"] for facts in came}
    if missing or len(sizes) > 1:
        said = _by_value(came, [facts["world_size"] for facts in came])
        found = f"{len(came)} came" + (f", without rank {', '.join(missing)}" if missing else "")
        remedy = "WORLD_SIZE: say on all how many processes are started, over all machines together, and start as many"
        return [Finding("processes", "bad", f"{found}; WORLD_SIZE is {said}", remedy)]
    return [Finding("processes", "ok", f"{size} on {len({facts['host'] for facts in came})} machine(s)")]


def _judge_versions(facts: Sequence[Facts]) -> Finding:
    remedy = "use the same environment on all machines (one image, or one folder on the shared file system)"
    for name in facts[0]["versions"]:
        if len({process["versions"][name] for process in facts}) > 1:
            said = _by_value(facts, [process["versions"][name] for process in facts])
            return Finding("versions", "bad", f"{name} is {said}", remedy)
    said = ", ".join(f"{name} {value}" for name, value in facts[0]["versions"].items() if value)
    return Finding("versions", "ok", said)


def _judge_gpus(facts: Sequence[Facts]) -> Finding:
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for process in facts:
        if process["gpu"]:
            users[process["host"], process["gpu"]].append(str(process["rank"]))
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            remedy = "start one process per GPU (--num_processes), and let CUDA_VISIBLE_DEVICES show each all of them"
            return Finding("GPUs", "bad", f"ranks {', '.join(ranks)} share one GPU of {host}: {gpu}", remedy)
    without = [str(process["rank"]) for process in facts if not process["gpu"]]
    if users and without:
        remedy = "start no more processes on a machine than it has GPUs; look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        return Finding("GPUs", "bad", f"ranks {', '.join(without)} have none, the others do", remedy)
    if any(process["nvidia"] and not process["gpus"] for process in facts):
        remedy = "install torch for CUDA, in the version that nvidia-smi names; look at CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "bad", "the machine has a GPU, but torch sees none", remedy)
    return Finding(
        "GPUs", "ok", "one each: " + "; ".join(gpu for _, gpu in users) if users else "none, so the CPU computes"
    )


def _judge_space(facts: Sequence[Facts]) -> list[Finding]:
    findings = []
    shared = min((process for process in facts if process["shm"] is not None), key=lambda p: p["shm"], default=None)
    if shared:
        remedy = "docker run --shm-size=2g; in Kubernetes an emptyDir with medium Memory at /dev/shm"
        findings.append(_judge_size("/dev/shm", shared, shared["shm"], SHM_NEEDED, remedy))
    least = min(facts, key=lambda process: process["disk"])
    remedy = "free space, or name another --run_dir"
    findings.append(_judge_size("disk", least, least["disk"], DISK_NEEDED, remedy, f" in {least['folder']}"))
    if any(process["fault"] for process in facts):
        said = _by_value(facts, [process["fault"] or "writable" for process in facts])
        findings.append(Finding("run folder", "bad", f"{facts[0]['folder']}: {said}", "name a --run_dir you may write"))
    return findings


def _judge_size(check: str, process: Facts, free: int, needed: int, remedy: str, where: str = "") -> Finding:
    found = f"{free / GIB:.2f} GiB free on {process['host']}{where}"
    if free >= needed:
        return Finding(check, "ok", found)
    return Finding(check, "bad", f"{found}; {needed / GIB:.1f} GiB are needed", remedy)


def _judge_wandb(facts: Sequence[Facts]) -> Finding:
    verdict, found = facts[0]["wandb"]  # only rank 0 talks to W&B
    if verdict == "ok":
        return Finding("W&B", verdict, found)
    return Finding("W&B", verdict, found, "wandb login, or set WANDB_API_KEY; afterwards, wandb sync uploads runs")


def _judge_folder(facts: Sequence[Facts], blind: Sequence[bool]) -> Finding:
    folder = facts[0]["folder"]
    if not any(blind):
        return Finding("shared folder", "ok", f"all processes see each other's files in {folder}")
    said = ", ".join(str(process["rank"]) for process, unseeing in zip(facts, blind, strict=True) if unseeing)
    remedy = "--run_dir: name a folder on a file system that all machines mount, at the same path"
    return Finding("shared folder", "bad", f"{folder}: ranks {said} do not see the files of others", remedy)


def _by_value(facts: Sequence[Facts], values: Sequence[Any]) -> str:
    """Return the distinct values with their ranks: 2 on rank 0, 3 on rank 1."""
    ranks: dict[str, list[str]] = defaultdict(list)
    for process, value in zip(facts, values, strict=True):
        ranks[str(value)].append(str(process["rank"]))
    return ", ".join(f"{value} on rank {' '.join(some)}" for value, some in ranks.items())


def _any_bad(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict == "bad" for finding in findings)
