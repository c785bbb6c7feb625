"""Where the time of a step goes: torch's profiler over some steps of a training.

In: the parts of a step as they begin. Out: trace.json, to be opened in https://ui.perfetto.dev, and profile.csv, the
mean milliseconds of each part.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dist_train.files import write_file

logger = logging.getLogger(__name__)

STEPS = {"wait": 3, "warmup": 2, "active": 10}
"""The first steps of a training: those passed over, those profiled to warm up, those recorded."""
PARTS = ("data", "forward", "backward", "reduce", "agree", "optimizer", "logging")


class Profiler:
    """Records the first steps of a training, on every process so that none is slower; the main one writes.

    The parts of a step follow each other without a gap, so their times add up to the step's. On a GPU they are those
    of its own timeline, between events in its stream, and no host waits for them. `reduce` is what backward waits for:
    the all-reduces of the gradients while no gradient is computed, which is taken off `backward`.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path) -> None:
        self.accelerator, self.run_dir = accelerator, run_dir
        self.on_gpu = accelerator.device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []  # of the steps recorded: part, begin, end
        self.written = False
        self._under_way: tuple[str, Any, record_function] | None = None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._profile = profile(
            activities=activities, schedule=schedule(**STEPS, repeat=1), on_trace_ready=self._write, acc_events=True
        )
        self._profile.start()

    def begin(self, part: str) -> None:
        """Begin a part of the training; the one before it ends, and with `logging` the step ends."""
        if self.written:
            return
        self._end()
        region = record_function(part)
        region.__enter__()
        self._under_way = part, self._now(), region

    def close(self) -> None:
        """End, with what there is of a training that was shorter than the steps to be recorded."""
        if not self.written:
            self._end()
            self._profile.stop()
        if not self.written:
            logger.warning("train.profile: the training ended before its step %d, nothing was recorded", _first() + 1)

    def _end(self) -> None:
        if self._under_way is None:
            return
        part, began, region = self._under_way
        region.__exit__(None, None, None)
        if self._profile.step_num >= _first():
            self.spans.append((part, began, self._now()))
        self._under_way = None
        if part == "logging":
            self._profile.step()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _write(self, recorded: profile) -> None:
        if not any(part == "logging" for part, _, _ in self.spans):  # the training ended before a step did
            return
        self.written = True
        if not self.accelerator.is_main_process:
            return
        steps, took = self._measure(recorded)
        hidden, step = took.pop("hidden reduce"), sum(took.values())
        rows = [*took.items(), ("step", step), ("reduce hidden by backward", hidden)]
        table = [(part, f"{ms:.3f}", f"{ms / step:.4f}") for part, ms in rows]
        files = self.run_dir / "trace.json", self.run_dir / "profile.csv"
        try:
            write_file(files[0], lambda file: recorded.export_chrome_trace(str(file)))
            write_file(files[1], lambda file: _write_table(file, table))
        except OSError as error:
            logger.warning("the profile cannot be written (%s); the training goes on", error)
            return
        shares = ", ".join(f"{part} {ms / step:.1%}" for part, ms in took.items())
        logger.info("profile of %d steps of %.1f ms: %s; see %s and %s", steps, step, shares, *files)

    def _measure(self, recorded: profile) -> tuple[int, dict[str, float]]:
        """Return the number of steps and the mean milliseconds of each part, and of the all-reduces that are hidden."""
        steps = sum(part == "logging" for part, _, _ in self.spans)
        took = dict.fromkeys(PARTS, 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        for part, began, ended in self.spans:
            if part in took:
                took[part] += (began.elapsed_time(ended) if self.on_gpu else 1000 * (ended - began)) / steps
        waiting, took["hidden reduce"] = (ms / steps for ms in _reduces(recorded, self.on_gpu))
        took["reduce"] += waiting
        took["backward"] -= waiting
        return steps, took


def _first() -> int:
    return STEPS["wait"] + STEPS["warmup"]


def _reduces(recorded: profile, on_gpu: bool) -> tuple[float, float]:
    """Return the milliseconds of the gradients' all-reduces: while nothing else is computed, and while it is."""
    events = recorded.events() or []
    if on_gpu:  # kernels; the few all-reduces of figures count as well
        kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
        sent = [e for e in kernels if "nccl" in e.name.lower()]
        computed = [e for e in kernels if "nccl" not in e.name.lower()]
    else:
        backward = [e.time_range for e in events if e.name == "backward"]
        sent = [e for e in events if e.name.endswith(":all_reduce")]
        sent = [e for e in sent if any(span.start <= e.time_range.start <= span.end for span in backward)]
        computed = [e for e in events if e.name.startswith("autograd::engine::evaluate_function")]
    waiting = _covered([*sent, *computed]) - _covered(computed)
    return waiting, _covered(sent) - waiting


def _covered(events: Iterable[Any]) -> float:
    """Return the milliseconds in which at least one of the events was under way."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1000


def _write_table(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("part", "ms_per_step", "share"), *rows])
