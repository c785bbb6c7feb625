"""Images that are decoded when needed: the very batches of images in memory, on any number of processes."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_train.cli import main
from dist_train.config import AugmentConfig, DataConfig, InputError
from dist_train.data import encoded
from dist_train.data.ahead import ahead
from dist_train.data.images import find_leaked, load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.lazy import LazyImages
from dist_train.data.loader import ImageLoader


def load(path: Path, residency: str, **options) -> tuple[ImageSet, ImageSet]:
    return load_splits(DataConfig(path=str(path), residency=residency, **options))


def batches(data: ImageSet, world_size: int, state: dict | None = None, **options) -> list[torch.Tensor]:
    """Return the images and labels of all processes' batches of an epoch, from `state` on."""
    options = {"shuffle": True, "augment": AugmentConfig(erase=0.5), "mixup": 0.4, "seed": 3} | options
    found = []
    for rank in range(world_size):
        loader = ImageLoader(data, 16, rank=rank, world_size=world_size, **options)
        loader.load_state_dict(state or {"epoch": 1, "position": 0})
        found += [tensor for batch in loader for tensor in (batch.images, batch.labels, batch.samples)]
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def mixed(draw_folder) -> Path:
    """A folder of gray images and a few in colour, of other sizes."""
    path = draw_folder()
    for number, split in enumerate(("train", "train", "validation")):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(path / split / "happy" / f"colour{number}.jpg")
    return path


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{}, {"mixup": 0}, {"augment": None, "mixup": 0, "shuffle": False}])
def test_streamed_batches_are_those_of_images_in_memory_to_the_last_bit(mixed, world_size, options):
    for ours, theirs in zip(load(mixed, "stream"), load(mixed, "host"), strict=True):
        assert isinstance(ours.images, LazyImages) and isinstance(theirs.images, np.ndarray)
        assert ours.images.shape == theirs.images.shape and ours.images.shape[1] == 3
        assert ours.names == theirs.names and ours.fingerprint() == theirs.fingerprint()
        assert equal(batches(ours, world_size, **options), batches(theirs, world_size, **options))


def test_a_training_that_streams_ends_with_the_weights_and_the_report_of_one_that_holds_all_images(smoke, draw_folder):
    data = ("--data.source", "folder", "--data.path", str(draw_folder()), "--train.mixup", "0.2")
    weights, reports = [], []
    for residency in ("stream", "host"):
        run_dir = smoke(residency, *data, "--data.residency", residency)
        weights.append(load_file(max((run_dir / "checkpoints").iterdir()) / "model.safetensors"))
        assert main(["evaluate", str(run_dir)]) == 0
        reports.append(json.loads((run_dir / "report.json").read_text()))
    assert {**reports[0], "run": "host"} == reports[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_position_within_an_epoch_counts_what_was_used_not_what_was_prepared(draw_folder, world_size):
    (ours, _), (theirs, _) = (load(draw_folder(), residency) for residency in ("stream", "host"))
    states = []
    for data in (ours, theirs):
        loader = ImageLoader(data, 16, shuffle=True, seed=3)
        loader.set_epoch(1)
        list(itertools.islice(loader, 2))
        states.append(loader.state_dict())
    assert states[0] == states[1] == {"epoch": 1, "position": 28}
    assert equal(batches(ours, world_size, states[0]), batches(theirs, world_size, states[0]))


def test_gray_stays_gray_and_looks_like_an_array(draw_folder):
    path = draw_folder()
    (ours, _), (theirs, _) = (load(path, residency) for residency in ("stream", "host"))
    assert ours.images.shape == theirs.images.shape == (70, 1, 48, 48)
    assert ours.images.dtype == theirs.images.dtype and len(ours.images) == 70
    for key in (3, slice(5, 9), np.array([4, 2, 2]), np.arange(70) % 9 == 0, slice(0, 0)):
        assert np.array_equal(ours.images[key], theirs.images[key])
    some = np.array([9, 3])
    assert isinstance(ours.subset(some).images, LazyImages)
    assert np.array_equal(ours.subset(some).images[:], theirs.subset(some).images)


def test_leaked_images_are_found_and_a_validation_split_held_out_as_in_memory(draw_folder):
    path = draw_folder()
    for split in ("train", "validation"):
        Image.new("L", (48, 48), 9).save(path / split / "sad" / "same.png")
    found = [load(path, residency) for residency in ("stream", "host")]
    assert [find_leaked(*splits).sum() for splits in found] == [1, 1]
    assert [len(load(path, residency, drop_leaked=True)[1]) for residency in ("stream", "host")] == [35, 35]
    alone = draw_folder("alone", train=70)
    ours, theirs = (load(alone, residency)[1] for residency in ("stream", "host"))
    assert ours.names == theirs.names and np.array_equal(ours.images[:], theirs.images)


@pytest.mark.parametrize("residency", ["stream", "host"])
def test_one_colour_file_makes_all_splits_colour_so_that_leaks_are_still_found(draw_folder, residency):
    path = draw_folder()
    for split in ("train", "validation"):
        Image.new("L", (48, 48), 9).save(path / split / "sad" / "same.png")
    Image.new("RGB", (48, 48), "red").save(path / "validation" / "sad" / "red.png")
    train, validation = load(path, residency)
    assert train.images.shape == (71, 3, 48, 48) and find_leaked(train, validation).sum() == 1


def preparing() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_thread_prepares_two_items_and_ends_when_it_is_left():
    made: list[int] = []
    results = ahead(lambda i: made.append(i) or -i, itertools.count(), 2)
    assert [next(results), next(results)] == [(0, 0), (1, -1)]
    results.close()
    assert made in ([0, 1], [0, 1, 2], [0, 1, 2, 3]) and not preparing()
    assert list(ahead(str, range(4), 2)) == list(ahead(str, range(4), 0)) == [(i, str(i)) for i in range(4)]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 // i, range(3), 2))
    assert not preparing()


def test_leaving_an_epoch_early_ends_the_thread(draw_folder):
    train, _ = load(draw_folder(), "stream")
    for _ in ImageLoader(train, 16):
        assert preparing()
        break
    assert not preparing()


def spoil(path: Path) -> list[Path]:
    """Spoil a file's header and cut another one short."""
    files = [path / "train/happy/header.png", path / "train/happy/short.png"]
    whole = next((path / "train/happy").iterdir()).read_bytes()
    files[0].write_bytes(b"not an image")
    files[1].write_bytes(whole[: len(whole) // 2])
    return files


def test_what_is_unreadable_is_named_at_the_start_or_left_out(draw_folder, caplog):
    path = draw_folder()
    spoiled = spoil(path)
    with pytest.raises(InputError, match=r"1 of 107 images .*header\.png .*data\.skip_bad: true"):
        load(path, "stream")
    ours, theirs = (load(path, residency, skip_bad=True) for residency in ("stream", "host"))
    assert all(str(file) in caplog.text for file in spoiled)
    assert len(ours[0]) == 70 and equal(batches(ours[0], 1), batches(theirs[0], 1))


def test_what_becomes_unreadable_is_named_when_it_is_needed_and_the_thread_ends(draw_folder):
    path = draw_folder()
    train, _ = load(path, "stream")
    (path / train.names[0]).write_bytes(b"gone bad")
    with pytest.raises(InputError, match=rf"data: .*{train.names[0]} cannot be read .* --resume auto"):
        batches(train, 1)
    assert not preparing()


def test_headers_are_read_once(draw_folder, monkeypatch):
    path, looked = draw_folder(), []
    look = encoded.is_gray
    monkeypatch.setattr(encoded, "is_gray", lambda file: looked.append(file) or look(file))
    load(path, "stream", workers=1)
    assert len(looked) == 105
    load(path, "stream", image_size=32)
    assert len(looked) == 105


@pytest.mark.parametrize(("share", "lazy"), [(1.5, False), (2.5, True)])
def test_auto_streams_what_takes_half_of_the_free_memory(draw_folder, monkeypatch, share, lazy):
    class Memory:
        available = 2 * 105 * 48 * 48 * 2 / share

    monkeypatch.setattr(encoded.psutil, "virtual_memory", Memory)
    train, _ = load(draw_folder(), "auto")
    assert isinstance(train.images, LazyImages) == lazy


def test_images_in_memory_are_the_mapped_file_and_no_copy(draw_folder):
    train, _ = load(draw_folder(), "host")
    loader = ImageLoader(train, 16, residency="host")
    assert isinstance(train.images, np.memmap)
    assert loader._images.data_ptr() == train.images.ctypes.data


@pytest.mark.parametrize("options", [{"source": "synthetic"}, {"path": "fer2013.csv"}])
def test_only_files_can_be_streamed(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fer2013.csv").touch()
    with pytest.raises(InputError, match=r"data\.residency: stream needs image files"):
        load_splits(DataConfig(residency="stream", **options))
