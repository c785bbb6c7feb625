"""Real trainings that are killed, stopped, starved of disk: nothing right is lost (`make test-faults`)."""

from __future__ import annotations

import csv
import random
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import accelerate_launch
from safetensors.torch import load_file
from training import Training, find_trainings

from dist_train import load_run
from dist_train.checkpoint import find_checkpoint, list_checkpoints
from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.data.loader import ImageLoader
from dist_train.files import find_fault

pytestmark = [pytest.mark.slow, pytest.mark.faults]

OFTEN = ("--save.every_steps", "2", "--train.epochs", "8", "--train.max_steps", "96", "--train.ema", "0.9")
KILLS = 20


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Trainings side by side, each with one thread; none outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for child in find_trainings(psutil.Process(), recursive=True):
        child.kill()


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return all weights, averaged ones included, at the end of a training, and its best model's."""
    last = list_checkpoints(run_dir / "checkpoints")[-1]
    files = {"model": last / "model.safetensors", "ema": last / "ema.safetensors"}
    tensors = {f"{kind}.{key}": value for kind, file in files.items() for key, value in load_file(file).items()}
    return tensors | {f"best.{key}": value for key, value in load_run(run_dir).state_dict().items()}


def history(run_dir: Path) -> list[list[str]]:
    with (run_dir / "history.csv").open() as file:
        return [row[:5] for row in csv.reader(file)]


def assert_same(run_dir: Path, whole: Path) -> None:
    assert history(run_dir) == history(whole)
    tensors, same = final(run_dir), final(whole)
    assert tensors.keys() == same.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, same[name])]
    assert not different


def saving(run_dir: Path, since: float) -> bool:
    with suppress(FileNotFoundError):  # it has been renamed meanwhile
        return any(path.stat().st_mtime > since for path in (run_dir / "checkpoints").glob(".step_*"))
    return False


def kill_once(run_dir: Path, seconds: float, while_saving: bool) -> tuple[float, int, str]:
    """Go on with a training and kill it so many seconds later, or at the first save after that; return where it was."""
    started, goes_on = time.time(), find_checkpoint(run_dir, "auto")
    training = Training(run_dir, *OFTEN, "--resume", "auto")
    training.wait_for("resumed from" if goes_on else "data: ")
    time.sleep(seconds)
    while while_saving and not saving(run_dir, started) and training.process.poll() is None:
        time.sleep(0.0005)
    training.process.send_signal(signal.SIGKILL)
    training.end()
    state = "saving" if saving(run_dir, started) else "between saves"
    found = find_checkpoint(run_dir, "auto")
    return seconds, int(found.name[5:]) if found else 0, state


def test_killed_at_20_moments_and_resumed_the_weights_are_the_undisturbed_ones(tmp_path):
    """Two trainings, ten times each."""
    whole = tmp_path / "whole"
    undisturbed = Training(whole, *OFTEN)
    undisturbed.wait_for("data: ")
    started = time.monotonic()
    assert undisturbed.end() == 0
    length = time.monotonic() - started
    draw = random.Random(0)
    moments = [(draw.uniform(0, 0.15 * length), number % 4 < 2) for number in range(KILLS)]

    def kill_ten_times(first: int) -> list[tuple[float, int, str]]:
        run_dir = tmp_path / f"killed{first}"
        rows = [kill_once(run_dir, *moment) for moment in moments[first::2]]
        assert Training(run_dir, *OFTEN, "--resume", "auto").end() == 0
        assert_same(run_dir, whole)
        return rows

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(kill_ten_times, (0, 1))
    print("\nkill  after s  newest whole step  while")
    for number, (seconds, step, state) in enumerate(first + second):
        print(f"{number:4d}  {seconds:7.2f}  {step:17d}  {state}")
    assert sum(state == "saving" for _, _, state in first + second) >= 3
    assert max(step for _, step, _ in first + second) > 24  # else the later steps were never disturbed


def test_a_killed_process_of_two_is_restarted_20_times_and_the_weights_are_the_undisturbed_ones(tmp_path):
    """accelerate launch --max_restarts starts both again, which resume by themselves; gradients are sent in bf16."""
    # more steps than the attempts can do before the last kill
    options = (*OFTEN, "--train.epochs", "40", "--train.max_steps", "400", "--train.bf16_gradients", "true")
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    assert Training(whole, *options, processes=2).end() == 0
    again = ("--resume", "auto")
    training = Training(run_dir, *options, *again, processes=2, launch=("--max_restarts", str(KILLS)))
    draw, rows = random.Random(1), []
    for number in range(KILLS):
        training.wait_for("data: ", number + 1)
        time.sleep(draw.uniform(0.3, 1.2))
        rank = draw.randrange(2)
        newest = find_checkpoint(run_dir, "auto")
        training.workers()[rank].kill()
        rows.append((rank, newest.name if newest else "none"))
    assert training.end(600) == 0
    assert_same(run_dir, whole)
    print("\nkill  rank  newest whole checkpoint")
    for number, (rank, name) in enumerate(rows):
        print(f"{number:4d}  {rank:4d}  {name}")


LONG = ("--train.epochs", "1000", "--train.max_steps", "100000", "--save.every_epochs", "1000")


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 2), ("SIGINT", 2), ("SIGUSR1", 1)])
def test_a_signal_to_any_process_ends_all_with_the_state_saved(tmp_path, name, processes):
    run_dir = tmp_path / "run"
    training = Training(run_dir, *LONG, processes=processes)
    training.wait_for("epoch 1/")
    workers = training.workers()
    workers[-1].send_signal(signal.Signals[name])
    code = training.end(60)
    assert code == 75 if processes == 1 else "exitcode  : 75" in training.output
    assert "state saved; go on with --resume auto" in training.output
    assert "Traceback (most recent call last):\n  File" not in training.output or processes > 1
    saved = find_checkpoint(run_dir, "auto")
    assert saved is not None
    step = int(saved.name[5:])
    assert f"after step {step}," in training.output
    goes_on = Training(run_dir, *LONG, "--resume", "auto", "--train.max_steps", str(step + 2), processes=processes)
    assert goes_on.end() == 0
    assert f": step {step}, epoch" in goes_on.output


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_soon_when_a_process_is_killed(tmp_path, rank):
    run_dir = tmp_path / "run"
    training = Training(run_dir, *LONG, "--save.every_epochs", "1", processes=2)
    training.wait_for("epoch 2/")  # the first epoch's checkpoint is then written
    training.workers()[rank].kill()
    started = time.monotonic()
    assert training.end(60) == 1
    assert time.monotonic() - started < 30
    assert f"process {rank} does not answer" in training.output
    assert "start the same command with --resume auto" in training.output
    assert find_checkpoint(run_dir, "auto")


def test_a_full_disk_fails_saves_but_not_the_training(tmp_path):
    """The size that files may have is lowered under the running process, then raised again."""
    run_dir = tmp_path / "run"
    training = Training(run_dir, *LONG, "--save.every_epochs", "1", "--train.max_steps", "300")
    training.wait_for("epoch 1/")
    while not list_checkpoints(run_dir / "checkpoints"):
        time.sleep(0.05)
    resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    training.wait_for("cannot be saved")
    kept = [path for path in list_checkpoints(run_dir / "checkpoints") if find_fault(path) is None]
    assert kept
    resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert training.end() == 0
    assert "Traceback" not in training.output
    newest = find_checkpoint(run_dir, "auto")
    assert newest and newest.name == "step_00000300"
    assert load_run(run_dir)


def test_places_that_cannot_be_written_are_told_in_one_line(smoke, draw_folder, tmp_path, capsys):
    smoke("run", "--run_dir", "/proc/run", code=2)
    assert "/proc/run" in capsys.readouterr().err.splitlines()[-1]
    cache = ("--data.source", "folder", "--data.path", str(draw_folder()), "--data.cache")
    for folder, said in (("/proc/cache", "cannot keep decoded images"), (str(tmp_path / "cache"), "best")):
        smoke(Path(folder).parent.name, *cache, folder)
        said_all = capsys.readouterr().err
        assert said in said_all and "Traceback" not in said_all


def test_a_checkpoint_of_two_processes_goes_on_on_one_and_on_three_within_an_epoch(tmp_path):
    """The samples of all steps of the epoch, in order, are exactly its permutation."""
    script = Path(__file__).with_name("sample_order.py")
    seen = []
    for processes, steps in ((2, 4), (1, 7), (3, 12)):
        place = ("--num_processes", str(processes), "--main_process_port", "0")
        recipe = ("cpu",) if processes == 1 else ("multi_cpu", *place)
        out = tmp_path / f"{processes}.txt"
        command = accelerate_launch(*recipe, str(script), str(tmp_path / "run"), str(steps), str(out))
        assert subprocess.run(command, timeout=200).returncode == 0
        seen += [int(word) for word in out.read_text().split()]
    train, _ = load_splits(DataConfig(count=420))
    order = [n for batch in ImageLoader(train, 32, shuffle=True) for n in batch.samples.tolist()]
    assert sorted(seen) == list(range(len(train)))
    assert seen == order
