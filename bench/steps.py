"""Seconds of training steps in real processes, each on one core: what scaling.py predicts from and is checked with.

    python bench/steps.py ROLE ...    one process, as scaling.py starts it; prints JSON

Steps with and without the all-reduce take turns, a barrier before each, so that whatever else keeps the machine busy
slows both alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dist_train.data.images import load_splits
from dist_train.options import train_config
from dist_train.processes import build_accelerator
from dist_train.run import build_parts

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BUCKETS = (2**20, 25 * 2**20)  # bytes of DDP's first bucket and of the others
ADDRESSES = ("10.123.45.1", "10.123.45.2")  # of the two namespaces
CORES = sorted(os.sched_getaffinity(0))


class Step(NamedTuple):
    """One process's step: seconds; `ready`: seconds into the backward pass and bytes of each bucket."""

    before: float
    backward: float
    after: float
    ready: list[tuple[float, int]]

    @property
    def seconds(self) -> float:
        return self.before + self.backward + self.after

    def scaled(self, factor: float, size: float = 1.0) -> Step:
        """Return this step with `factor` times the seconds and `size` times the bytes."""
        ready = [(factor * when, int(size * count)) for when, count in self.ready]
        return Step(factor * self.before, factor * self.backward, factor * self.after, ready)


class Link(NamedTuple):
    """bandwidth: bytes/s each way; latency: seconds per message; host: seconds of computing time per byte sent."""

    bandwidth: float
    latency: float
    host: float = 0.0


def read_step(stored: list[Any]) -> Step:
    """Return the Step that JSON holds as a list."""
    before, backward, after, ready = stored
    return Step(before, backward, after, [(when, size) for when, size in ready])


def fill_buckets(gradients: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Put gradients (second, bytes), in the order of their coming, into buckets as DDP does; return those."""
    buckets: list[tuple[float, int]] = []
    filled = 0
    for when, size in gradients:
        filled += size
        if filled >= BUCKETS[min(len(buckets), 1)]:
            buckets.append((when, filled))
            filled = 0
    return [*buckets, (gradients[-1][0], filled)] if filled else buckets


# In each process


def set_up(options: argparse.Namespace, processes: int) -> tuple[Any, ...]:
    """Return accelerator, model, optimizer and an endless iterator of batches for this process."""
    keys = {"train.batch_size": options.batch * processes, "train.precision": options.precision, "data.count": 1200}
    keys["train.bf16_gradients"] = getattr(options, "bf16", False)  # scaling.py's own options have none
    config = train_config(["train", "--config", str(CONFIG), *(f"--{key}={value}" for key, value in keys.items())])
    accelerator = build_accelerator(config.train)
    parts = build_parts(config, load_splits(config.data), accelerator)
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    return accelerator, model, optimizer, chain.from_iterable(repeat(parts.trainloader))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of steps alone and with the others (`steps` each), and the median Step of those alone."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator, model, optimizer, batches = set_up(options, processes)
    moments: dict[Any, list[float]] = {parameter: [] for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: moments[parameter].append(clock()))
    marks = []
    for number in range(2 * options.steps):
        accelerator.wait_for_everyone()
        started = clock()
        batch = next(batches)
        with accelerator.no_sync(model) if number % 2 == 0 else nullcontext():
            loss = F.cross_entropy(model(batch.images), batch.labels)
            forwarded = clock()
            accelerator.backward(loss)
            reduced = clock()
        optimizer.step()
        optimizer.zero_grad()
        marks.append((started, forwarded, reduced, clock()))
    first = 2 * options.warmup
    alone, together = marks[first::2], marks[first + 1 :: 2]
    before, backward, after = (statistics.median(mark[i + 1] - mark[i] for mark in alone) for i in range(3))
    gradients = []
    for parameter, seconds in moments.items():
        into = [second - mark[1] for second, mark in zip(seconds[first::2], alone, strict=True)]
        gradients.append((statistics.median(into), parameter.numel() * parameter.element_size()))
    return {
        "alone": [mark[-1] - mark[0] for mark in alone],
        "together": [mark[-1] - mark[0] for mark in together],
        "step": Step(before, backward, after, fill_buckets(sorted(gradients))),
    }


def time_link(options: argparse.Namespace) -> Link:
    """Return the unshaped link between two gloo processes: seconds per message and per byte sent."""
    build_accelerator(train_config(["train", "--config", str(CONFIG)]).train)
    seconds = {}
    for size in (2**12, 2**24):
        values, takes = torch.ones(size // 4), []
        for _ in range(options.steps):
            torch.distributed.barrier()
            started = clock()
            torch.distributed.all_reduce(values)
            takes.append(clock() - started)
        seconds[size] = statistics.median(takes)
    return Link(math.inf, seconds[2**12] / 2, (seconds[2**24] - seconds[2**12]) / (2**24 - 2**12))


# All processes


def profile(options: argparse.Namespace) -> list[Any]:
    """Return the Step, as a list, of one process: on the GPU where there is one, else on one core."""
    return time_steps(options)["step"] if torch.cuda.is_available() else launch("steps", 1, options)[0]["step"]


def launch(
    role: str, count: int, options: argparse.Namespace, *more: str, places: list[list[str]] | None = None
) -> list[Any]:
    """Run `count` processes of this file in a role, each on one core; return what each printed."""
    words = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "warmup", "precision")]
    shared = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
    shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": ADDRESSES[0] if places else "127.0.0.1", "MASTER_PORT": "29655"}
    processes = []
    for rank in range(count):
        place = [*places[rank]] if places else []
        place += ["taskset", "-c", str(CORES[rank % len(CORES)])]
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        own |= {"GLOO_SOCKET_IFNAME": f"scale{rank}"} if places else {}
        command = [*place, sys.executable, __file__, role, *words, *more]
        processes.append(subprocess.Popen(command, env=os.environ | shared | own, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=900)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in printed]


@contextmanager
def namespaces(rate: float) -> Iterator[list[list[str]]]:
    """Join two network namespaces by a link of `rate` Mbit/s; yield what runs a command in each."""
    names = [f"scaling{rank}_{os.getpid()}" for rank in range(2)]
    try:
        for name in names:
            system("ip", "netns", "add", name)
            system("ip", "-n", name, "link", "set", "lo", "up")
        system(*f"ip link add scale0 netns {names[0]} type veth peer name scale1 netns {names[1]}".split())
        for rank, name in enumerate(names):
            system(*f"ip -n {name} addr add {ADDRESSES[rank]}/24 dev scale{rank}".split())
            system(*f"ip -n {name} link set scale{rank} up".split())
            shape = f"tc -n {name} qdisc add dev scale{rank} root tbf rate {rate}mbit burst 256kb latency 100ms"
            system(*shape.split())
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def system(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("steps", "link"))
    parser.add_argument("--bf16", action="store_true", help="send gradients in bf16")
    add_options(parser)
    options = parser.parse_args()
    print(json.dumps({"steps": time_steps, "link": time_link}[options.role](options)))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=32, help="images of each process in a step")
    parser.add_argument("--precision", default="no", help="as train.precision")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4, help="of the steps, those not counted")


if __name__ == "__main__":
    main()
