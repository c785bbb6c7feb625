"""Real trainings on images that are decoded when needed, of which a file goes bad in the middle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import Training

from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.files import find_fault

pytestmark = pytest.mark.slow


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_that_goes_bad_ends_all_with_the_state_saved_and_a_whole_one_lets_them_go_on(
    tmp_path, draw_folder, split
):
    path, run_dir = draw_folder(), tmp_path / "run"
    data = ("--data.source", "folder", "--data.path", str(path), "--data.residency", "stream")
    training = Training(run_dir, *data, "--train.epochs", "9999", "--train.max_steps", "99999", processes=2)
    training.wait_for("epoch 2/9999:")
    splits = load_splits(DataConfig(path=str(path), residency="stream"))
    file = path / splits[split == "validation"].names[-1]
    whole = file.read_bytes()
    file.write_bytes(b"bad")
    assert training.end() == 1  # accelerate's own
    (line,) = re.findall("dist-train: error: .*", training.output)
    assert str(file) in line and "--resume auto" in line
    ends = set(re.findall(r"exitcode\s*: (-?\d+)", training.output))  # as the launcher saw or made them
    assert {"2"} <= ends <= {"2", "-15"}
    assert find_fault(newest(run_dir)) is None

    file.write_bytes(whole)
    step = int(newest(run_dir).name.removeprefix("step_"))
    more = ("--train.epochs", "9999", "--train.max_steps", str(step + 3), "--resume", "auto")
    training = Training(run_dir, *data, *more, processes=2)
    assert training.end() == 0, training.output
    assert int(newest(run_dir).name.removeprefix("step_")) == step + 3
