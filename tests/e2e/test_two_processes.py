"""What two processes do together, in real launches."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import accelerate_launch
from on_two import SAMPLES, figures
from training import SMALL

PLACE = ("--num_processes", "2", "--main_process_port", "0")
TRAIN = (*PLACE, "-m", "dist_train", "train", *SMALL, "--track.tool", "none")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What tests/e2e/on_two.py writes."""
    file = tmp_path_factory.mktemp("two") / "found.json"
    command = accelerate_launch("multi_cpu", *PLACE, str(Path(__file__).with_name("on_two.py")), str(file))
    subprocess.run(command, check=True, timeout=300)
    return json.loads(file.read_text())


def test_micro_batches_of_uneven_shares_are_the_training_of_one_process(found):
    """10 and 11 images a step over 2 processes, each share in 4 parts."""
    alone = figures()["fp32"]["losses"]
    assert found["fp32"]["losses"] == pytest.approx(alone, abs=1e-5)
    assert found["accumulated"]["losses"] == pytest.approx(alone, abs=1e-5)


def test_gradients_are_sent_in_bf16_where_asked(found):
    assert found["bf16"]["rounded"] and not found["fp32"]["rounded"]
    assert found["bf16"]["losses"] == pytest.approx(found["fp32"]["losses"], abs=1e-3)
    assert found["bf16"]["losses"] != found["fp32"]["losses"]


def test_a_process_that_streams_beside_one_that_holds_all_images(found):
    """data.residency auto looks at the free memory of each machine."""
    assert found["one streams"] == found["fp32"]


def test_sharded_weights_that_are_validated_first_can_be_trained_after_it(found):
    """As after a resume from the last step of an epoch."""
    assert found["sharded"] == [0.0, 0.0]


def test_sharded_weights_and_momentum_come_back_from_a_checkpoint(found):
    assert found["restored"] == [True] * 8


def test_a_shuffled_validation_loader_counts_each_sample_once(found):
    assert found["counted"] == [1] * SAMPLES


def test_pictures_need_only_the_main_processs_view_of_the_run_folder(found):
    """A disk that machines share may show the others its newest files late."""
    assert found["pictures"] == ["curves.png", "predictions.png"]


def test_a_loader_that_accelerate_has_made_repeat_samples_is_refused(found):
    assert "give the one before it" in found["refusal"]


def test_a_loss_of_one_process_that_is_not_finite_lets_both_skip_the_step(found):
    assert found["one is bad"]["skipped"] == [True, True]
    assert found["one is bad"]["weights"][0] == found["one is bad"]["weights"][1]
    assert found["one is bad"]["finite"]


def test_the_main_process_of_a_machine_reads_first(found):
    (_, ended), (started, _) = found["turns"]
    assert ended <= started


@pytest.mark.slow
def test_who_waits_too_long_for_the_data_is_told_how_to_wait_longer(launch, tmp_path, monkeypatch):
    script = tmp_path / "slow_data.py"
    script.write_text(
        "import time\n"
        "from dist_train.config import TrainConfig\n"
        "from dist_train.processes import build_accelerator, local_main_first\n"
        "local_main_first(build_accelerator(TrainConfig(precision='no')), time.sleep, 60)\n"
    )
    monkeypatch.setenv("DIST_TRAIN_TIMEOUT", "5")
    done = launch("multi_cpu", *PLACE, str(script), succeeds=False)
    assert "process 1 has waited 5 s" in done.stderr and "DIST_TRAIN_TIMEOUT" in done.stderr


@pytest.mark.slow
def test_bad_data_is_told_once_and_ends_with_2(launch, tmp_path, draw_folder):
    """The launcher ends with SIGTERM whoever has not yet left when it sees that another has."""
    data = draw_folder(train=14, validation=7)
    (data / "train" / "happy" / "bad.png").write_bytes(b"\x89PNG")
    options = ("--data.source", "folder", "--data.path", str(data), "--run_dir", str(tmp_path / "run"))
    done = launch("multi_cpu", *TRAIN, *options, succeeds=False)
    (line,) = [line for line in done.stderr.splitlines() if "dist-train: error:" in line]
    assert "bad.png" in line and "data.skip_bad" in line
    assert {"2"} <= set(re.findall(r"exitcode\s*: (-?\d+)", done.stderr)) <= {"2", "-15"}
    assert not (tmp_path / "run").exists()
