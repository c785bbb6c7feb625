"""Minutes from the start of the command to a validation accuracy: ours against the notebook's recipe.

    python bench/time_to_accuracy.py --data DIR [--target 0.612] [--json FILE] [-- --train.epochs 6 ...]

Both train ResNet18 from random weights on DIR/train, one after the other on the same machine, and are stopped when the
accuracy on DIR/validation has reached the target. Ours is `dist-train train` with the options after --. The notebook's
recipe is Adam at 1e-3, batch 32, fp32, flips and rotations of up to 20 degrees, 48 pixels; it is given `--times` the
minutes of ours and then given up. Start-up, decoding and validation count; ours finds no cache of decoded images.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from notebook_loop import Notebook
from reporting import software, write_report
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dist_train import evaluate

ROOT = Path(__file__).parents[1]
EPOCH = re.compile(r"epoch \d+.*valid loss [\d.]+, accuracy ([\d.]+)")
ROLE = "--notebook"


def main() -> None:
    if sys.argv[1:2] == [ROLE]:
        run_notebook(sys.argv[2])
        return
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            *(
                sys.executable,
                "-m",
                "dist_train",
                "train",
                "--config",
                str(options.config),
                "--data.path",
                options.data,
            ),
            *("--model.pretrained", "false", "--data.cache", f"{folder}/cache", "--run_dir", f"{folder}/run"),
            *("--track.tool", "none", *options.more),
        ]
        curves = {"ours": follow(ours, options.target, float("inf"))}
        budget = options.times * curves["ours"][-1][0]
        curves["notebook"] = follow([sys.executable, __file__, ROLE, options.data], options.target, budget)
    report = make_report(options, curves)
    write_report(report, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and validation/<class>/*")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "fer2013_best.yaml", help="of ours")
    parser.add_argument("--target", type=float, default=0.612, help="validation accuracy, 0 to 1")
    parser.add_argument("--times", type=float, default=3.5, help="minutes of the notebook's recipe per minute of ours")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("more", nargs="*", help="after --: options of dist-train train")
    return parser.parse_args()


def follow(command: list[str], target: float, budget: float) -> list[tuple[float, float]]:
    """Run a training until an epoch reaches the target or the seconds are over; return (seconds, accuracy) by epoch."""
    started, curve = time.perf_counter(), []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := EPOCH.search(line):
            curve.append((round(time.perf_counter() - started, 1), float(found[1])))
            print(command[2], *curve[-1], file=sys.stderr, flush=True)
            if curve[-1][1] >= target or curve[-1][0] >= budget:
                break
    process.kill()
    process.wait()
    if not curve:
        raise RuntimeError(f"no epoch was finished: {' '.join(command)}")
    return curve


def run_notebook(data: str) -> None:
    """Train as the notebook does, for ever; write each epoch's accuracy to stderr."""
    torch.manual_seed(0)
    notebook = Notebook(data)
    valid = DataLoader(ImageFolder(f"{data}/validation", transform=transforms.ToTensor()), batch_size=32)
    for epoch in count(1):
        notebook.train(notebook.loader)
        results = evaluate(notebook.model, valid)
        print(f"epoch {epoch}: valid loss {results.loss:.4f}, accuracy {results.accuracy:.4f}", file=sys.stderr)


def make_report(options: argparse.Namespace, curves: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    seconds = {
        name: next((s for s, accuracy in curve if accuracy >= options.target), None) for name, curve in curves.items()
    }
    ours, theirs = seconds["ours"], seconds["notebook"]
    at_least = theirs is None
    return {
        "ratio": round((theirs or curves["notebook"][-1][0]) / ours, 2) if ours else None,
        "ratio_is_a_lower_bound": at_least,
        "target": options.target,
        "minutes": {name: round(s / 60, 2) if s else None for name, s in seconds.items()},
        "best_accuracy": {name: max(accuracy for _, accuracy in curve) for name, curve in curves.items()},
        "curves": curves,
        "options": options.more,
        "machine": {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        **software("torch", "torchvision", "accelerate", "timm"),
    }


if __name__ == "__main__":
    main()
