"""Read manifests (arguments) into Kubeflow's own models; print the keys lost, unknown ones, by file."""

import json
import sys
from pathlib import Path

import yaml
from kubeflow.training import models as v1
from kubeflow_trainer_api import models as v2
from kubernetes import client


def read(manifest):
    if manifest["apiVersion"] == "kubeflow.org/v1":
        vars(client.models).update(vars(v1))  # where the deserializer looks names up
        api = client.ApiClient()
        kind = getattr(v1, f"KubeflowOrgV1{manifest['kind']}")
        return api.sanitize_for_serialization(api.deserialize(Response(manifest), kind))
    return getattr(v2, f"TrainerV1alpha1{manifest['kind']}").from_dict(manifest).to_dict()


class Response:
    def __init__(self, manifest):
        self.data = json.dumps(manifest)


def paths(value, path=""):
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {leaf for key, part in pairs for leaf in paths(part, f"{path}.{key}")}
    return {path}


lost = {}
for file in sys.argv[1:]:
    for manifest in yaml.safe_load_all(Path(file).read_text()):
        lost.setdefault(file, []).extend(paths(manifest) ^ paths(read(manifest)))
sys.stdout.write(json.dumps(lost))
