"""What each choice of the step buys: images per second of training with one of them changed at a time.

    python bench/choices.py --data DIR [--rounds 3] [--steps 20] [--json FILE]

All variants take turns, each in a process of its own, as in throughput.py; the median of the rounds counts. A ratio
below 1 is what would be lost by the change.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import throughput
import torch
from reporting import software, write_report

from dist_train import processes

VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "fp32": {"train.precision": "no"},
    "without channels_last": {"train.channels_last": "false"},
    "freed memory given back": {},
    "without augmentation": {f"data.augment.{name}": "0" for name in
                             ("flip", "rotate", "translate", "scale", "brightness", "contrast", "erase")},
    "with erasing": {"data.augment.erase": "0.25"},
    "with mixup": {"train.mixup": "0.2"},
    "with EMA": {"train.ema": "0.998"},
    "compiled": {"train.compile": "true"},
    "batch 256": {"train.batch_size": "256"},
    "batch 512": {"train.batch_size": "512"},
    "batch 512, compiled": {"train.batch_size": "512", "train.compile": "true"},
    "AdamW": {"optim.name": "adamw", "optim.lr": "0.001"},
    "one channel": {"model.in_channels": "1"},
    "3x3 stem of stride 2": {"model.stem_stride": "2"},
}  # fmt: skip


def make(name: str) -> throughput.Maker:
    """Return what makes the contender of a variant in its process."""
    if name == "freed memory given back":
        return make_forgetful
    return throughput.make_ours


def make_forgetful(options: argparse.Namespace) -> Callable[[], float]:
    """Return ours without keeping what the C library frees."""
    processes._keep_freed_memory = lambda: None
    return throughput.make_ours(options)


def main() -> None:
    options = parse_options()
    contenders = {
        name: (make(name), argparse.Namespace(**vars(options), more=VARIANTS[name]))
        for name in options.only or VARIANTS
    }
    speeds = throughput.take_turns(contenders, options.rounds)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    first = median[next(iter(median))]
    report = {
        "ratios": {name: round(value / first, 3) for name, value in median.items()},
        "images_per_second": {name: round(value, 1) for name, value in median.items()},
        "settings": {"image_size": options.size, "batch_size": options.batch, "threads": torch.get_num_threads()},
        **software(*throughput.PACKAGES),
    }
    write_report(report, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and validation/<class>/*")
    parser.add_argument("--size", type=int, default=48, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=128, help="images per step, but where the variant says other")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="but where the variant says other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round, of the batch given")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="variants; the first is compared with")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.set_defaults(compile="false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
