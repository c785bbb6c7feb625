from __future__ import annotations

import csv
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from dist_train.config import CLASSES, DataConfig, InputError
from dist_train.data.cache import cache_folder, cached
from dist_train.data.decode import decode_image
from dist_train.data.images import FER2013_CLASSES, load_splits
from dist_train.data.imageset import ImageSet, Splits
from dist_train.data.synthetic import EXPRESSIONS, draw_faces


def config(path: Path, **options) -> DataConfig:
    return DataConfig(path=str(path), **options)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "test"])
def test_class_folders_become_arrays(draw_folder, name):
    path = draw_folder(train=70, **{name: 35})
    train, validation = load_splits(config(path))
    assert train.images.shape == (70, 1, 48, 48)
    assert validation.images.shape == (35, 1, 48, 48)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.classes == CLASSES
    for images in (train, validation):
        for image, label, file in zip(images.images, images.labels, images.names, strict=True):
            assert Path(file).parts[1] == CLASSES[label]
            assert np.array_equal(image[0], np.asarray(Image.open(path / file)))


def test_without_a_validation_split_a_share_of_each_class_is_held_out(draw_folder):
    path = draw_folder(train=140)
    train, validation = load_splits(config(path, validation_share=0.2))
    assert np.bincount(validation.labels).tolist() == [4] * 7
    assert np.bincount(train.labels).tolist() == [16] * 7
    assert not set(train.names) & set(validation.names)
    assert isinstance(train.images, np.memmap)  # which processes share
    assert load_splits(config(path, validation_share=0.2))[1].names == validation.names


def test_any_classes_any_size_and_colour_will_do(tmp_path):
    for split in ("train", "val"):
        for number, kind in enumerate(("cat", "dog")):
            for i in range(3):
                file = tmp_path / split / kind / f"{i}.{['png', 'jpg', 'webp'][i]}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB" if i else "L", (60 + 20 * i, 90), 200 if i == 0 else (200, 10, 90 * number)).save(file)
    train, _ = load_splits(config(tmp_path, image_size=32))
    assert train.classes == ("cat", "dog")
    assert train.images.shape == (6, 3, 32, 32)


def test_gray_transparent_and_16_bit_images_are_gray(tmp_path):
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    Image.fromarray(ramp).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(decode_image(tmp_path / "la.png", 32), ramp)
    assert decode_image(tmp_path / "deep.png", 32).shape == (32, 32)
    assert np.corrcoef(decode_image(tmp_path / "deep.png", 32)[0], ramp[0])[0, 1] > 0.999


def test_exif_orientation_is_followed(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, axis=0).repeat(32, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode_image(tmp_path / "turned.png", 32)[0, 0] == 255


@pytest.mark.parametrize("entry", [struct.pack("<HHI4s", 282, 2, 4, b"72"), struct.pack("<HHII", 282, 5, 1, 99)])
def test_exif_that_cannot_be_written_anew_is_no_reason_to_refuse_an_image(tmp_path, entry):
    """An x resolution that is a text, and one that is nowhere, beside an orientation."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 2, 274, 3, 1, 3) + entry + bytes(4)
    picture = np.zeros((32, 32), np.uint8)
    picture[:16] = 255
    Image.fromarray(picture).save(tmp_path / "odd.jpg", exif=exif)
    decoded = decode_image(tmp_path / "odd.jpg", 32)
    assert decoded[0, 0] < 50 and decoded[-1, -1] > 200


def write_fer2013(file: Path, rows: int = 21, **changes) -> Path:
    images, _ = draw_faces(rows * 3, seed=1)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(changes.get("header", ["emotion", "pixels", "Usage"]))
        for i, image in enumerate(images):
            usage = ("Training", "PublicTest", "PrivateTest")[i // rows]
            writer.writerow([changes.get("emotion", i % 7), " ".join(map(str, image.ravel())), usage])
    return file


def test_fer2013_csv_maps_its_class_order_by_name(tmp_path):
    file = write_fer2013(tmp_path / "fer2013.csv")
    train, validation = load_splits(config(file))
    assert len(train) == len(validation) == len(load_splits(config(file), "test")[1]) == 21
    for label, name in zip(train.labels, train.names, strict=True):
        assert CLASSES[label] == FER2013_CLASSES[int(name) % 7]
    assert np.array_equal(train.images, draw_faces(63, seed=1)[0][:21])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"header": ["emotion", "pix", "Usage"]}, "no column pixels"),
        ({"emotion": 9}, "data row 0"),
        ({"emotion": "happy"}, "data row 0"),
        ({"emotion": -1}, "data row 0"),
    ],
)
def test_a_damaged_csv_is_refused(tmp_path, changes, said):
    file = write_fer2013(tmp_path / "fer2013.csv", **changes)
    with pytest.raises(InputError, match=said) as error:
        load_splits(config(file))
    assert str(file) in str(error.value)


def test_unreadable_images_are_all_named_and_may_be_left_out(draw_folder, caplog):
    path = draw_folder()
    bad = [path / "train/happy/broken.png", path / "validation/sad/empty.jpg"]
    bad[0].write_bytes(b"not an image")
    bad[1].touch()
    with pytest.raises(InputError) as error:
        load_splits(config(path))
    assert "2 of 107 images" in str(error.value)
    assert all(str(file) in str(error.value) for file in bad)
    assert "data.skip_bad: true" in str(error.value)
    train, validation = load_splits(config(path, skip_bad=True))
    assert (len(train), len(validation)) == (70, 35)
    assert str(bad[0]) in caplog.text


def test_a_class_missing_from_one_split_is_refused(draw_folder):
    path = draw_folder()
    shutil.rmtree(path / "validation" / "fear")
    with pytest.raises(InputError, match="class fear has no images in the validation split"):
        load_splits(config(path))


def test_an_empty_class_is_refused(draw_folder):
    path = draw_folder()
    (path / "train" / "bored").mkdir()
    with pytest.raises(InputError, match=r"train: no images of class bored"):
        load_splits(config(path))


def test_leaked_images_can_be_dropped_from_validation(draw_folder):
    path = draw_folder()
    shutil.copy(next((path / "train/happy").iterdir()), path / "validation/happy/copy.png")
    assert len(load_splits(config(path))[1]) == 36
    assert len(load_splits(config(path, drop_leaked=True))[1]) == 35


def test_decoded_images_are_cached_until_a_file_changes(draw_folder, tmp_path):
    path, cache = draw_folder(), tmp_path / "decoded"
    options = config(path, cache=str(cache))
    first, _ = load_splits(options)
    entry = next(cache.iterdir())
    stamp = (entry / "train.images.npy").stat().st_mtime_ns
    again, _ = load_splits(options)
    assert (entry / "train.images.npy").stat().st_mtime_ns == stamp
    assert isinstance(again.images, np.memmap)
    assert np.array_equal(first.images, again.images)

    file = path / again.names[0]
    Image.new("L", (48, 48), 77).save(file)
    os.utime(file, ns=(1, 1))
    changed, _ = load_splits(options)
    assert (changed.images[0] == 77).all()
    (path / "train/happy/new.png").write_bytes(file.read_bytes())
    assert len(load_splits(options)[0]) == 71
    assert len(list(cache.iterdir())) == 3


def test_another_machine_that_decodes_as_well_leaves_the_images_that_the_first_has_mapped(tmp_path):
    options, inodes = DataConfig(cache=str(tmp_path)), []

    def decode() -> Splits:
        images, labels = draw_faces(7)
        return {"train": ImageSet(images, labels, [str(i) for i in range(7)], EXPRESSIONS)}

    def inode() -> int:
        return next(tmp_path.glob("*/train.images.npy")).stat().st_ino

    def decode_slowly() -> Splits:
        cached(options, ["stamp"], decode)
        inodes.append(inode())
        return decode()

    cached(options, ["stamp"], decode_slowly)
    assert inodes == [inode()]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_moved_image_and_a_renamed_class_are_not_taken_from_the_cache(draw_folder):
    path = draw_folder()
    first, _ = load_splits(config(path))
    last = sorted((path / "train/angry").iterdir())[-1]
    last.rename(path / "train/disgust" / last.name)
    moved, _ = load_splits(config(path))
    assert np.bincount(moved.labels)[0] == np.bincount(first.labels)[0] - 1
    for split in ("train", "validation"):
        (path / split / "sad").rename(path / split / "sadness")
    assert "sadness" in load_splits(config(path))[0].classes


def test_a_cache_that_cannot_be_written_is_done_without(draw_folder, tmp_path, caplog):
    (tmp_path / "file").touch()
    train, _ = load_splits(config(draw_folder(), cache=str(tmp_path / "file" / "cache")))
    assert len(train) == 70
    assert "set data.cache to another folder" in caplog.text


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path):
    assert cache_folder(DataConfig()) == tmp_path / "cache" / "dist_train"


def test_built_in_faces_need_no_path():
    train, validation = load_splits(DataConfig(count=100, validation_share=0.2))
    assert (len(train), len(validation)) == (80, 20)
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in validation.images}


def write_splits(file, rows):
    file.write_text("path,split\n" + "".join(f"{name},{split}\n" for name, split in rows))
    return str(file)


def test_a_splits_file_moves_images_between_splits_and_names_a_test_split(tmp_path, draw_folder):
    path = draw_folder()
    train, validation = load_splits(config(path))
    own = [(name, "validation" if i % 3 else "test") for i, name in enumerate(train.names)]
    file = write_splits(tmp_path / "splits.csv", own + [(name, "train") for name in validation.names])
    swapped = config(path, splits=file)
    now_train, now_validation = load_splits(swapped)
    _, test = load_splits(swapped, "test")
    assert now_train.names == validation.names and np.array_equal(now_train.images, validation.images)
    assert sorted(now_validation.names + test.names) == sorted(train.names)
    images = dict(zip(train.names, train.images, strict=True))
    for part in (now_validation, test):
        assert [name.split("/")[1] for name in part.names] == [part.classes[label] for label in part.labels]
        assert all(np.array_equal(image, images[name]) for name, image in zip(part.names, part.images, strict=True))


def test_the_original_splits_are_told_by_the_names_of_the_files(tmp_path):
    """Rows of fer2013.csv: 28,709 of Training, then 3,589 of PublicTest and as many of PrivateTest."""
    names = {"train/happy/0": "train", "validation/sad/28708": "train", "train/sad/28709": "validation"}
    names |= {"train/happy/32297": "validation", "train/sad/32298": "test", "validation/happy/35886": "test"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (48, 48)).save(tmp_path / f"{name}.jpg")
    command = [sys.executable, str(ROOT / "bench" / "original_splits.py"), str(tmp_path)]
    written = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert written.splitlines() == ["path,split", *(f"{name}.jpg,{split}" for name, split in names.items())]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("path\n", "has no column split"),
        ("path,split\n{0},train\n{0},test\n", "line 3: {0} stands twice"),
        ("path,split\n{0},PublicTest\n", "line 2: split 'PublicTest' is not train, validation, test"),
        ("path,split\nnone.png,train\n", "1 files of .* do not exist, such as .*none.png"),
        ("path,split\n{0},test\n", "has no row of split train"),
    ],
)
def test_faults_of_a_splits_file_are_told_in_one_line(tmp_path, draw_folder, rows, said):
    path = draw_folder()
    name = load_splits(config(path))[0].names[0]
    file = tmp_path / "splits.csv"
    file.write_text(rows.format(name))
    with pytest.raises(InputError, match="data.splits: .*" + said.format(name)):
        load_splits(config(path, splits=str(file)))
    with pytest.raises(InputError, match="cannot be read"):
        load_splits(config(path, splits=str(tmp_path / "none.csv")))


def test_a_test_split_that_is_not_there_is_told(draw_folder):
    with pytest.raises(InputError, match="has no test split"):
        load_splits(config(draw_folder()), "test")
