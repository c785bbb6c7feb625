"""configs/sweep.yaml: accepted by W&B's sweep engine, and a turn of its agent without a server.

The engine (the package sweeps) proposes, wandb's own functions build the agent's command, that command trains with two
processes, and the engine reads the metric from the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tools import check, install
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_file import find_runs, read_history

SWEEP = ROOT / "configs" / "sweep.yaml"
ENGINE = """
import json, random, sys, numpy, sweeps, yaml
from sweeps.config import schema_violations_from_proposed_config as violations
random.seed(0), numpy.random.seed(0)
config = yaml.safe_load(open(sys.argv[1]))
assert violations(config) == [] and violations(config | {"method": "bayess"})
runs = [sweeps.SweepRun(**run) for run in json.loads(sys.argv[2])]
proposed = sweeps.next_run(config, runs, validate=True)
best = [run.metric_extremum(config["metric"]["name"], config["metric"]["goal"]) for run in runs]
print(json.dumps([{name: proposed.config[name] for name in config["parameters"]}, best]))
"""


def ask_engine(runs: list[dict]) -> tuple[dict, list[float]]:
    python = install("sweeps") / "python"
    return tuple(json.loads(check(python, "-W", "ignore", "-c", ENGINE, SWEEP, json.dumps(runs)).splitlines()[-1]))


@pytest.mark.slow
def test_an_agent_trains_with_two_processes_and_the_engine_reads_its_accuracy(tmp_path, monkeypatch, draw_folder):
    monkeypatch.setenv("DATA", str(draw_folder(train=140, validation=70)))
    proposed, _ = ask_engine([])
    sweep = yaml.safe_load(SWEEP.read_text())
    values = {"program": [sweep["program"]], **create_sweep_command_args({"args": proposed})}
    command = [
        part
        for word in map(str, create_sweep_command(sweep["command"]))
        for part in (values[word[2:-1]] if word.startswith("${") else [word])
    ]
    agent = {"WANDB_RUN_ID": "chosen01", "WANDB_SWEEP_ID": "sweep1", "WANDB_PROJECT": "faces", "WANDB_MODE": "offline"}
    agent["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quick = "--model.backbone timm/test_resnet --model.pretrained false --data.image_size 32 --train.epochs 3"
    start = [str(ROOT / word) if word.startswith(("launch/", "configs/")) else word for word in command]
    subprocess.run([*start, *quick.split()], cwd=tmp_path, env=os.environ | agent, check=True, timeout=300)

    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["world_size"], summary["wandb_run_id"]) == (2, "chosen01")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for name, parameter in proposed.items():
        value = config
        for key in name.split("."):
            value = value[key]
        assert value == parameter["value"], name
    (file,) = find_runs(run_dir)
    history = [{"valid/accuracy": row["valid/accuracy"]} for row in read_history(file) if "valid/accuracy" in row]
    run = {"name": "chosen01", "config": proposed, "history": history, "state": "finished"}
    _, best = ask_engine([run | {"summaryMetrics": history[-1]}])
    assert len(history) == 3 and best == [pytest.approx(summary["best_valid_acc"])]
