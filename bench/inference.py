"""Inference of one run side by side: torch, ONNX fp32 and ONNX int8, in images per second and milliseconds per image.

    python bench/inference.py RUN [--batch 64] [--json FILE]

The models are exported from RUN here; int8 is quantized statically from drawn faces, so only its speed counts, not its
accuracy (`dist-train export --quantize` states that). Each contender has a process and one thread per core of this
process; they take turns, and the median of the rounds counts. Latency is that of one image alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import software, write_report

from dist_train import load_run
from dist_train.data.synthetic import draw_faces
from dist_train.export import export_onnx, quantize_onnx

BATCHES = 8  # in a round
Run = Callable[[np.ndarray], Any]
run: Run  # of this process, made by set_up
images: np.ndarray


def main() -> None:
    options = parse_options()
    speeds: dict[str, list[tuple[float, float]]] = {"torch": [], "onnx_fp32": [], "onnx_int8": []}
    with tempfile.TemporaryDirectory() as folder:
        size = export_models(options.run, Path(folder))
        pools = {  # a process each: none gains or suffers from another's settings
            name: ProcessPoolExecutor(1, get_context("spawn"), set_up, (name, options, folder)) for name in speeds
        }
        for number in range(options.rounds + 1):  # the first round warms up
            for name, pool in pools.items():
                measured = pool.submit(measure).result()
                if number:
                    speeds[name].append(measured)
        for pool in pools.values():
            pool.shutdown()
    report = make_report(speeds, options, size)
    write_report(report, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def export_models(run_dir: str, folder: Path) -> dict[str, float]:
    """Write both ONNX models to the folder and return the sizes of the three, in MB."""
    model = load_run(run_dir)
    export_onnx(model, folder)
    faces, _ = draw_faces(256, size=model.image_size or 48)
    channels = 1 if model.gray else 3
    quantize_onnx(folder / "model.onnx", folder / "model.int8.onnx", "static", faces.repeat(channels, 1))
    files = {"onnx_fp32": "model.onnx", "onnx_int8": "model.int8.onnx"}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {"torch": weights / 1e6, **{name: (folder / file).stat().st_size / 1e6 for name, file in files.items()}}


def set_up(name: str, options: argparse.Namespace, folder: str) -> None:
    """Make this process's contender and its images, uint8 [batch, C, S, S]."""
    global run, images
    torch.set_num_threads(threads())
    model = load_run(options.run).to(memory_format=torch.channels_last)
    images = draw_faces(options.batch, seed=2, size=model.image_size or 48)[0].repeat(1 if model.gray else 3, 1)
    run = make_torch(model) if name == "torch" else make_onnx(Path(folder), name)


def make_torch(model: torch.nn.Module) -> Run:
    @torch.inference_mode()
    def classify(batch: np.ndarray) -> Any:
        return model(torch.from_numpy(batch).contiguous(memory_format=torch.channels_last))

    return classify


def make_onnx(folder: Path, name: str) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads()
    file = folder / ("model.onnx" if name == "onnx_fp32" else "model.int8.onnx")
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch})


def measure() -> tuple[float, float]:
    """Return images per second in batches, and milliseconds for one image alone."""

    started = time.perf_counter()
    for _ in range(BATCHES):
        run(images)
    speed = BATCHES * len(images) / (time.perf_counter() - started)
    started = time.perf_counter()
    for image in images:
        run(image[None])
    return speed, 1000 * (time.perf_counter() - started) / len(images)


def make_report(
    speeds: dict[str, list[tuple[float, float]]], options: argparse.Namespace, size: dict[str, float]
) -> dict[str, Any]:
    rates = {name: statistics.median(speed for speed, _ in rounds) for name, rounds in speeds.items()}
    latencies = {name: statistics.median(latency for _, latency in rounds) for name, rounds in speeds.items()}
    return {
        "images_per_second_over_torch": {name: round(rate / rates["torch"], 3) for name, rate in rates.items()},
        "latency_over_torch": {name: round(value / latencies["torch"], 3) for name, value in latencies.items()},
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "milliseconds_of_one_image": {name: round(value, 2) for name, value in latencies.items()},
        "megabytes": {name: round(value, 1) for name, value in size.items()},
        "settings": {"image_size": load_run(options.run).image_size, "batch_size": options.batch},
        "machine": {"device": platform.processor() or platform.machine(), "threads": threads()},
        **software("torch", "onnxruntime", "onnx"),
    }


if __name__ == "__main__":
    main()
