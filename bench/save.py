"""How long a checkpoint holds up a training: the pause of save(), and the time until all is on the disk.

    python bench/save.py [--folder DIR]

ResNet18 with SGD and momentum, as configs/fer2013.yaml trains it; DIR: on the disk to be measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from dist_train import FaceModel
from dist_train.checkpoint import Checkpointer
from dist_train.config import OptimConfig
from dist_train.optim import build_optimizer
from dist_train.state import Progress, TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    parser.add_argument("--saves", type=int, default=9)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = FaceModel(pretrained=False).to(accelerator.device)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.rand(8, 1, 48, 48, device=accelerator.device)).sum().backward()
    optimizer.step()  # which makes the momentum
    pauses, writes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpointer, state = Checkpointer(Path(folder), accelerator), TrainState(model, optimizer, Progress())
        for _ in range(options.saves):
            state.progress.step += 1
            started = time.perf_counter()
            checkpointer.save(state)
            pauses.append(time.perf_counter() - started)
            checkpointer.flush()
            writes.append(time.perf_counter() - started)
    print(
        f"pause {1000 * statistics.median(pauses):.0f} ms, on the disk after {1000 * statistics.median(writes):.0f} ms"
    )


if __name__ == "__main__":
    main()
