"""How many images per second a device could train at most: by its arithmetic and by its memory.

    python bench/limits.py [--size 48] [--batch 128] [--stem_stride 2]
    python bench/limits.py --flops 989e12 --bandwidth 3.35e12    a device's own figures, here an H100's (SXM, bf16)

Counted are the multiplications and additions of ResNet18's forward and backward pass (torch's FlopCounterMode), and the
bytes that every layer has to move if nothing is kept in a cache or fused: forward each input is read and each
output written, backward twice that, in bf16; and the optimizer's passes over weights, gradients and momentum in fp32.
Without figures the device at hand is measured: a large bf16 matrix product, and a large copy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from reporting import software, write_report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dist_train import FaceModel
from dist_train.processes import default_accelerator


def main() -> None:
    options = parse_options()
    device = default_accelerator().device
    flops, moved = count(options)
    peak = options.flops or measure_matmul(device)
    bandwidth = options.bandwidth or measure_copy(device)
    arithmetic, memory = peak * options.batch / flops, bandwidth * options.batch / moved
    report = {
        "images_per_second": {
            "limit_of_arithmetic": round(arithmetic),
            "limit_of_memory": round(memory),
            "limit_if_one_waits_for_the_other": round(1 / (1 / arithmetic + 1 / memory)),
        },
        "per_image": {
            "gflop": round(flops / options.batch / 1e9, 3),
            "megabytes": round(moved / options.batch / 1e6, 2),
        },
        "device": {"tflops": round(peak / 1e12, 3), "gigabytes_per_second": round(bandwidth / 1e9, 1)},
        "settings": {"size": options.size, "batch": options.batch, "stem_stride": options.stem_stride},
        "threads": torch.get_num_threads(),
        **software("torch", "timm"),
    }
    write_report(report, None)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--stem_stride", type=int, choices=(1, 2), help="as model.stem_stride")
    parser.add_argument(
        "--flops", type=float, help="multiplications and additions per second, in place of a measurement"
    )
    parser.add_argument("--bandwidth", type=float, help="bytes per second, in place of a measurement")
    return parser.parse_args()


def count(options: argparse.Namespace) -> tuple[float, float]:
    """Return the operations and the bytes of one step."""
    model = FaceModel(pretrained=False, stem_stride=options.stem_stride)
    elements = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += 3 * (sum(tensor.numel() for tensor in inputs) + output.numel())

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.rand(options.batch, 1, options.size, options.size))
        F.cross_entropy(logits, torch.zeros(options.batch, dtype=torch.long)).backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    # SGD with momentum reads weight, gradient and momentum and writes weight and momentum
    return counter.get_total_flops(), 2 * elements + 5 * 4 * weights


def measure_matmul(device: torch.device) -> float:
    """Return operations per second of a bf16 matrix product, large enough to hide the start of a GPU's kernel."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.rand(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / fastest(lambda: a @ b)


def measure_copy(device: torch.device, size: int = 2**28) -> float:
    """Return bytes per second, read and written, of a copy."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source))


def fastest(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the seconds of the fastest of some repetitions."""
    seconds = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
