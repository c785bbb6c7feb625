"""Host memory of a training's processes on one machine: what each further process adds, beside a copy of the data.

    python bench/memory.py --data DIR [--size 160] [--processes 1 2 4] [--json FILE]

DIR: train/<class>/*. Real processes under accelerate launch (launch/accelerate/multi_cpu.yaml); each loads the data as
`dist-train train` does, reads every image once and trains for a few steps. Sampled over all of them: PSS, which counts
a page that n processes share as 1/n of a page to each, and RSS, which counts it in full to each. The cache of decoded
images is filled beforehand. `added_of_a_copy`: what a further process adds to the sum of PSS, as a share of the data.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from reporting import software, write_report

from dist_train.data.images import load_splits
from dist_train.options import train_config
from dist_train.processes import build_accelerator, local_main_first
from dist_train.run import build_parts
from dist_train.training import train

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smoke.yaml"
RECIPE = ROOT / "launch" / "accelerate" / "multi_cpu.yaml"
MB = 1e6


def main() -> None:
    options = parse_options()
    if "RANK" in os.environ:
        return train_briefly(options)
    data = load_splits(build_config(options).data)
    copy = sum(math.prod(split.images.shape) for split in data) / MB
    peaks = {count: measure(count) for count in options.processes}
    report = make_report(options, peaks, copy)
    write_report(report, options.json)
    return None


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and validation/<class>/*")
    parser.add_argument("--size", type=int, default=160, help="side of the images, in pixels")
    parser.add_argument("--residency", choices=("host", "stream"), default="host")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def build_config(options: argparse.Namespace) -> Any:
    keys = {
        "data.source": "auto",
        "data.path": options.data,
        "data.image_size": options.size,
        "data.residency": options.residency,
        "model.backbone": "timm/test_resnet",  # small: the data is what is measured
        "train.batch_size": 32,
        "train.max_steps": options.steps,
    }
    return train_config(["train", "--config", str(CONFIG), *(f"--{key}={value}" for key, value in keys.items())])


def train_briefly(options: argparse.Namespace) -> None:
    """Be one of the processes: read all images, then train."""
    config = build_config(options)
    accelerator = build_accelerator(config.train)
    splits = local_main_first(accelerator, load_splits, config.data)
    for split in splits if options.residency == "host" else ():
        for start in range(0, len(split), 256):
            split.images[start : start + 256].max()
    few = splits[1].subset(np.arange(0, len(splits[1]), 200))
    parts = build_parts(config, (splits[0], few), accelerator)
    train(*parts, 1, accelerator=accelerator, max_steps=options.steps)
    accelerator.wait_for_everyone()
    time.sleep(1)  # for a last sample with all pages mapped
    accelerator.wait_for_everyone()
    accelerator.end_training()


def measure(count: int) -> dict[str, float]:
    """Run `count` processes and return the peaks of their summed PSS and RSS, in MB."""
    place = ["--config_file", str(RECIPE), "--num_processes", str(count), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *place, __file__, *sys.argv[1:]]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"pss": 0.0, "rss": 0.0}
    while launcher.poll() is None:
        for name, value in sample(launcher.pid).items():
            peaks[name] = max(peaks[name], value)
        time.sleep(0.2)
    if launcher.returncode:
        raise SystemExit(f"{count} processes failed with exit code {launcher.returncode}")
    return peaks


def sample(launcher: int) -> dict[str, float]:
    """Return the PSS and RSS, in MB, of the processes that the launcher started."""
    sums = {"pss": 0.0, "rss": 0.0}
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        for process in psutil.Process(launcher).children():
            memory = process.memory_full_info()  # from smaps_rollup
            sums = {"pss": sums["pss"] + memory.pss / MB, "rss": sums["rss"] + memory.rss / MB}
    return sums


def make_report(options: argparse.Namespace, peaks: dict[int, dict[str, float]], copy: float) -> dict[str, Any]:
    added = {
        f"{few} to {many}": (peaks[many]["pss"] - peaks[few]["pss"]) / (many - few) for few, many in pairwise(peaks)
    }
    return {
        "added_of_a_copy": {name: round(value / copy, 3) for name, value in added.items()},
        "added_by_each_further_process_mb": {name: round(value) for name, value in added.items()},
        "data_mb": round(copy),
        "peak_mb": {count: {name: round(value) for name, value in found.items()} for count, found in peaks.items()},
        "settings": {"image_size": options.size, "residency": options.residency, "steps": options.steps},
        "machine": {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        **software("torch", "torchvision", "accelerate", "timm"),
    }


if __name__ == "__main__":
    main()
