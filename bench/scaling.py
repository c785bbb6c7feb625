"""Seconds per step on 1 to 1,024 processes: predicted from the step of one, and checked against real runs here.

    python bench/scaling.py --check [--json FILE]                    profile, measure gloo runs here, compare, predict
    python bench/scaling.py --save step.json                         profile only: on the machine that is to be scaled
    python bench/scaling.py --profile step.json --bandwidth 100e9    predict only

The profile is one process's step: seconds before, in and after the backward pass, and when each of DDP's buckets of gradients
is ready. The prediction lays the all-reduces of the buckets (ring or tree, the faster) beside the rest of the backward pass. On
GPUs sending costs no computing time; gloo sends with the processor that also computes, so there each byte costs both.
Every process keeps its batch: the global batch grows with their number. --check measures 1, 2 and 4 processes, each on one
core, and as root two network namespaces with a link shaped by tc (tbf), gradients in fp32 and in bf16.
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
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dist_train.cli import train_config
from dist_train.data.images import load_splits
from dist_train.optim import build_optimizer
from dist_train.processes import build_accelerator
from dist_train.run import build_loaders, build_model

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BUCKETS = (2**20, 25 * 2**20)  # bytes of DDP's first bucket and of the others
COUNTS = [2**power for power in range(11)]
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


def all_reduce(size: int, processes: int, link: Link, per_node: int = 1, inside: Link | None = None) -> dict[str, float]:
    """Return the seconds of an all-reduce of `size` bytes by algorithm.

    Both send 2 (n-1)/n (ring) or 2 (tree) times the bytes; a ring takes 2 (n-1) messages in a row, a tree 2 log2(n).
    Within a node (`per_node` processes) messages take `inside`; the slowest link sets the pace.
    """
    if processes == 1:
        return {"ring": 0.0, "tree": 0.0}
    nodes = math.ceil(processes / per_node)
    near = inside or link
    pace = near if nodes == 1 else min(near, link)
    byte = max(1 / pace.bandwidth, pace.host)
    hops = {"ring": processes - nodes, "tree": min(processes, per_node) - 1}
    far = {"ring": nodes - 1, "tree": math.ceil(math.log2(nodes))}
    share = {"ring": (processes - 1) / processes, "tree": 1.0}
    return {name: 2 * (hops[name] * near.latency + far[name] * link.latency + share[name] * size * byte) for name in far}


def predict(step: Step, processes: int, link: Link, algorithms: tuple[str, ...] = ("ring", "tree"), **node: Any) -> float:
    """Return the seconds of a step: each bucket is reduced when it is ready and the one before it is through."""
    through = 0.0
    for when, size in step.ready:
        seconds = all_reduce(size, processes, link, **node)
        through = max(step.before + when, through) + min(seconds[name] for name in algorithms)
    sent = 2 * (processes - 1) / processes * sum(size for _, size in step.ready)
    return max(step.before + step.backward + sent * link.host, through if processes > 1 else 0.0) + step.after


def fill_buckets(gradients: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Put gradients (second, bytes), in the order of their coming, into buckets as DDP does; return those."""
    buckets, filled = [], 0
    for when, size in gradients:
        filled += size
        if filled >= BUCKETS[min(len(buckets), 1)]:
            buckets.append((when, filled))
            filled = 0
    return [*buckets, (gradients[-1][0], filled)] if filled else buckets


# In each process


def set_up(options: argparse.Namespace, processes: int) -> tuple[Any, ...]:
    """Return accelerator, model, optimizer and an endless iterator of batches for this process."""
    batch = options.batch * processes
    keys = {"batch_size": batch, "precision": options.precision}
    arguments = [f"--train.{key}={value}" for key, value in keys.items()]
    config = train_config(["train", "--config", str(CONFIG), "--data.count=1200", *arguments])
    accelerator = build_accelerator(config.train)
    data = load_splits(config.data)
    model = build_model(config, data[0])
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    batches = chain.from_iterable(repeat(build_loaders(config, data, accelerator)[0]))
    return accelerator, model, optimizer, batches


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_profile(options: argparse.Namespace) -> Step:
    """Return the median step of a single process."""
    accelerator, model, optimizer, batches = set_up(options, 1)
    times: dict[Any, list[float]] = {}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: times.setdefault(p, []).append(clock()))
    marks: list[list[float]] = []
    started = clock()
    for batch in islice(batches, options.steps):
        loss = F.cross_entropy(model(batch.images), batch.labels)
        marks.append([started, clock()])
        accelerator.backward(loss)
        marks[-1].append(clock())
        optimizer.step()
        optimizer.zero_grad()
        marks[-1].append(started := clock())
    before, backward, after = (
        statistics.median(mark[i + 1] - mark[i] for mark in marks[options.warmup :]) for i in range(3)
    )
    gradients = []
    for parameter, moments in times.items():
        into = [moment - mark[1] for moment, mark in zip(moments, marks, strict=True)]
        gradients.append((statistics.median(into[options.warmup :]), parameter.numel() * parameter.element_size()))
    return Step(before, backward, after, fill_buckets(sorted(gradients)))


def time_run(options: argparse.Namespace) -> float:
    """Return the median seconds of a step of this process among all."""
    processes = int(os.environ["WORLD_SIZE"])
    accelerator, model, optimizer, batches = set_up(options, processes)
    if options.bf16:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        model.register_comm_hook(None, bf16_compress_hook)
    moments = [clock()]
    for batch in islice(batches, options.steps):
        loss = F.cross_entropy(model(batch.images), batch.labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        moments.append(clock())
    return statistics.median(b - a for a, b in zip(moments[options.warmup :], moments[options.warmup + 1 :], strict=False))


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


def launch(role: str, count: int, options: argparse.Namespace, *more: str, places: list[list[str]] | None = None) -> list[Any]:
    """Run `count` processes of this file in a role, each on one core; return what each printed."""
    words = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "warmup", "precision")]
    address = {"MASTER_ADDR": "127.0.0.1" if places is None else ADDRESSES[0], "MASTER_PORT": "29655"}
    processes = []
    for rank in range(count):
        core = str(CORES[rank % len(CORES)])
        place = [] if places is None else places[rank]
        command = [*place, "taskset", "-c", core, sys.executable, __file__, "--role", role, *words, *more]
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} | address
        own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | own | (ranks if role != "profile" else {})
        if places is not None:
            environment["GLOO_SOCKET_IFNAME"] = f"scale{rank}"
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=600)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in printed]


ADDRESSES = ("10.123.45.1", "10.123.45.2")


@contextmanager
def namespaces(rate: str) -> Iterator[list[list[str]]]:
    """Join two network namespaces by a link of `rate` (tc's notation); yield what runs a command in each."""
    names = [f"scaling{rank}_{os.getpid()}" for rank in range(2)]
    try:
        for name in names:
            system("ip", "netns", "add", name)
            system("ip", "-n", name, "link", "set", "lo", "up")
        system(*f"ip link add scale0 netns {names[0]} type veth peer name scale1 netns {names[1]}".split())
        for rank, name in enumerate(names):
            system(*f"ip -n {name} addr add {ADDRESSES[rank]}/24 dev scale{rank}".split())
            system(*f"ip -n {name} link set scale{rank} up".split())
            shape = f"tc -n {name} qdisc add dev scale{rank} root tbf rate {rate} burst 256kb latency 100ms"
            system(*shape.split())
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def system(*command: str) -> None:
    subprocess.run(command, check=True)


def profile_step(options: argparse.Namespace, copies: int) -> Step:
    """Return the median profile of `copies` processes that work side by side, each for itself."""
    before, backward, after, ready = zip(*launch("profile", copies, options), strict=True)
    moments = [[when for when, _ in one] for one in ready]
    times = [statistics.mean(each) for each in zip(*moments, strict=True)]
    sizes = [size for _, size in ready[0]]
    mean = statistics.mean
    return Step(mean(before), mean(backward), mean(after), list(zip(times, sizes, strict=True)))


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measure runs on this machine beside their predictions, in rounds; return both and their ratios."""
    cases: dict[str, list[tuple[float, float]]] = {}
    links = []
    rates = options.rates if os.geteuid() == 0 else []
    for _ in range(options.rounds):
        alone, beside = profile_step(options, 1), profile_step(options, len(CORES))
        link = Link(*launch("link", 2, options)[0])
        links.append(link)
        for count in (1, 2, 4):
            crowd = max(1, count / len(CORES))  # processes on a core share its time
            predicted = predict(
                (alone if count == 1 else beside).scaled(crowd), count, link._replace(host=link.host * crowd), ("ring",)
            )
            measured = statistics.median(launch("run", count, options))
            cases.setdefault(f"{count} processes", []).append((predicted, measured))
        for rate in rates:
            shaped = link._replace(bandwidth=float(rate.removesuffix("mbit")) * 1e6 / 8)
            for words in ([], ["--bf16"]):
                predicted = predict(beside.scaled(1, 0.5 if words else 1), 2, shaped, ("ring",))
                with namespaces(rate) as places:
                    measured = statistics.median(launch("run", 2, options, *words, places=places))
                cases.setdefault(f"2 namespaces, {rate}, {'bf16' if words else 'fp32'}", []).append((predicted, measured))
    report = {}
    for case, pairs in cases.items():
        predicted, measured = (statistics.median(values) for values in zip(*pairs, strict=True))
        report[case] = {
            "predicted": round(predicted, 4),
            "measured": round(measured, 4),
            "ratio": round(predicted / measured, 3),
            "rounds": [[round(value, 4) for value in pair] for pair in pairs],
        }
    return {"cases": report, "links": links, "load": os.getloadavg(), "cores": len(CORES)}


def table(step: Step, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the predicted step for 1 to 1,024 processes, gradients in fp32 and in bf16."""
    link, inside = (Link(bits / 8, options.latency) for bits in (options.bandwidth, options.inside))
    node = {"per_node": options.per_node, "inside": inside}
    rows = []
    for count in COUNTS:
        row: dict[str, Any] = {"processes": count}
        for name, size in (("fp32", 1.0), ("bf16", 0.5)):
            seconds = predict(step.scaled(1, size), count, link, **node)
            row[name] = {"seconds": seconds, "efficiency": round(step.seconds / seconds, 3)}
        whole = all_reduce(sum(size for _, size in step.ready), count, link, **node)
        row["algorithm"] = min(whole, key=lambda name: whole[name]) if count > 1 else None
        rows.append(row)
    return rows


def main() -> None:
    options = parse_options()
    if options.role:
        print(json.dumps({"profile": time_profile, "run": time_run, "link": time_link}[options.role](options)))
        return
    if options.profile:
        stored = json.loads(options.profile.read_text())
        step = Step(*stored[:3], [(when, size) for when, size in stored[3]])
    else:
        step = time_profile(options) if torch.cuda.is_available() else profile_step(options, 1)
    if options.save:
        options.save.write_text(json.dumps(step) + "\n")
    checked = check(options) if options.check else None
    shown = step.scaled(options.step / step.seconds) if options.step else step
    report = {"step": step._asdict(), "check": checked, "predicted": table(shown, options)}
    for case, found in (checked["cases"] if checked else {}).items():
        print(f"{case:32} predicted {found['predicted']:.3f} s, measured {found['measured']:.3f} s: {found['ratio']}")
    for row in report["predicted"]:
        print(f"{row['processes']:5} {row['algorithm']}", *(f"{k}: {row[k]}" for k in ("fp32", "bf16")))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure runs here beside their predictions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", nargs="*", default=["1000mbit", "200mbit"], help="of the shaped link, in mbit")
    parser.add_argument("--profile", type=Path, help="a profile that --save wrote")
    parser.add_argument("--save", type=Path, help="file for the profile")
    parser.add_argument("--step", type=float, help="scale the profile to a step of this many seconds")
    parser.add_argument("--batch", type=int, default=32, help="images of each process in a step")
    parser.add_argument("--precision", default="no")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4, help="of the steps, those not counted")
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bit/s each way between two nodes")
    parser.add_argument("--inside", type=float, default=1e12, help="bit/s each way between two processes of a node")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message")
    parser.add_argument("--per_node", type=int, default=8, help="processes of a node")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--role", choices=("profile", "run", "link"), help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
