"""A real launch in the background: its output can be awaited, its processes can be signalled and killed."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from conftest import SMALL, accelerate_launch


def find_trainings(parent: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    """Return the processes under `parent` that train; one that has ended, reaped or not, is none."""
    found = []
    for child in parent.children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):  # of which ZombieProcess is one
            if "dist_train" in child.cmdline():
                found.append(child)
    return found


class Training:
    """`python -m dist_train train ...` on one process, or on more under accelerate launch."""

    def __init__(self, run_dir: Path, *options: str, processes: int = 1, launch: tuple[str, ...] = (), **settings: Any):
        arguments = ["-m", "dist_train", "train", *SMALL, "--run_dir", str(run_dir), "--track.tool", "none", *options]
        command = [sys.executable, *arguments]
        if processes > 1:
            place = ("--num_processes", str(processes), "--main_process_port", "0")
            command = accelerate_launch("multi_cpu", *place, *launch, *arguments)
        self.log = run_dir.with_name(f"{run_dir.name}.{time.monotonic_ns()}.log")
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=run_dir.parent, **settings)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, count: int = 1, seconds: float = 120) -> None:
        """Wait until `text` has been written `count` times."""
        end = time.monotonic() + seconds
        while self.output.count(text) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.output[-3000:]
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """Return the training processes, by rank."""
        if self.process.args[1] == "-m" and self.process.args[2] == "dist_train":
            return [psutil.Process(self.process.pid)]
        found = find_trainings(psutil.Process(self.process.pid))
        return sorted(found, key=lambda child: child.environ()["RANK"])

    def end(self, seconds: float = 200) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)
