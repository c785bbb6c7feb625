"""The places' own tools, each in a virtual environment of its own."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest


@cache
def install(*packages: str) -> Path:
    """Return the bin folder of a new environment with `packages`; skip where they cannot be had."""
    home = Path(tempfile.mkdtemp(prefix="dist_train_tools_"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = subprocess.run([home / "bin/pip", "install", "-q", *packages], capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"pip cannot install {' '.join(packages)} here: {pip.stderr.strip().splitlines()[-1]}")
    return home / "bin"


def check(*command: str | Path, **options) -> str:
    """Run a tool that must accept what it is given; return its output."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
