"""Seconds per step on 1 to 1,024 processes: predicted from the step of one, and checked against real runs here.

    python bench/scaling.py --check [--json FILE]                    profile, measure gloo runs here, compare, predict
    python bench/scaling.py --save step.json                         profile, on the machine that is to be scaled
    python bench/scaling.py --profile step.json --bandwidth 100e9    predict only

The profile is one process's step: seconds before, in and after the backward pass, and when each of DDP's buckets of
gradients is ready. The prediction lays the all-reduces of the buckets (ring or tree, the faster) beside the rest of the
backward pass. On GPUs sending costs no computing time; gloo sends with the processor that also computes, so there each
byte costs both. Every process keeps its batch: the global batch grows with their number.

--check runs 1, 2 and 4 processes, each on one core, and as root two network namespaces with a link shaped by tc (tbf),
gradients in fp32 and in bf16. Steps with and without the all-reduce take turns, a barrier before each. The prediction
is made from the latter, so cores shared by processes (4 on 2) or with other work slow both; the slowest process counts.
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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import functional as F

from dist_train.cli import train_config
from dist_train.data.images import load_splits
from dist_train.optim import build_optimizer
from dist_train.processes import build_accelerator
from dist_train.run import build_loaders, build_model

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BUCKETS = (2**20, 25 * 2**20)  # bytes of DDP's first bucket and of the others
COUNTS = [2**power for power in range(11)]
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


def all_reduce(
    size: int, processes: int, link: Link, per_node: int = 1, inside: Link | None = None
) -> dict[str, float]:
    """Return the seconds of an all-reduce of `size` bytes by algorithm.

    A process sends 2 (n-1)/n (ring) or 2 (tree) times the bytes, in 2 (n-1) or 2 log2(n) messages that wait for each
    other. Within a node (`per_node` processes) messages take `inside`; the slowest link sets the pace.
    """
    if processes == 1:
        return {"ring": 0.0, "tree": 0.0}
    nodes = math.ceil(processes / per_node)
    near = inside or link
    pace = near if nodes == 1 else min(near, link)
    byte = max(1 / pace.bandwidth, pace.host)
    latency = {
        "ring": (processes - nodes) * near.latency + (nodes - 1) * link.latency,
        "tree": (min(processes, per_node) - 1) * near.latency + math.ceil(math.log2(nodes)) * link.latency,
    }
    return {
        "ring": 2 * (latency["ring"] + (processes - 1) / processes * size * byte),
        "tree": 2 * (latency["tree"] + size * byte),
    }


def predict(step: Step, processes: int, link: Link, *, tree: bool = True, **node: Any) -> float:
    """Return the seconds of a step: each bucket is reduced when it is ready and the one before it is through.

    tree: whether there is a tree to choose (NCCL has one, gloo has not); node: per_node and inside of all_reduce.
    """
    computed = through = step.before + step.backward
    if processes > 1:
        through = 0.0
        for when, size in step.ready:
            seconds = all_reduce(size, processes, link, **node)
            through = max(step.before + when, through) + (min(seconds.values()) if tree else seconds["ring"])
        sent = 2 * (processes - 1) / processes * sum(size for _, size in step.ready)
        computed += sent * link.host
    return max(computed, through) + step.after


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
    config = train_config(["train", "--config", str(CONFIG), *(f"--{key}={value}" for key, value in keys.items())])
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


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of steps alone and with the others (`steps` each), and the median Step of those alone."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator, model, optimizer, batches = set_up(options, processes)
    if options.bf16:
        model.register_comm_hook(None, bf16_compress_hook)
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
        command = [*place, sys.executable, __file__, "--role", role, *words, *more]
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


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measure runs on this machine beside their predictions, in rounds; return both and their ratios."""
    shaped = [(rate, more) for rate in options.rates for more in ((), ("--bf16",))] if os.geteuid() == 0 else []
    cases: dict[str, list[tuple[float, float, float]]] = {}
    links = []
    for _ in range(options.rounds):
        links.append(Link(*launch("link", 2, options)[0]))
        for count in (1, 2, 4):
            crowd = max(1.0, count / len(CORES))  # processes on a core share its time
            link = links[-1]._replace(host=crowd * links[-1].host)
            found = compare(launch("steps", count, options), link)
            cases.setdefault(f"{count} processes", []).append(found)
        for rate, more in shaped:
            link = links[-1]._replace(bandwidth=rate * 1e6 / 8)
            with namespaces(rate) as places:
                found = compare(launch("steps", 2, options, *more, places=places), link, 0.5 if more else 1.0)
            cases.setdefault(f"2 namespaces, {rate} Mbit/s, {'bf16' if more else 'fp32'}", []).append(found)
    report = {}
    for case, rounds in cases.items():
        names = ("alone", "predicted", "together")
        medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
        ratios = [round(predicted / together, 3) for _, predicted, together in rounds]
        report[case] = dict(zip(names, medians, strict=True)) | {"ratio": statistics.median(ratios), "ratios": ratios}
    return {"cases": report, "links": links, "load": os.getloadavg(), "cores": len(CORES)}


def compare(found: list[dict[str, Any]], link: Link, size: float = 1.0) -> tuple[float, float, float]:
    """Return seconds of a step alone, predicted together, and measured together; of the slowest process each."""
    alone, together = (
        statistics.median(max(each) for each in zip(*(process[kind] for process in found), strict=True))
        for kind in ("alone", "together")
    )
    step = read_step(found[0]["step"])
    return alone, predict(step.scaled(alone / step.seconds, size), len(found), link, tree=False), together


def read_step(stored: list[Any]) -> Step:
    """Return the Step that JSON holds as a list."""
    before, backward, after, ready = stored
    return Step(before, backward, after, [(when, size) for when, size in ready])


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
        print(json.dumps((time_steps if options.role == "steps" else time_link)(options)))
        return
    step = read_step(json.loads(options.profile.read_text()) if options.profile else profile(options))
    if options.save:
        options.save.write_text(json.dumps(step) + "\n")
    checked = check(options) if options.check else None
    if checked:
        for case, found in checked["cases"].items():
            figures = ", ".join(f"{name} {found[name]:.3f} s" for name in ("alone", "predicted", "together"))
            print(f"{case:36} {figures}, ratio {found['ratio']:.2f} of {found['ratios']}")
    rows = table(step.scaled(options.step / step.seconds) if options.step else step, options)
    for row in rows:
        print("{processes:5} processes: {fp32[seconds]:.4f} s {fp32[efficiency]:.0%}, bf16 {bf16[seconds]:.4f} s "
              "{bf16[efficiency]:.0%}, {algorithm}".format_map(row))  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"step": step, "check": checked, "predicted": rows}, indent=2) + "\n")


def profile(options: argparse.Namespace) -> list[Any]:
    """Return the Step, as a list, of one process: on the GPU where there is one, else on one core."""
    return time_steps(options)["step"] if torch.cuda.is_available() else launch("steps", 1, options)[0]["step"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure runs here beside their predictions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", nargs="*", type=float, default=[1000, 200], help="Mbit/s of the shaped link")
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
    parser.add_argument("--role", choices=("steps", "link"), help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
