"""Data sets by way of `datasets`: Parquet and WebDataset shards, streamed and in memory, equal to a folder of files."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from dist_train.config import DataConfig, InputError
from dist_train.data.hub import open_hub
from dist_train.data.images import load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.lazy import LazyImages
from dist_train.data.synthetic import EXPRESSIONS


@pytest.fixture
def load(tmp_path):
    def load(path: object, residency: str = "host", **options) -> tuple[ImageSet, ImageSet]:
        cache = str(tmp_path / "hub_cache")
        return load_splits(DataConfig(path=str(path), residency=residency, cache=cache, **options))

    return load


def files_of(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).rglob("*.png"))


def rows_of(folder: Path, split: str) -> dict[str, list]:
    files = files_of(folder, split)
    return {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [file.parent.name for file in files],
    }


def write_parquet(folder: Path, to: Path, **splits: str) -> Path:
    """Write two shards of each split (by default: train), as another program than `datasets` would."""
    to.mkdir()
    for name, split in (splits or {"train": "train"}).items():
        table = pa.table(rows_of(folder, split))
        for number, part in enumerate((table.slice(0, 10), table.slice(10))):
            pq.write_table(part, to / f"{name}-{number:05}-of-00002.parquet")
    return to


def write_tars(folder: Path, to: Path, classes: Sequence[str] = EXPRESSIONS) -> Path:
    to.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(to / f"{split}-0000.tar", "w") as tar:
            for i, file in enumerate(files_of(folder, split)):
                label = str(classes.index(file.parent.name)).encode()
                for end, content in (("png", file.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{i:05}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return to


@pytest.fixture
def address(tmp_path, monkeypatch) -> Iterator[str]:
    """Serve tmp_path over HTTP; return the address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def same(ours: ImageSet, theirs: ImageSet) -> bool:
    return np.array_equal(ours.images[:], theirs.images[:]) and np.array_equal(ours.labels, theirs.labels)


def test_parquet_shards_are_the_folder_they_were_made_of(draw_folder, tmp_path, load):
    folder = draw_folder()
    shards = write_parquet(folder, tmp_path / "shards", train="train", valid="validation")
    streamed, held = load(shards, "stream"), load(shards)
    for ours, theirs, original in zip(streamed, held, load(folder), strict=True):
        assert isinstance(ours.images, LazyImages) and isinstance(theirs.images, np.memmap)
        assert same(ours, theirs) and same(ours, original) and ours.classes == original.classes
        assert ours.fingerprint() == theirs.fingerprint()
    assert held[0].names[:2] == ["train/0", "train/1"]


def test_a_glob_of_shards_is_all_train(draw_folder, tmp_path, load):
    shards = write_parquet(draw_folder(), tmp_path / "shards", train="train")
    train, validation = load(shards / "train-*.parquet", "stream")
    assert len(train) + len(validation) == 70


@pytest.mark.parametrize("write", [write_parquet, write_tars], ids=["parquet", "webdataset"])
def test_the_url_of_a_shard_is_the_file_it_serves(draw_folder, tmp_path, load, address, monkeypatch, write):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # no hub is asked
    folder = draw_folder()
    write(folder, tmp_path / "shards")
    file = max((tmp_path / "shards").glob("train-*"))
    served = load(f"{address}/shards/{file.name}", "stream")
    for ours, theirs in zip(served, load(file), strict=True):
        assert same(ours, theirs) and len(ours)


def test_webdataset_shards_have_numbers_for_classes(draw_folder, tmp_path, load):
    folder = draw_folder()
    original = load(folder)
    shards = write_tars(folder, tmp_path / "tars", original[0].classes)
    for ours, theirs in zip(load(shards, "stream"), original, strict=True):
        assert same(ours, theirs) and ours.classes == tuple("0123456")


def test_class_labels_name_the_classes_and_a_test_split_may_be_without_labels(draw_folder, tmp_path, load):
    folder, shards = draw_folder(), tmp_path / "shards"
    shards.mkdir()
    names = sorted({file.parent.name for file in files_of(folder, "train")}, reverse=True)
    features = Features({"img": Image(), "expression": ClassLabel(names=names)})
    for split, source in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        rows = rows_of(folder, source)
        labels = [-1 if split == "test" else names.index(label) for label in rows["label"]]
        data = Dataset.from_dict({"img": rows["image"], "expression": labels}, features=features)
        data.to_parquet(str(shards / f"{split}.parquet"))
    train, _ = load(shards)
    assert train.classes == tuple(names)
    assert [names[label] for label in train.labels] == rows_of(folder, "train")["label"]
    with pytest.raises(InputError, match="no test split"):
        load_splits(DataConfig(path=str(shards), cache=str(tmp_path / "hub_cache")), "test")


def test_minus_one_is_a_class_like_another_where_labels_are_plain_numbers(draw_folder, tmp_path, load):
    rows = rows_of(draw_folder(), "train")
    rows["label"] = [-1 if label == "happy" else 1 for label in rows["label"]]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "shards" / "train.parquet")
    assert load(tmp_path / "shards")[0].classes == ("-1", "1")


def test_rows_without_an_image_are_named_or_left_out(draw_folder, tmp_path, load):
    rows = rows_of(draw_folder(), "train")
    rows["image"][3], rows["image"][5] = None, {"bytes": b"no image", "path": None}
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "shards" / "train.parquet")
    for residency in ("stream", "host"):
        with pytest.raises(InputError, match=r"2 of 70 images .*train/3 \(there is no image.*train/5 "):
            load(tmp_path / "shards", residency)
        assert sum(map(len, load(tmp_path / "shards", residency, skip_bad=True))) == 68


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"pixels": [b"1"], "label": ["a"]}, "no column of the image, only pixels, label; name it image"),
        ({"image": [b"1"], "mood": ["a"]}, "no column of the label, only image, mood; name it label"),
        ({"image": [b"1", b"2"], "label": ["a", None]}, "images without a label in split train"),
    ],
)
def test_columns_that_are_not_found_are_told(tmp_path, load, columns, said):
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "shards" / "train.parquet")
    with pytest.raises(InputError, match=said):
        load(tmp_path / "shards")


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path, load):
    for path in ("none/such", tmp_path / "gone" / "*.parquet"):
        with pytest.raises(InputError, match="cannot be loaded as a Hugging Face data set") as error:
            load(path, source="hub")
        assert "\n" not in str(error.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'dist_train\[datasets\]'"):
        open_hub(DataConfig(source="hub", path="user/name"))
