"""Processes that meet before a training does, with every wait bounded: what `dist-train doctor` knows of the network.

In: the variables that a launcher set. Out: torch's TCPStore that all share, or a finding that says why not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dist_train.config import InputError

SLOWEST = 0.1e9  # bytes/s: ResNet18's gradients then take half a second per step
ELEMENTS = 2**23  # float32, together 32 MiB, about the gradients of ResNet18
ROUNDS = 4


class Finding(NamedTuple):
    """One line of the table; verdict: ok, warn (works, but look) or bad (fix it first)."""

    check: str
    verdict: str
    found: str
    remedy: str = ""


class World(NamedTuple):
    """This process among all, as the launcher's variables say."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int


def find_world() -> World:
    """Return what the launcher's variables say; InputError if they contradict themselves."""
    values = {}
    for name, default in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        values[name] = os.environ.get(name, default)
        if not values[name].isdecimal():
            raise InputError(f"{name}: {values[name]!r} is not a whole number")
    rank, size, local_rank, port = (int(value) for value in values.values())
    if rank >= size:
        raise InputError(f"RANK: {rank} is not one of WORLD_SIZE {size} processes (0 to {size - 1})")
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"MASTER_ADDR: missing, but WORLD_SIZE is {size}")
    return World(rank, size, local_rank, os.environ.get("MASTER_ADDR", ""), port)


def meet(world: World, wait: float) -> tuple[TCPStore | None, list[Finding]]:
    """Return the store of rank 0, or None and why it cannot be reached."""
    place = f"{world.host}:{world.port}"
    serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    fault = None if serves else _knock(world, place, wait)
    if fault is None:
        try:
            limit = timedelta(seconds=wait)
            return TCPStore(world.host, world.port, None, is_master=serves, timeout=limit, wait_for_workers=False), []
        except (dist.DistError, OSError) as error:
            remedy = "choose another MASTER_PORT that is free on the machine of rank 0, the same on all machines"
            fault = Finding("meeting rank 0", "bad", f"{place}: {_one_line(error)}", remedy)
    return None, [fault]


def _knock(world: World, place: str, wait: float) -> Finding | None:
    """Wait until rank 0 listens; return what is wrong if it does not."""
    end = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((world.host, world.port), timeout=min(wait, 10)).close()
            return None
        except socket.gaierror:
            found = f"{world.host} is no known host"
            return Finding("meeting rank 0", "bad", found, "MASTER_ADDR: name the machine of rank 0 or its IP address")
        except ConnectionRefusedError:
            fault = Finding(
                "meeting rank 0",
                "bad",
                f"{world.host} answers, but port {world.port} is closed",
                "start rank 0 as well, with the same MASTER_PORT, and open that port in firewall or network policy",
            )
        except OSError as error:
            fault = Finding(
                "meeting rank 0",
                "bad",
                f"{place} cannot be reached ({error})",
                "MASTER_ADDR: name the machine of rank 0 as this one sees it; check network, routes and firewall",
            )
        if time.monotonic() > end:
            return fault
        time.sleep(0.2)


def gather(store: TCPStore, size: int, key: str, wait: float) -> list[Any]:
    """Return what each process wrote under `key`, None for those that did not come in time."""
    end = time.monotonic() + wait
    return [read(store, key.format(rank), max(0.1, end - time.monotonic())) for rank in range(size)]


def read(store: TCPStore, key: str, wait: float) -> Any:
    try:
        store.wait([key], timedelta(seconds=wait))
        return json.loads(store.get(key))
    except dist.DistError:
        return None


def all_reduce(store: TCPStore, world: World, wait: float) -> Finding:
    """Add up a tensor over all processes, several times; judge sum and speed."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    remedy = f"{backend.upper()}_SOCKET_IFNAME: name the network interface that joins the machines" + (
        "; NCCL_DEBUG=INFO says more" if on_gpu else ""
    )
    try:
        limit = timedelta(seconds=wait)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # else NCCL ends the process after too long a wait
        group = PrefixStore("doctor/group", store)
        dist.init_process_group(backend, store=group, rank=world.rank, world_size=world.size, timeout=limit)
        for number in range(ROUNDS + 1):
            if number == 1:  # the first one connects
                started = time.perf_counter()
            numbers = torch.ones(ELEMENTS, device=device)
            dist.all_reduce(numbers)
            right = bool((numbers == world.size).all())
        seconds = (time.perf_counter() - started) / ROUNDS
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        return Finding("all-reduce", "bad", f"{backend}: {_one_line(error)}", remedy)
    moved = 2 * (world.size - 1) / world.size * ELEMENTS * 4  # bytes that a ring sends and receives per process
    found = f"{backend}, {ELEMENTS * 4 // 2**20} MiB in {seconds * 1000:.0f} ms: {moved / seconds / 1e9:.2f} GB/s"
    if not right:
        return Finding("all-reduce", "bad", f"{backend}: the sum is wrong", "test memory and network of the machines")
    slow = moved / seconds < SLOWEST
    return Finding("all-reduce", "warn" if slow else "ok", found, remedy if slow else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
