"""Tests of dist_train.figures: what the figures say, and what they refuse.
Each figure is also drawn, with warnings as errors."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dist_train.config import CLASSES
from dist_train.figures import plot_confusion, plot_history
from dist_train.pictures import view_results

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # left by tests before
]


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def texts(owner: Any) -> list[str]:
    return [text.get_text() for text in owner.texts]


def pictures(count: int, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8)


class FirstPixels(nn.Module):
    """Gives the first K pixels as logits, and remembers the modes and dtypes it met."""

    def __init__(self, size: int, classes: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.size, self.scale, self.frozen = size, nn.Parameter(torch.ones(1)), nn.Dropout()
        if classes:
            self.classes = classes
        self.met: list[tuple] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.met.append((self.training, self.frozen.training, images.dtype, torch.is_inference_mode_enabled()))
        return images.flatten(1)[:, : self.size] * self.scale * 9


def test_history_names_lines_and_tells_the_best_epoch():
    figure = drawn(plot_history([[2.0, 1.5, 1.0], [0.2, 0.4, 0.6], [2.1, 1.25, 1.6], [0.25, 0.5, 0.45]]))
    loss, accuracy = figure.axes
    assert loss.get_xlabel() == accuracy.get_xlabel() == "Epoch"
    assert {"Accuracy", "train", "validation", "Best validation accuracy 50.0 % in epoch 2"} <= set(texts(accuracy))
    assert {"Loss", "train", "validation", "Lowest validation loss 1.25 in epoch 2"} <= set(texts(loss))
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines["best"] == [[2, 0.5]]
    assert lines["train"] == [[1, 0.2], [2, 0.4], [3, 0.6]]
    assert list(loss.get_xticks()) == [1, 2, 3]


@pytest.mark.parametrize("epochs", [1, 2, 15, 100, 200, 1234])
def test_history_ticks_are_few_whole_epochs(epochs):
    figure = drawn(plot_history([np.linspace(2, 1, epochs), np.linspace(0, 1, epochs)] * 2))
    for axes in figure.axes:
        ticks = axes.get_xticks()
        assert ticks[0] == 1 and ticks[-1] <= epochs and len(ticks) <= 12
        assert all(float(tick).is_integer() for tick in ticks)
    assert f"Best validation accuracy {100.0 if epochs > 1 else 0.0} % in epoch {epochs}" in texts(figure.axes[1])


def test_history_keeps_the_names_of_close_lines_apart():
    figure = drawn(plot_history([[0.7] * 3, [0.5] * 3] * 2))
    heights = [text.get_position()[1] for text in figure.axes[0].texts if text.get_text() in ("train", "validation")]
    assert abs(heights[0] - heights[1]) > 0.06


def test_history_counts_values_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    loss, accuracy = drawn(plot_history([[nan, inf, 1], [0.1, 0.2, 0.3], [1e300, 2, nan], [nan] * 3])).axes
    assert "Lowest validation loss 2 in epoch 2 (4 values not finite)" in texts(loss)
    assert "No finite validation value (3 values not finite)" in texts(accuracy)
    assert len(drawn(plot_history([[nan]] * 4)).axes) == 2


@pytest.mark.parametrize("history", [[], [[1.0]] * 3, [[]] * 4, [[1.0], [1.0], [1.0, 2.0], [1.0]]])
def test_history_refuses_other_lists(history):
    with pytest.raises(ValueError, match=r"expected four lists .* found"):
        plot_history(history)


def test_results_tell_right_from_wrong_without_colour():
    shares = np.full((2, 7), 0.05)
    shares[:, 3] = 0.7
    figure = drawn(view_results(pictures(2), torch.tensor([3, 5]), probabilities=torch.tensor(shares)))
    right, right_bars, wrong, wrong_bars = figure.axes
    assert right.get_title() == "real happy\n✓ predicted happy"
    assert wrong.get_title() == "real sad\n✗ predicted happy"
    frames = [axes.spines["left"] for axes in (right, wrong)]
    assert frames[0].get_linestyle() != frames[1].get_linestyle()
    assert frames[0].get_linewidth() < frames[1].get_linewidth()
    assert texts(figure)[0] == "1 of 2 right"
    assert [tick.get_text() for tick in wrong_bars.get_yticklabels()] == list(CLASSES)
    assert [tick.get_text() for tick in wrong_bars.get_yticklabels() if tick.get_fontweight() == "bold"] == ["sad"]
    assert sorted(texts(wrong_bars)) == ["5 %", "70 %"] and texts(right_bars) == ["70 %"]
    assert np.allclose([bar.get_width() for bar in wrong_bars.patches[7:]], shares[1])


def test_results_of_a_model_and_its_modes_restored():
    model = FirstPixels(3, ("cat", "dog", "owl")).train().double()
    model.frozen.eval()
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 0, 0, 2], images[1, 0, 0, 1] = 255, 255
    figure = drawn(view_results(images, [2, 0], model))
    assert [axes.get_title() for axes in figure.axes[::2]] == ["real owl\n✓ predicted owl", "real cat\n✗ predicted dog"]
    assert model.met == [(False, False, torch.float64, True)]
    assert model.training and not model.frozen.training
    assert model.scale.grad is None


def test_results_restore_modes_when_the_model_fails():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 7))
    with pytest.raises(RuntimeError):
        view_results(pictures(1), [0], model)
    assert model.training and model[1].training


def test_results_names_fall_back_to_numbers_and_classes():
    assert drawn(view_results(pictures(1), [1], FirstPixels(4))).axes[0].get_title().startswith("real 1\n")
    assert drawn(view_results(pictures(1), [1], FirstPixels(7))).axes[0].get_title().startswith("real disgust\n")
    given = drawn(view_results(pictures(1), [1], FirstPixels(2, ("x", "y")), classes=("no", "yes")))
    assert given.axes[0].get_title().startswith("real yes\n")


def test_results_without_predictions_show_only_real_labels():
    figure = drawn(view_results(np.random.default_rng(0).random((3, 1, 8, 8)), np.array([0, 6, 3]), columns=2))
    assert [axes.get_title() for axes in figure.axes] == ["real angry", "real surprise", "real happy"]
    tops = [axes.get_position().y0 for axes in figure.axes]
    assert tops[0] == tops[1] > tops[2]


def test_results_of_many_classes_show_the_likeliest_and_the_real_one():
    names = [f"a rather long name of class {k}" for k in range(20)]
    shares = np.linspace(0, 0.1, 20)[None]
    picture, bars = drawn(view_results(pictures(1), [2], probabilities=shares, classes=names)).axes
    shown = [tick.get_text() for tick in bars.get_yticklabels()]
    assert len(shown) == 6 and shown[0].endswith("class 19") and shown[-1].endswith("class 2")
    assert all(len(line) < 32 for line in picture.get_title().split("\n"))


def test_results_show_64_pictures_inside_the_figure():
    figure = view_results(pictures(64, 3), torch.arange(64) % 7, FirstPixels(7), columns=8)
    assert len(figure.axes) == 128
    assert all(0 <= edge <= 1 for axes in figure.axes for edge in axes.get_position().extents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((0, 1, 8, 8))}, r"images: expected .*found \[0, 1, 8, 8\]"),
        ({"images": np.zeros((2, 8, 8))}, r"images: expected .*found \[2, 8, 8\]"),
        ({"images": np.full((2, 1, 8, 8), 255.0)}, "images: expected .*floats in 0..1, found float64"),
        ({"labels": [1]}, r"labels: expected integers \[2\].*found int64 \[1\]"),
        ({"labels": [0.0, 1.0]}, "labels: expected integers .*found float64"),
        ({"labels": [0, 3]}, "labels: expected 0..2, found 0..3"),
        ({"labels": [-1, 0]}, "labels: expected 0..2, found -1..0"),
        ({"probabilities": np.zeros((3, 3))}, r"probabilities: expected \[2,K\].*found \[3, 3\]"),
        ({"probabilities": np.full((2, 3), 4.0)}, "probabilities: expected .*0..1, found .*from 4 to 4"),
        ({"probabilities": np.full((2, 3), np.nan)}, "probabilities: expected"),
        ({"classes": ["a", "b"]}, "classes: expected 3 names, one per probability, found 2"),
        ({"model": FirstPixels(3)}, "a model or probabilities, found both"),
        ({"model": nn.Identity(), "probabilities": None}, r"model: expected logits \[2,K\], found \[2, 1, 8, 8\]"),
        ({"columns": 0}, "at least 1 column, found 0"),
    ],
)
def test_results_refuse_other_input(arguments, message):
    good = {"images": np.zeros((2, 1, 8, 8)), "labels": [0, 1], "probabilities": np.full((2, 3), 1 / 3)}
    with pytest.raises(ValueError, match=message):
        view_results(**{**good, **arguments})


def test_confusion_says_shares_and_counts_and_survives_empty_rows():
    figure = drawn(plot_confusion(torch.tensor([[1500, 500, 0], [0, 0, 0], [1, 1, 2]]), ["cat", "dog", "owl"]))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted", "Real")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "dog", "owl"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat\n2,000", "dog\n0", "owl\n4"]
    assert texts(axes) == [
        "75 %",
        "1,500",
        "25 %",
        "500",
        "0 %",
        "0",
        "–",
        "–",
        "–",
        "25 %",
        "1",
        "25 %",
        "1",
        "50 %",
        "2",
    ]
    assert texts(figure)[0] == "1,502 of 2,004 right (75.0 %)"
    right, wrong = (mesh.get_array() for mesh in axes.collections)
    assert right.compressed().tolist() == [0.75, 0.5] and wrong.compressed().tolist() == [0.25, 0, 0.25, 0.25]


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_confusion_fits_any_size_and_an_empty_matrix(size):
    figure = drawn(
        plot_confusion(np.zeros((size, size), int), [f"a rather long name of class {k}" for k in range(size)])
    )
    assert texts(figure)[0] == "0 of 0 right"
    assert texts(figure.axes[0]) == ["–"] * size**2


@pytest.mark.parametrize(
    "matrix", [np.zeros((2, 2), int), np.zeros((3, 2), int), np.zeros((3, 3)), -np.eye(3, dtype=int)]
)
def test_confusion_refuses_other_matrices(matrix):
    with pytest.raises(ValueError, match=r"matrix: expected integers .* for the 3 classes.* found"):
        plot_confusion(matrix, ["a", "b", "c"])


def test_names_are_no_formulas():
    figure = plot_confusion(np.eye(3, dtype=int), ("$a_{$", r"$\frac$", "cost $5"))
    figure.savefig(io.BytesIO(), format="png")  # which reads formulas, and fails for wrong ones
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [r"\$a_{\$", r"\$\frac\$", r"cost \$5"]


def test_figures_show_themselves_in_notebooks_and_never_load_pyplot():
    code = (
        "import sys; from dist_train.figures import plot_history; "
        "png = plot_history([[1.0]] * 4)._repr_png_(); "
        "print(png[1:4].decode(), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.split() == ["PNG", "False"]


@pytest.mark.filterwarnings("default")
def test_figures_are_logged_to_wandb(tmp_path):
    with wandb.init(mode="offline", dir=tmp_path) as run:
        figures = [plot_history([[1.0, 2.0]] * 4), view_results(pictures(2), [0, 1])]
        run.log({f"figure {i}": wandb.Image(figure) for i, figure in enumerate(figures)})
        sizes = [figure.canvas.get_width_height() for figure in figures]
    for file, size in zip(sorted(tmp_path.rglob("media/images/*.png")), sizes, strict=True):
        with Image.open(file) as picture:
            assert picture.size == size
