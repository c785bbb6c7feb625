"""The configs that are shipped."""

from __future__ import annotations

import pytest
from conftest import ROOT

from dist_train.cli import main
from dist_train.options import train_config

CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml") if file.stem != "sweep")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_read_with_all_of_its_keys(name):
    data = ["--data.path", "DIR"] if name.startswith("fer2013") else []
    config = train_config(["train", "--config", str(ROOT / "configs" / f"{name}.yaml"), *data])
    assert config.model.backbone == "resnet18"


def test_without_config_and_data_it_is_the_quickstart(capsys):
    printed = []
    for options in ([], ["--config", str(ROOT / "configs" / "quickstart.yaml")]):
        with pytest.raises(SystemExit):
            main(["train", *options, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "synthetic" in printed[0]
