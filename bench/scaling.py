"""Seconds per step on 1 to 1,024 processes: predicted from the step of one, and checked against real runs here.

    python bench/scaling.py --check [--json FILE]                    profile, measure gloo runs here, compare, predict
    python bench/scaling.py --save step.json                         profile, on the machine that is to be scaled
    python bench/scaling.py --profile step.json --bandwidth 100e9    predict only

The profile is one process's step: seconds before, in and after the backward pass, and when each of DDP's buckets of
gradients is ready. The prediction lays the all-reduces of the buckets (ring or tree, the faster) beside the rest of the
backward pass. On GPUs sending costs no computing time; gloo sends with the processor that also computes, so there each
byte costs both. Every process keeps its batch: the global batch grows with their number.

--check runs 1, 2 and 4 processes, each on one core, and as root two network namespaces with a link shaped by tc (tbf),
gradients in fp32 and in bf16. Steps with and without the all-reduce take turns; the prediction is made from the latter,
so cores shared by processes (4 on 2) or with other work slow both; the slowest process of each step counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from steps import CORES, Link, Step, add_options, launch, namespaces, profile, read_step

COUNTS = [2**power for power in range(11)]


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


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measure runs on this machine beside their predictions, in rounds; return both and their ratios."""
    shaped = [(rate, more) for rate in options.rates for more in ((), ("--bf16",))] if os.geteuid() == 0 else []
    cases: dict[str, list[tuple[float, float, float]]] = {}
    links = []
    for _ in range(options.rounds):
        links.append(Link(*launch("link", 2, options)[0]))
        for count in options.counts:
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure runs here beside their predictions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4], help="processes of the measured runs")
    parser.add_argument("--rates", nargs="*", type=float, default=[1000, 200], help="Mbit/s of the shaped link")
    parser.add_argument("--profile", type=Path, help="a profile that --save wrote")
    parser.add_argument("--save", type=Path, help="file for the profile")
    parser.add_argument("--step", type=float, help="scale the profile to a step of this many seconds")
    add_options(parser)
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bit/s each way between two nodes")
    parser.add_argument("--inside", type=float, default=1e12, help="bit/s each way between two processes of a node")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message")
    parser.add_argument("--per_node", type=int, default=8, help="processes of a node")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
