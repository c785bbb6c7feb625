"""dist-train predict: tables of labels, faces found, videos smoothed, and files that mean no good."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import FACE, make_cases
from PIL import Image
from scenes import compose

from dist_train import FaceModel, load_run
from dist_train.cli import main
from dist_train.data.decode import decode_image
from dist_train.data.synthetic import draw_faces
from dist_train.inference import Face
from dist_train.sources import printable
from dist_train.tracks import Smoother

SQUARES = [(60, 120, 220, 280), (380, 160, 520, 300)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with random weights, trained (so it says) on gray images."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = FaceModel(pretrained=False, image_size=48, gray=True)
    torch.nn.init.normal_(model.backbone.fc.weight, std=0.3)  # type: ignore[union-attr]
    model.save(folder / "best")
    return folder


@pytest.fixture
def face_files(tmp_path: Path) -> list[Path]:
    files = []
    for i, image in enumerate(draw_faces(5, seed=1)[0]):
        files.append(tmp_path / "faces" / f"{i}.png")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(files[-1])
    return files


def predict(run_dir: Path, *arguments: object, code: int = 0) -> list[dict[str, str]]:
    """Run dist-train predict and return the rows of its CSV file."""
    out = run_dir.parent / "out.csv"
    out.unlink(missing_ok=True)
    assert main(["predict", str(run_dir), *map(str, arguments), "--out", str(out)]) == code
    return list(csv.DictReader(out.read_text().splitlines())) if out.exists() else []


def shares(row: dict[str, str]) -> np.ndarray:
    return np.array([float(value) for name, value in row.items() if name.startswith("p_")])


def expected(run_dir: Path, file: Path) -> np.ndarray:
    """What the model itself says of an image decoded as in training."""
    with torch.inference_mode():
        return load_run(run_dir)(torch.tensor(decode_image(file, 48))[None, None]).softmax(1)[0].numpy()


def test_probabilities_are_the_models(run_dir: Path, face_files: list[Path]) -> None:
    rows = predict(run_dir, face_files[0].parent)
    assert [row["file"] for row in rows] == list(map(str, face_files))
    for row, file in zip(rows, face_files, strict=True):
        np.testing.assert_allclose(shares(row), expected(run_dir, file), atol=1e-5)
        assert row["label"] == max((float(v), k) for k, v in row.items() if k.startswith("p_"))[1].removeprefix("p_")
        assert float(row["confidence"]) == shares(row).max() and row["left"] == row["frame"] == ""


def test_colour_is_taken_out_as_training_does_it(run_dir: Path, tmp_path: Path) -> None:
    colour = compose([(0, 0, 160, 160)], size=(160, 160))
    for name, picture in {"colour.png": colour, "gray.png": colour.convert("L")}.items():
        picture.save(tmp_path / name)
    in_colour, in_gray = predict(run_dir, tmp_path / "colour.png", tmp_path / "gray.png")
    np.testing.assert_allclose(shares(in_colour), shares(in_gray), atol=1e-5)
    with torch.inference_mode():  # and the model by itself, in a notebook
        itself = load_run(run_dir)(torch.tensor(decode_image(tmp_path / "colour.png", 48)).permute(2, 0, 1)[None])
    np.testing.assert_allclose(itself.softmax(1)[0].numpy(), shares(in_gray), atol=0.01)
    assert not np.allclose(shares(in_colour), 1 / 7, atol=0.05)


def test_inputs_are_named_in_five_ways(run_dir: Path, face_files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = face_files[0].parent
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{face_files[3]}\n\n{face_files[4]}\n"))
    rows = predict(run_dir, face_files[0], f"{folder}/[12].png", "-", folder)
    assert [Path(row["file"]).stem for row in rows] == ["0", "1", "2", "3", "4"]  # each once


def test_formats_hold_the_same_rows(run_dir: Path, face_files: list[Path], tmp_path: Path, capsys) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow (the extra predict)")
    from pyarrow import parquet

    rows = predict(run_dir, *face_files)
    for ending in ("jsonl", "parquet"):
        assert main(["predict", str(run_dir), *map(str, face_files), "--out", str(tmp_path / f"out.{ending}")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == lines
    assert [{k: "" if v is None else str(v) for k, v in line.items()} for line in lines] == rows
    capsys.readouterr()
    assert main(["predict", str(run_dir), *map(str, face_files)]) == 0
    assert list(csv.DictReader(capsys.readouterr().out.splitlines())) == rows


def test_bad_files_are_skipped_or_refused(
    run_dir: Path, face_files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    with caplog.at_level("WARNING", "dist_train"):
        rows = predict(run_dir, face_files[0], tmp_path / "bad.png", tmp_path / "gone.png")
    assert len(rows) == 1
    assert "bad.png: not a picture of a known kind" in caplog.text and "gone.png: does not exist" in caplog.text
    assert len(predict(run_dir, face_files[0], tmp_path / "bad.png", "--strict", code=2)) == 1
    assert predict(run_dir, tmp_path / "bad.png", code=2) == []


def test_faces_are_found_and_drawn(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("facenet_pytorch", reason="finding faces needs facenet-pytorch (the extra predict)")
    compose(SQUARES).resize((2560, 1920)).save(tmp_path / "two.png")  # larger than what is looked at
    compose([]).save(tmp_path / "none.png")
    rows = predict(run_dir, tmp_path / "two.png", tmp_path / "none.png", "--faces", "--pictures", tmp_path / "shown")
    boxes = [[int(row[edge]) / 4 for edge in ("left", "top", "right", "bottom")] for row in rows]
    assert len(boxes) == 2 and all(Path(row["file"]).name == "two.png" for row in rows)
    for box, square in zip(sorted(boxes), SQUARES, strict=True):
        assert np.abs(np.subtract(box, square)).max() < 25 and abs((box[2] - box[0]) - (box[3] - box[1])) <= 1
    shown = sorted((tmp_path / "shown").iterdir())
    assert [file.name for file in shown] == ["000000-two.jpg", "000001-none.jpg"]
    plain = np.asarray(compose(SQUARES).resize((1600, 1200)), dtype=int)
    changed = np.abs(np.asarray(Image.open(shown[0]), dtype=int) - plain).max(2) > 60
    assert changed.mean() > 0.005 and changed[:100].sum() == 0


def test_video_is_read_and_smoothed(run_dir: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos need PyAV (the extra predict)")
    first, second = (Image.fromarray(image[0]).convert("RGB").resize((96, 96)) for image in draw_faces(2, seed=1)[0])
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 96
        for picture in [first] * 4 + [second] * 4:
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    sharp = np.stack([shares(row) for row in predict(run_dir, tmp_path / "film.mp4", "--smoothing", 0)])
    rows = predict(run_dir, tmp_path / "film.mp4", "--smoothing", 0.5)
    assert [row["frame"] for row in rows] == list("01234567")
    average = sharp[0]
    for row, now in zip(rows, sharp, strict=True):
        average = 0.5 * average + 0.5 * now
        np.testing.assert_allclose(shares(row), average, atol=1e-5)
    assert np.abs(sharp[4] - sharp[3]).max() > 0.1  # else there was nothing to smooth
    assert [row["frame"] for row in predict(run_dir, tmp_path / "film.mp4", "--every", 3)] == ["0", "3", "6"]


def test_a_video_without_pictures_is_named(run_dir: Path, tmp_path: Path, capsys) -> None:
    av = pytest.importorskip("av", reason="videos need PyAV (the extra predict)")
    with av.open(str(tmp_path / "film.avi"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 96
        film.start_encoding()
    assert main(["predict", str(run_dir), str(tmp_path / "film.avi")]) == 2
    assert "film.avi: no pictures in it" in capsys.readouterr().err


def test_smoother_tells_faces_apart() -> None:
    left, right = (0, 0, 10, 10), (50, 0, 60, 10)
    sure, unsure = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    smoother = Smoother(0.5)
    smoother([Face(left, sure), Face(right, unsure)])
    moved, stayed = smoother([Face((52, 0, 62, 10), sure), Face(left, sure)])
    assert moved.probabilities.tolist() == [0.75, 0.25] and stayed.probabilities.tolist() == [1.0, 0.0]
    for _ in range(20):
        smoother([])
    assert smoother([Face(left, unsure)])[0].probabilities.tolist() == [0.5, 0.5]  # forgotten


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "no run": (["nowhere", "x.png"], ["nowhere", "does not exist"]),
        "empty folder": (["RUN", "empty"], ["empty", "no pictures"]),
        "ending": (["RUN", "empty/..", "--out", "x.xls"], ["--out", "x.xls", ".csv"]),
        "out in no folder": (["RUN", "empty/..", "--out", "no/x.csv"], ["--out", "no/x.csv", "no such folder"]),
        "out not to be written": (["RUN", "x.png", "--out", "/proc/x.csv"], ["--out", "/proc/x.csv", "cannot be"]),
        "pictures is a file": (["RUN", "x.png", "--pictures", "x.png"], ["--pictures", "x.png", "cannot be written"]),
        "smoothing": (["RUN", "empty/..", "--smoothing", "1"], ["--smoothing", "1.0"]),
        "every": (["RUN", "empty/..", "--every", "0"], ["--every", "0", ">= 1"]),
    }.values(),
)  # fmt: skip
def test_bad_arguments(
    arguments: list[str], words: list[str], run_dir: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Image.new("L", (48, 48)).save("x.png")
    assert main(["predict", *[str(run_dir) if word == "RUN" else word for word in arguments]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dist-train: error:") and all(word in error for word in words), error
    assert sorted(file.name for file in Path().iterdir()) == ["empty", "x.png"]


@pytest.mark.slow
def test_two_hundred_hostile_files(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answer or clear refusal, no crash, bounded memory; no file is run, written or fetched."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    monkeypatch.chdir(folder)
    cases = make_cases(folder, Image.fromarray(draw_faces(1, seed=4)[0][0, 0]))
    assert len(cases) >= 200 and len({case.path for case in cases}) == len(cases)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "dist_train", "predict", str(run_dir), "-", "--out", str(tmp_path / "out.jsonl")]
    names = b"\n".join(os.fsencode(case.path) for case in cases)
    with (tmp_path / "names").open("wb+") as stdin, (tmp_path / "err").open("w+") as stderr:
        stdin.write(names)
        stdin.seek(0)
        process = subprocess.Popen(command, stdin=stdin, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        stderr.seek(0)
        errors = stderr.read()
    assert os.waitstatus_to_exitcode(status) == 0, errors[-3000:]
    assert "Traceback" not in errors
    assert usage.ru_maxrss < 3 * 2**20, f"{usage.ru_maxrss / 2**20:.2f} GiB"  # 0.5 GiB of it is torch
    rows = {row["file"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    right = np.array([rows[FACE][name] for name in rows[FACE] if name.startswith("p_")])
    for case in cases:
        name = printable(case.path)
        if case.due == "refusal":
            assert name not in rows, case
        if name not in rows:
            assert case.due in ("refusal", "either"), case
            assert f"skipped {name}: " in errors, case
            continue
        found = np.array([rows[name][key] for key in rows[name] if key.startswith("p_")])
        assert abs(found.sum() - 1) < 1e-4
        if case.due == "same":
            np.testing.assert_allclose(found, right, atol=1e-5, err_msg=str(case))
    assert set(folder.iterdir()) == before


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes a package look as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("facenet_pytorch", ["--faces"]), ("pyarrow", ["--out", "x.parquet"]), ("av", ["film.mp4"])],
)
def test_missing_packages_are_named(
    package: str, arguments: list[str], without, run_dir: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (48, 48)).save("x.png")
    without(package)
    assert main(["predict", str(run_dir), "x.png", *arguments]) == 2
    assert "pip install 'dist_train[predict]'" in capsys.readouterr().err
