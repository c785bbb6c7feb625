"""Bad input: exit code 2, one line that names the key, file or value, no traceback, nothing written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dist_train.cli import main

FILES = {
    "typo.yaml": "train:\n  epoch: 3\n",
    "section.yaml": "trian:\n  epochs: 3\n",
    "broken.yaml": "a: [\n",
    "scalar.yaml": "5\n",
    "flat.yaml": "train: 5\n",
    "type.yaml": "train:\n  epochs: many\n",
    "bare_no.yaml": "train:\n  precision: no\n",
    "code.yaml": "!!python/object/apply:os.system ['touch hacked']\n",
    "class.yaml": "data:\n  class_path: os.system\n  init_args: {}\n",
    "notes.txt": "not a csv\n",
    "short.csv": "emotion,pixels\n0,1 2 3\n",
}

SYNTHETIC = ["--data.source", "synthetic", "--model.pretrained", "false"]
FOLDER = ["--model.pretrained", "false", "--data.path"]

CASES = {
    "unknown command": (["tarin"], ["tarin", "train"]),
    "unknown option": (["train", "--train.epoch", "3"], ["train.epoch", "did you mean train.epochs?"]),
    "option without value": (["train", "--train.epochs"], ["--train.epochs"]),
    "stray word": (["train", "now"], ["now"]),
    "unknown key in file": (["train", "--config", "typo.yaml"], ["typo.yaml", "train.epoch", "train.epochs?"]),
    "unknown section": (["train", "--config", "section.yaml"], ["section.yaml", "trian"]),
    "not YAML": (["train", "--config", "broken.yaml"], ["broken.yaml", "not YAML"]),
    "YAML of one number": (["train", "--config", "scalar.yaml"], ["scalar.yaml", "5", "mapping"]),
    "section of one number": (["train", "--config", "flat.yaml"], ["flat.yaml", "train", "mapping"]),
    "no such config": (["train", "--config", "none.yaml"], ["none.yaml", "No such file"]),
    "YAML that would run code": (["train", "--config", "code.yaml"], ["code.yaml", "not YAML"]),
    "wrong type in file": (["train", "--config", "type.yaml"], ["train.epochs", "'many'", "a whole number"]),
    "bare no in YAML": (["train", "--config", "bare_no.yaml"], ["train.precision", "quotes"]),
    "wrong type": (
        ["train", "--train.batch_size", "big"],
        ["train.batch_size", "'big'", "a whole number or one of auto"],
    ),
    "batch of 0": (["train", "--train.batch_size", "0"], ["train.batch_size", "0", ">= 1, or auto"]),
    "wrong type or null": (["train", "--train.clip_grad", "x"], ["train.clip_grad", "a number or null"]),
    "not a bool": (["train", "--model.pretrained", "maybe"], ["model.pretrained", "true or false"]),
    "not a choice": (["train", "--train.precision", "fp8"], ["train.precision", "'fp8'", "auto, no, fp16, bf16"]),
    "zero epochs": (["train", "--train.epochs", "0"], ["train.epochs", "0", ">= 1"]),
    "negative rate": (["train", "--optim.lr", "-1"], ["optim.lr", "-1", "> 0"]),
    "probability of 2": (["train", "--data.augment.flip", "2"], ["data.augment.flip", "2.0", "0 to 1"]),
    "smoothing of 1": (["train", "--train.label_smoothing", "1"], ["train.label_smoothing", "1"]),
    "tiny images": (["train", "--data.image_size", "4"], ["data.image_size", "4", "16"]),
    "csv without path": (["train", "--data.source", "csv"], ["data.path", "csv"]),
    "path for drawn faces": (["train", *SYNTHETIC, "--data.path", "x"], ["data.path", "x", "synthetic"]),
    "no such data": (["train", *FOLDER, "nowhere"], ["data.path", "nowhere", "does not exist"]),
    "folder without train": (["train", *FOLDER, "empty"], ["empty", "train/<class>/*"]),
    "folder around the data": (["train", *FOLDER, "around"], ["no folder train/", "around/images has"]),
    "split without classes": (["train", *FOLDER, "classless"], ["train", "no class folders"]),
    "one class": (["train", *FOLDER, "single"], ["only one class", "happy"]),
    "text in place of csv": (["train", *FOLDER, "notes.txt"], ["notes.txt", "no column"]),
    "zip in place of csv": (["train", *FOLDER, "photos.zip"], ["photos.zip", "neither a folder nor a CSV"]),
    "csv without Usage": (["train", *FOLDER, "short.csv"], ["short.csv", "Usage"]),
    "folder told to be csv": (["train", *FOLDER, "faces", "--data.source", "csv"], ["data.path", "faces", "csv"]),
    "unreadable image": (["train", *FOLDER, "spoiled"], ["bad.png", "1 of", "data.skip_bad"]),
    "unknown backbone": (["train", *SYNTHETIC, "--model.backbone", "resnet81"], ["resnet81", "resnet18?"]),
    "unknown timm model": (["train", *SYNTHETIC, "--model.backbone", "timm/resnt18"], ["resnt18", "resnet18?"]),
    "weights not there": (["train", *SYNTHETIC, "--model.weights", "w.pth"], ["model.weights", "w.pth"]),
    "weights are no weights": (["train", *SYNTHETIC, "--model.weights", "notes.txt"], ["notes.txt", "not a readable"]),
    "weights of another model": (
        ["train", *SYNTHETIC, "--model.weights", "other.pth"],
        ["other.pth", "missing", "conv1"],
    ),
    "weights cannot be fetched": (["train", "--data.source", "synthetic"], ["cannot be fetched", "model.weights"]),
    "unknown optimizer": (["train", *SYNTHETIC, "--optim.name", "adma"], ["optim.name", "adma", "adam"]),
    "fp16 on a CPU": (["train", *SYNTHETIC, "--train.precision", "fp16"], ["train.precision", "fp16", "bf16"]),
    "sync batchnorm on a CPU": (["train", *SYNTHETIC, "--train.sync_batchnorm", "true"], ["train.sync_batchnorm"]),
    "run folder in use": (["train", *SYNTHETIC, "--run_dir", "used"], ["run_dir", "used", "--overwrite"]),
    "overwrite no run": (["train", *SYNTHETIC, "--run_dir", "used", "--overwrite"], ["used", "not a run folder"]),
    "run folder with a link": (["train", *SYNTHETIC, "--run_dir", "linked", "--overwrite"], ["linked", "is a link"]),
    "class_path in YAML": (["train", "--config", "class.yaml"], ["class.yaml", "data.class_path", "no such key"]),
    "run folder is a file": (["train", *SYNTHETIC, "--run_dir", "notes.txt"], ["run_dir", "notes.txt", "file"]),
    "no such checkpoint": (["train", *SYNTHETIC, "--resume", "gone"], ["resume", "gone", "auto, never"]),
    "W&B online without login": (["train", *SYNTHETIC, "--track.wandb", "online"], ["track.wandb", "wandb login"]),
    "log every 0 steps": (["train", *SYNTHETIC, "--track.log_every", "0"], ["track.log_every", "0"]),
    "keep no checkpoint": (["train", *SYNTHETIC, "--save.keep", "0"], ["save.keep", "0"]),
}


@pytest.fixture
def place(tmp_path, monkeypatch, draw_folder) -> Path:
    """A folder with everything that the cases name."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    draw_folder("faces", train=14, validation=7)
    draw_folder("spoiled", train=14, validation=7)
    (tmp_path / "spoiled/train/happy/bad.png").write_bytes(b"\x89PNG")
    for folder in (
        "empty/photos",
        "around/images/train",
        "classless/train",
        "single/train/happy",
        "single/validation/happy",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "validation"):
        picture = next((tmp_path / "faces" / split / "happy").iterdir())
        shutil.copy(picture, tmp_path / "single" / split / "happy")
    (tmp_path / "photos.zip").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.txt").write_text("years of work")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/config.yaml").touch()
    (tmp_path / "linked/checkpoints").symlink_to(tmp_path / "used")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    skipped = {"cache", "torch"}  # decoded images and a hub's empty cache may be left
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not skipped & set(p.parts)}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_line(case, place, capsys):
    arguments, said = CASES[case]
    if arguments[0] == "train" and "--run_dir" not in arguments:
        arguments = [*arguments, "--run_dir", "new"] if case not in ("option without value",) else arguments
    before = contents(place)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dist-train: error:")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in said), lines[0]
    assert contents(place) == before
    assert not (place / "new").exists()


def test_there_is_no_traceback(place):
    command = [sys.executable, "-m", "dist_train", "train", *SYNTHETIC, "--run_dir", "used"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_overwrite_replaces_an_earlier_run(smoke):
    run_dir = smoke("run")
    (run_dir / "mine.txt").touch()
    (run_dir / "checkpoints" / "step_99999999").mkdir()
    smoke("run", code=2)
    assert (run_dir / "checkpoints" / "step_99999999").exists()
    smoke("run", "--overwrite")
    assert not (run_dir / "checkpoints" / "step_99999999").exists()
    assert (run_dir / "mine.txt").exists()


def test_printed_config_is_a_config(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--train.epochs", "7", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["epochs"] == 7
    (tmp_path / "printed.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "printed.yaml"), "--print_config"])
    assert capsys.readouterr().out == text


def test_help_shows_type_default_and_a_line_for_every_key(capsys):
    texts = {}
    for option in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as stop:
            main(["train", option])
        assert stop.value.code == 0
        texts[option] = capsys.readouterr().out
    shown = " ".join(texts["--help"].split())
    assert "Images per optimizer step over all processes" in shown
    assert "(type: Union[int, Literal['auto']], default: 128)" in shown

    def keys(settings: dict, prefix: str = ""):
        for name, value in settings.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    for key in keys(yaml.safe_load(texts["--print_config"])):
        assert re.search(rf"--{re.escape(key)} \S+ .+?\(type: ", shown), key
