"""What each trick of the recipe is worth: short trainings that differ in one thing.

    python bench/original_splits.py DIR > splits.csv
    python bench/ablation.py --data DIR --splits splits.csv --out DIR [--only NAME ...]

Each variant trains ResNet18 from random weights on Training in its own folder under --out and is judged on PublicTest;
PrivateTest stays untouched. A variant that has finished is not trained again. Epochs are set so that one core of the
machine they were chosen on takes as long for each, but for those named three times as long; "48 pixels after 32" goes
on with the weights of "32 pixels", which takes half the time and must have been trained before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

BASE = {
    "model.pretrained": "false",
    "data.image_size": "48",
    "data.augment.brightness": "0.1",
    "data.augment.contrast": "0.1",
    "train.epochs": "8",
    "train.label_smoothing": "0.1",
    "optim.lr": "0.1",
    "track.tool": "none",
}
NONE = {f"data.augment.{name}": "0" for name in ("rotate", "translate", "scale", "brightness", "contrast")}
VARIANTS: dict[str, dict[str, str]] = {
    "base": {},
    "3x3 stem of stride 2": {"model.stem_stride": "2", "train.epochs": "3"},
    "80 pixels": {"data.image_size": "80", "train.epochs": "4"},
    "AdamW": {"optim.name": "adamw", "optim.lr": "0.002", "optim.weight_decay": "0.05"},
    "flips only": NONE,
    "mixup 0.2": {"train.mixup": "0.2"},
    "squeeze-excite": {"model.backbone": "timm/seresnet18"},
    "erasing 0.25": {"data.augment.erase": "0.25"},
    "no label smoothing": {"train.label_smoothing": "0"},
    "EMA 0.998": {"train.ema": "0.998"},
    "learning rate 0.03": {"optim.lr": "0.03"},
    "batch 64": {"train.batch_size": "64", "optim.lr": "0.05"},
    "weight decay 0.002": {"optim.weight_decay": "0.002"},
    "one-cycle": {"optim.warmup_epochs": "2.4"},
    "one channel": {"model.in_channels": "1"},
    "32 pixels": {"data.image_size": "32"},
    "48 pixels after 32": {"train.epochs": "4", "model.weights": "{out}/32_pixels/best/model.safetensors"},
    "base, three times as long": {"train.epochs": "24"},
    "flips only, three times as long": NONE | {"train.epochs": "24"},
}


def main() -> None:
    options = parse_options()
    rows = []
    for name in options.only or VARIANTS:
        run_dir = options.out / name.replace(" ", "_")
        if not (run_dir / "summary.json").is_file():
            variant = {key: value.format(out=options.out) for key, value in VARIANTS[name].items()}
            keys = BASE | variant | {"data.path": options.data, "data.splits": options.splits, "run_dir": run_dir}
            given = [f"--{key}={value}" for key, value in keys.items()]
            subprocess.run([sys.executable, "-m", "dist_train", "train", *given, "--resume=auto"], check=True)
        summary = json.loads((run_dir / "summary.json").read_text())
        rows.append((name, summary["epochs"], summary["train_seconds"] / 60, 100 * summary["final_valid_acc"]))
    print(
        "| variant | epochs | minutes | PublicTest after the last, % | gain, points |\n| --- | --- | --- | --- | --- |"
    )
    for name, epochs, minutes, accuracy in rows:
        print(f"| {name} | {epochs} | {minutes:.1f} | {accuracy:.2f} | {accuracy - rows[0][-1]:+.2f} |")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that the splits file's paths are under")
    parser.add_argument("--splits", required=True, help="file that original_splits.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="variants; the first is compared with")
    return parser.parse_args()


if __name__ == "__main__":
    main()
