"""launch/kubernetes: read by Kubeflow's and Kubernetes' own models, and run here as the operators would start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from tools import check, install

FOLDER = ROOT / "launch" / "kubernetes"
MODELS = ROOT / "tests" / "launch" / "kubeflow_models.py"


def documents(name: str) -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.mark.parametrize("file", ["kubernetes/trainjob.yaml", "kubernetes/pytorchjob.yaml", "kubernetes/volume.yaml",
                                  "skypilot/train.yaml", "../configs/sweep.yaml"])  # fmt: skip
def test_a_recipe_has_at_most_three_lines_to_edit(file):
    assert 1 <= (ROOT / "launch" / file).read_text().count("# edit") <= 3


def test_a_runtime_stands_before_the_job_that_names_it():
    """kubectl apply goes by the order of the file, and Trainer's webhook refuses a job whose runtime is not there."""
    assert list(documents("trainjob.yaml")) == ["TrainingRuntime", "TrainJob"]


@pytest.mark.slow
def test_kubeflow_knows_every_key(tmp_path):
    python = install("kubeflow-trainer-api", "kubeflow-training", "pyyaml") / "python"
    files = [FOLDER / "trainjob.yaml", FOLDER / "pytorchjob.yaml"]
    wrong = [tmp_path / file.name for file in files]
    for file, copy in zip(files, wrong, strict=True):
        copy.write_text(file.read_text().replace("backoffLimit:", "backofLimit:"))
    lost = json.loads(check(python, MODELS, *files, *wrong))
    assert [lost[str(file)] for file in files] == [[], []]
    for copy in wrong:  # the check can fail
        (path,) = lost[str(copy)]
        assert path.endswith(".backofLimit")


@pytest.mark.slow
def test_kubernetes_accepts_volume_and_pods(tmp_path):
    job = documents("trainjob.yaml")["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    pod = documents("pytorchjob.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    parts = {
        "job": {"apiVersion": "batch/v1", "kind": "Job", **job},
        "pod": {"apiVersion": "v1", "kind": "Pod", **pod},
        "wrong": {"apiVersion": "v1", "kind": "Pod", "spec": pod["spec"] | {"restart": "Never"}},
    }
    for name, part in parts.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(part | {"metadata": {"name": name}}))
    validate = [install("kubernetes-validate") / "kubernetes-validate", "--strict"]
    check(*validate, FOLDER / "volume.yaml", tmp_path / "job.yaml", tmp_path / "pod.yaml")
    assert subprocess.run([*validate, tmp_path / "wrong.yaml"], capture_output=True).returncode


def start_pods(container: dict, run_dir, variables: list[dict[str, str]], *options: str) -> list[subprocess.Popen]:
    """Start the container's command once for each pod, with what the operator sets, on the smoke config."""
    instead = {
        "configs/fer2013.yaml": str(ROOT / "configs/smoke.yaml"),
        "/volume/data": "",
        "--data.path": "--data.source=synthetic",
        "/volume/runs/fer2013": str(run_dir),
    }
    command = [instead.get(word, word) for word in container["command"] + container["args"]]
    assert command[0] == "torchrun" and set(instead) <= {*container["args"]}
    command = [sys.executable, "-m", "torch.distributed.run", *filter(None, command[1:]), "--track.tool", "none"]
    command += ["--model.backbone", "timm/test_resnet", *options]
    return [
        subprocess.Popen(command, cwd=run_dir.parent, env=os.environ | pod, stderr=subprocess.DEVNULL)
        for pod in variables
    ]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def operator(kind: str) -> tuple[dict, list[dict[str, str]]]:
    """Return a recipe's container and the variables of two pods of one process, as the operator's source sets them."""
    address = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    address["PET_MASTER_PORT"] = free_port()
    if kind == "TrainJob":
        container = documents("trainjob.yaml")[kind]["spec"]["trainer"]
        return container, [address | {"PET_NODE_RANK": rank} for rank in "01"]
    pod = documents("pytorchjob.yaml")[kind]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    address |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address["PET_MASTER_PORT"]}
    return pod["containers"][0], [address | {"PET_NODE_RANK": rank, "RANK": rank} for rank in "01"]


@pytest.mark.slow
def test_two_pods_of_a_pytorchjob_are_one_training(tmp_path):
    container, variables = operator("PyTorchJob")
    pods = start_pods(container, tmp_path / "run", variables)
    assert [pod.wait(200) for pod in pods] == [0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_pods_started_anew_go_on_where_an_evicted_one_left_them(tmp_path):
    options = ("--train.epochs", "4", "--train.max_steps", "48", "--save.every_steps", "4")
    container, variables = operator("TrainJob")
    undisturbed = start_pods(container, tmp_path / "undisturbed", variables, *options)
    assert [pod.wait(200) for pod in undisturbed] == [0, 0]

    container, variables = operator("TrainJob")
    run_dir = tmp_path / "run"
    pods = start_pods(container, run_dir, variables, *options)
    while not any((run_dir / "checkpoints").glob("step_*8")):
        assert pods[0].poll() is None
        time.sleep(0.05)
    pods[1].terminate()
    assert all(pod.wait(60) for pod in pods)
    assert not (run_dir / "summary.json").exists()
    pods = start_pods(container, run_dir, variables, *options)
    assert [pod.wait(200) for pod in pods] == [0, 0]
    found, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "undisturbed"))
    assert found["final_train_loss"] == expected["final_train_loss"]
    assert (found["steps"], found["world_size"], expected["world_size"]) == (48, 2, 2)
