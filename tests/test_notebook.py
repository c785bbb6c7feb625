from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torchvision


def test_the_notebooks_code_runs_as_it_was_written(draw_folder, tmp_path):
    data = draw_folder(train=133, validation=70)
    safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.safetensors")
    script = Path(__file__).with_name("notebook.py")
    command = [sys.executable, str(script), str(data), str(tmp_path), str(tmp_path / "resnet18.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("curves.png", "results.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "\r" not in done.stderr  # no progress bars in a log file
