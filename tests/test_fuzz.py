"""Mutated configs, images and CSV rows: always a result or one clear error, never a traceback, never a hang."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_train.config import CLASSES, DataConfig, InputError
from dist_train.data.images import load_splits
from dist_train.data.synthetic import draw_faces
from dist_train.options import train_config

pytestmark = [pytest.mark.slow, pytest.mark.faults]

THOROUGH = settings(max_examples=1000, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck))
CONFIG = """data:
  source: synthetic
  image_size: 48
  augment:
    flip: 0.5
model:
  backbone: resnet18
  pretrained: false
train:
  epochs: 15
  batch_size: 128
  clip_grad: null
  precision: "no"
optim: {name: sgd, lr: 0.05}
track:
  tags: [a, b]
run_dir: runs/a
"""
WORDS = [
    "null",
    "true",
    "-1",
    "1e999",
    ".nan",
    "[1]",
    "{a: b}",
    "!!python/name:os.system",
    "&a",
    "*a",
    "..",
    "\x00",
    "é",
]


@st.composite
def mutated(draw: st.DrawFn, text: str, words: list[str]) -> str:
    """A text with a few pieces cut out, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.sampled_from(words) | st.text(max_size=6) | st.just(text[start:end] * 2))
        text = text[:start] + piece + text[end:]
    return text


@pytest.fixture(autouse=True)
def no_hang():
    signal.alarm(500)
    yield
    signal.alarm(0)


def refusal(function: Callable[..., object], *arguments: object, **options: object) -> str:
    """Return the one line that refuses the input, or nothing where it is accepted."""
    try:
        function(*arguments, **options)
    except InputError as error:
        return str(error)
    return ""


def test_mutated_configs(tmp_path):
    file, said = tmp_path / "config.yaml", []

    @THOROUGH
    @given(mutated(CONFIG, WORDS))
    def check(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="replace")
        said.append(refusal(train_config, ["train", "--config", str(file)]))
        assert "\n" not in said[-1]

    check()
    assert 20 < sum(map(bool, said)) < len(said) - 20


def test_mutated_images(tmp_path):
    """A thousand spoiled pictures: each is read or named."""
    random = np.random.default_rng(0)
    faces, labels = draw_faces(1000, seed=0)
    for number, (face, label) in enumerate(zip(faces, labels, strict=True)):
        kind = ("png", "jpeg", "gif", "tiff", "bmp", "webp")[number % 6]
        buffer = io.BytesIO()
        Image.fromarray(face[0]).save(buffer, kind)
        content = bytearray(buffer.getvalue())
        for _ in range(random.integers(1, 6)):
            content[random.integers(len(content))] = random.integers(256)
        content = content[: random.integers(len(content))] if number % 3 == 0 else content
        for split in ("train", "validation"):
            folder = tmp_path / "data" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.{kind}").write_bytes(content)
    config = {"path": str(tmp_path / "data"), "cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=r"of 2000 images .* cannot be read"):
        load_splits(DataConfig(**config))
    train, _ = load_splits(DataConfig(**config, skip_bad=True))
    assert 100 < len(train) < 900


def test_mutated_csv_rows(tmp_path):
    header, file, said = "emotion,pixels,Usage\n", tmp_path / "fer2013.csv", []
    pixels = " ".join(str(4 * n) for n in range(64))
    good = [f"{n % 7},{pixels},{usage}\n" for usage in ("Training", "PublicTest") for n in range(7)]

    @THOROUGH
    @given(mutated(f"3,{pixels},Training", [",", '"', "\n", "-1", "300", "\x00", " "]))
    def check(row: str) -> None:
        file.write_text(header + "".join(good) + row + "\n", encoding="utf-8", errors="replace")
        for skip in (False, True):
            said.append(refusal(load_splits, DataConfig(path=str(file), cache="/proc/none", skip_bad=skip)))
            assert not said[-1] or str(file) in said[-1]

    check()
    assert 20 < sum(map(bool, said)) < len(said) - 20
