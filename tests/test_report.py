"""Tests of `dist-train evaluate`: figures, the page, the stored temperature, two processes, a real browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import links, make_run
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from dist_train import load_run
from dist_train.cli import main
from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.data.synthetic import draw_faces
from dist_train.evaluation import judge

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><b>&amp;'\"", "plain")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of three classes, two of them and all files with HTML in their names, 2 of 30 files leaked."""
    for split, count in (("train", 30), ("validation", 30)):
        images, _ = draw_faces(count, seed=len(split))
        for i, image in enumerate(images):
            file = tmp_path / "data" / split / HOSTILE[i % 3].replace("/", "∕") / f'<i onclick="x">{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(file)
    for leaked in sorted((tmp_path / "data/train/plain").iterdir())[:2]:
        shutil.copy(leaked, tmp_path / "data/validation/plain" / f"copy {leaked.name}")
    return tmp_path / "data"


def test_figures_are_those_of_sklearn_and_the_page_is_whole(tmp_path):
    run_dir = make_run(tmp_path / "run", DataConfig(count=140))
    assert main(["evaluate", str(run_dir)]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    _, faces = load_splits(DataConfig(count=140))
    shares = judge(load_run(run_dir), faces.images)
    predicted = shares.argmax(1)
    assert report["accuracy"] == pytest.approx(accuracy_score(faces.labels, predicted), abs=1e-6)
    assert report["macro_f1"] == pytest.approx(f1_score(faces.labels, predicted, average="macro"), abs=1e-6)
    table = np.array(precision_recall_fscore_support(faces.labels, predicted, labels=range(7), zero_division=0)).T
    assert np.allclose([list(row.values())[1:] for row in report["classes"]], table, atol=1e-6)
    assert report["images"] == len(faces) and report["run"] == "run"
    page = (run_dir / "report.html").read_text()
    assert links(page) == set()
    assert page.count("<svg") == 3 and page.count("data:image/jpeg") > 20
    assert f"{100 * report['accuracy']:.1f}\N{NARROW NO-BREAK SPACE}%" in page


def test_names_with_html_are_escaped_and_leaks_are_counted(tmp_path, hostile):
    run_dir = make_run(tmp_path / "<u>run", DataConfig(path=str(hostile)))
    assert main(["evaluate", str(run_dir), "--tta"]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["images"], report["images_seen_in_training"], report["clean_images"]) == (32, 2, 30)
    assert report["tta"] is True
    page = (run_dir / "report.html").read_text()
    for name in ("<img src=x", "<b>&amp;", "<i onclick", "<u>run"):
        assert name not in page
    for name in ("&lt;img src=x onerror", "&lt;b&gt;&amp;amp;", "&lt;i onclick=", "&lt;u&gt;run"):
        assert name in page


def test_the_test_split_is_judged_when_asked_for(tmp_path, draw_folder):
    path, names = draw_folder(train=35, validation=70), []
    for file in sorted(path.rglob("*.png")):
        split = "train" if "train" in file.parts else ("validation", "test")[int(file.stem) % 2]
        names.append(f"{file.relative_to(path)},{split}\n")
    splits = tmp_path / "splits.csv"
    splits.write_text("path,split\n" + "".join(names))
    run_dir = make_run(tmp_path / "run", data := DataConfig(path=str(path), splits=str(splits)))
    assert main(["evaluate", str(run_dir), "--split", "test"]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    _, test = load_splits(data, "test")
    right = (judge(load_run(run_dir), test.images).argmax(1) == test.labels).mean()
    assert (report["split"], report["images"]) == ("test", len(test))
    assert report["accuracy"] == pytest.approx(right, abs=1e-6)
    assert "test images" in " ".join((run_dir / "report.html").read_text().split())


def test_data_may_have_moved(tmp_path, hostile):
    run_dir = make_run(tmp_path / "run", DataConfig(path=str(hostile)))
    assert main(["evaluate", str(run_dir)]) == 0
    before = (run_dir / "report.json").read_text()
    hostile.rename(tmp_path / "moved")
    assert main(["evaluate", str(run_dir)]) == 2
    assert main(["evaluate", str(run_dir), "--data.path", str(tmp_path / "moved")]) == 0
    assert (run_dir / "report.json").read_text() == before


def test_the_page_offers_to_calibrate_only_where_that_is_not_refused(tmp_path):
    run_dir = make_run(tmp_path / "run", DataConfig(count=140))
    for options, offered in (([], True), (["--tta"], False)):
        assert main(["evaluate", str(run_dir), *options]) == 0
        assert ("--calibrate" in (run_dir / "report.html").read_text()) == offered


def test_a_stored_temperature_is_applied_and_then_fits(tmp_path):
    run_dir = make_run(tmp_path / "run", DataConfig(count=140))
    assert main(["evaluate", str(run_dir), "--calibrate"]) == 0
    first = json.loads((run_dir / "report.json").read_text())
    assert load_run(run_dir).temperature == pytest.approx(first["temperature"])
    assert main(["evaluate", str(run_dir), "--calibrate"]) == 0
    second = json.loads((run_dir / "report.json").read_text())
    assert abs(first["temperature"] - 1) > 0.05
    assert second["temperature"] == pytest.approx(1, abs=1e-3)
    assert second["accuracy"] == first["accuracy"]
    assert load_run(run_dir).temperature == pytest.approx(first["temperature"], rel=1e-3)


def test_bad_input_is_told_in_one_line(tmp_path, hostile, capsys):
    run_dir = make_run(tmp_path / "run", DataConfig(count=140))
    (tmp_path / "half").mkdir()
    shutil.copy(run_dir / "config.yaml", tmp_path / "half")
    cases = {
        ("evaluate", str(tmp_path)): "no config.yaml",
        ("evaluate", str(tmp_path / "half")): "not the folder of a finished epoch",
        ("evaluate", str(run_dir), "--data.path", str(hostile)): "its classes are",
        ("evaluate", str(run_dir), "--data.path", str(tmp_path / "nowhere")): "does not exist",
        ("evaluate", str(run_dir), "--split", "test"): "has no test split",
        ("evaluate", str(run_dir), "--split", "test", "--calibrate"): "--calibrate",
        ("evaluate", str(run_dir), "--tta", "--calibrate"): "without --tta",
        ("evaluate",): "run",
    }
    for arguments, said in cases.items():
        assert main(list(arguments)) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dist-train: error:")]
        assert len(lines) == 1 and said in lines[0]
    assert not (run_dir / "report.json").exists()


@pytest.mark.slow
def test_three_processes_report_what_one_does(launch, tmp_path):
    run_dir = make_run(tmp_path / "run", DataConfig(count=2010))
    launch("cpu", "-m", "dist_train", "evaluate", str(run_dir))
    alone = json.loads((run_dir / "report.json").read_text())
    assert alone["images"] % 3
    (run_dir / "report.json").unlink()
    place = ("--num_processes", "3", "--main_process_port", "0")
    done = launch("multi_cpu", *place, "-m", "dist_train", "evaluate", str(run_dir))
    assert json.loads((run_dir / "report.json").read_text()) == alone
    assert done.stderr.count("report.html") == 1


@pytest.mark.slow
def test_a_real_browser_shows_the_pages_and_axe_finds_no_fault(tmp_path, hostile, browse):
    run_dir = make_run(tmp_path / "run", DataConfig(path=str(hostile)))
    assert main(["evaluate", str(run_dir)]) == 0
    assert main(["audit", str(hostile), "--html", str(tmp_path / "audit.html"), "--run", str(run_dir)]) == 0
    for file in (run_dir / "report.html", tmp_path / "audit.html"):
        browse(file, "light", 1280)
        browse(file, "dark", 390)
