"""Tests of dist_train.data.audit and `dist-train audit`: every kind of fault, counted as the files were made."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from runs import links, make_run

from dist_train.cli import main
from dist_train.config import DataConfig
from dist_train.data.audit import audit_folder
from dist_train.data.images import load_splits
from dist_train.data.synthetic import draw_faces

REAL = os.environ.get("DIST_TRAIN_REAL_DATA")
STATED = {
    "files": 35887,
    "distinct": 34034,
    "duplicate_groups": 1516,
    "duplicate_files": 3369,
    "cross_split_groups": 510,
    "leaked_validation_files": 542,
    "conflicting_groups": 57,
    "conflicting_files": 160,
    "blank_files": 13,
    "unreadable_files": 0,
}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """16 good files, and of each fault some."""
    images, _ = draw_faces(16, seed=0)
    folder = tmp_path / "faulty"

    def put(image: np.ndarray, name: str) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        return file

    for i, image in enumerate(images[:, 0]):
        put(image, f"{'train' if i < 10 else 'validation'}/{'happy' if i % 2 else 'sad'}/{i}.png")
    put(images[0, 0], "train/sad/copy.bmp")  # group 1: three files, both splits; another format, and gray as RGB
    put(np.repeat(images[0, 0, ..., None], 3, 2), "validation/sad/rgb.png")
    put(images[1, 0], "train/sad/contrary.png")  # group 2: two files, both classes
    put(images[11, 0], "train/happy/leak.png")  # group 3: two files, both splits
    put(np.full((48, 48), 7, np.uint8), "train/sad/blank.png")  # group 4: two blank files, both classes
    put(np.full((48, 48), 7, np.uint8), "train/happy/blank.png")
    put(np.full((48, 24), 7, np.uint8), "train/happy/other_size.png")  # as many as 24 x 96 pixels would be
    put(np.clip(images[3, 0].astype(int) + 2, 0, 255).astype(np.uint8), "train/happy/lighter.png")  # a look-alike of 3
    (folder / "train/sad/broken.jpg").write_bytes(b"no image")
    (folder / "train/sad/notes.txt").write_text("not an image by its name")
    return folder


COUNTS = {
    "files": 25,
    "distinct": 19,
    "duplicate_groups": 4,
    "duplicate_files": 9,
    "cross_split_groups": 2,
    "leaked_validation_files": 2,
    "conflicting_groups": 2,
    "conflicting_files": 4,
    "blank_files": 3,
    "unreadable_files": 1,
}


def test_every_fault_is_counted_and_shown(faulty, tmp_path, capsys):
    json_file, html_file = tmp_path / "a.json", tmp_path / "a.html"
    assert main(["audit", str(faulty), "--json", str(json_file), "--html", str(html_file)]) == 0
    assert json.loads(json_file.read_text()) == COUNTS
    table = {
        line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()
    }
    assert {name.replace("_", " "): str(count) for name, count in COUNTS.items()}.items() <= table.items()
    assert table["near-duplicate pairs"] == "1"
    page = html_file.read_text()
    assert links(page) == set()
    for name in ("train/sad/contrary.png", "validation/sad/rgb.png", "train/happy/lighter.png", "train/sad/broken.jpg"):
        assert name in page
    audit = audit_folder(faulty)
    assert [{file.path.name for file in pair} for pair in audit.near] == [{"3.png", "lighter.png"}]
    assert audit.per_class() == {"happy": {"train": 9, "validation": 3}, "sad": {"train": 9, "validation": 4}}


def test_train_alone_may_be_audited(faulty):
    shutil.rmtree(faulty / "validation")
    counts = audit_folder(faulty).counts()
    assert (counts["files"], counts["cross_split_groups"], counts["leaked_validation_files"]) == (18, 0, 0)


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", "is not a folder"), ("empty", "train/<class>"), ("bare", "no images")]
)
def test_other_folders_are_refused(tmp_path, name, said, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/train/happy").mkdir(parents=True)
    assert main(["audit", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and name in line


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_decoder_may_fail_in_any_way(tmp_path, draw_folder):
    """Some of these damages are a RuntimeError to Pillow, which its documentation does not name."""
    path, buffer = draw_folder(train=14, validation=7), io.BytesIO()
    Image.fromarray(draw_faces(1)[0][0, 0]).save(buffer, "avif")
    for at in range(0, len(buffer.getvalue()), 3):
        content = bytearray(buffer.getvalue())
        content[at] ^= 255
        (path / "train" / "happy" / f"{at}.avif").write_bytes(content)
    faults = [file for file in audit_folder(path).files if file.fault]
    assert faults
    train, _ = load_splits(DataConfig(path=str(path), skip_bad=True, cache=str(tmp_path / "cache")))
    assert len(train) == 14 + len(list((path / "train" / "happy").glob("*.avif"))) - len(faults)


def test_a_name_that_is_no_utf8_is_shown(tmp_path, draw_folder):
    path = draw_folder()
    picture = next((path / "train" / "happy").iterdir())
    shutil.copy(picture, path / "train" / "sad" / os.fsdecode(b"caf\xe9.png"))
    assert main(["audit", str(path), "--html", str(tmp_path / "audit.html")]) == 0
    assert r"caf\udce9.png" in (tmp_path / "audit.html").read_text()


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_named(faulty, tmp_path, option, capsys):
    assert main(["audit", str(faulty), option, str(tmp_path / "no" / "such")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "such cannot be written: No such file" in line


def test_a_run_points_out_wrong_labels(tmp_path, draw_folder, capsys):
    """The model is a run's; what it doubts, of images that are not in train, is what cleanlab ranks."""
    folder = draw_folder(train=70, validation=70)
    run_dir = make_run(tmp_path / "run", DataConfig(path=str(folder)))
    html_file = tmp_path / "a.html"
    assert main(["audit", str(folder), "--run", str(run_dir), "--html", str(html_file)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    count = int(said.split()[-1])
    assert said.startswith("likely label errors") and 0 < count <= 70
    assert f"{count} found" in html_file.read_text().split("Likely label errors")[1]


@pytest.mark.slow
@pytest.mark.skipif(
    REAL is None, reason="needs the real data set: DIST_TRAIN_REAL_DATA=DIR with train/ and validation/"
)
def test_the_real_data_has_the_stated_faults():
    started = time.perf_counter()
    assert audit_folder(REAL).counts() == STATED
    assert time.perf_counter() - started < 30
