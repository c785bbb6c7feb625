"""view_results(): a grid of judged pictures, with what was predicted and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from dist_train.config import CLASSES
from dist_train.figures import INK, MUTED, OTHER, RIGHT, WRONG, as_array, calm, new_figure, shortened
from dist_train.model import eval_mode


def view_results(
    images: Any,
    labels: Any,
    model: nn.Module | None = None,
    *,
    classes: Sequence[str] | None = None,
    probabilities: Any = None,
    columns: int = 6,
) -> Figure:
    """A grid of pictures with their real class, the predicted class and the classes' probabilities.

    images: tensor or array [N,1|3,H,W], integers in 0..255 or floats in 0..1; labels: integers [N].
    model: gives logits [N,K] for the images as floats in 0..1; it runs in eval mode, and each of its
    modules then gets its mode back. probabilities: [N,K] in 0..1, in place of a model; with neither,
    only the real classes are shown. classes: K names; by default model.classes if it has any, else
    CLASSES where K is 7 (or, K unknown, where the labels fit), else the numbers. Up to 8 classes all
    get a bar, of more only the likeliest six, the real one always among them.
    Raises ValueError for anything empty, of another shape or range, or for both model and probabilities.
    """
    pictures, truth = _checked_pictures(images), as_array(labels)
    count = len(pictures)
    if truth.shape != (count,) or truth.dtype.kind not in "iu":
        raise ValueError(f"labels: expected integers [{count}], one per image, found {truth.dtype} {list(truth.shape)}")
    if columns < 1 or (model is not None and probabilities is not None):
        raise ValueError(
            f"expected at least 1 column, found {columns}"
            if columns < 1
            else "expected a model or probabilities, found both"
        )
    shares = None if probabilities is None else as_array(probabilities).astype(float)
    if model is not None:
        shares = _predict(model, pictures)
    if shares is not None and (
        shares.ndim != 2
        or len(shares) != count
        or shares.size == 0
        or not ((shares >= -1e-6) & (shares <= 1 + 1e-6)).all()
    ):
        raise ValueError(
            f"probabilities: expected [{count},K] in 0..1, found {list(shares.shape)} "
            f"from {shares.min(initial=np.inf):.3g} to {shares.max(initial=-np.inf):.3g}"
        )
    names = _class_names(classes if classes is not None else getattr(model, "classes", None), shares, truth)
    if truth.min() < 0 or truth.max() >= len(names):
        raise ValueError(f"labels: expected 0..{len(names) - 1}, found {truth.min()}..{truth.max()}")
    return _draw_grid(pictures, truth, shares, names, min(columns, count))


def _checked_pictures(images: Any) -> np.ndarray:
    """The images as float32 [N,1|3,H,W] in 0..1."""
    pictures = as_array(images)
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or 0 in pictures.shape:
        raise ValueError(f"images: expected [N,1|3,H,W] with N of at least 1, found {list(pictures.shape)}")
    top = 1 if pictures.dtype.kind == "f" else 255
    if pictures.dtype.kind not in "fiu" or not ((pictures >= -1e-3) & (pictures <= top + 1e-3)).all():
        raise ValueError(
            "images: expected integers in 0..255 or floats in 0..1, "
            f"found {pictures.dtype} from {pictures.min()} to {pictures.max()}"
        )
    return np.clip(pictures.astype(np.float32) / top, 0, 1)


def _predict(model: nn.Module, pictures: np.ndarray) -> np.ndarray:
    """The model's probabilities [N,K]."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    with eval_mode(model), torch.inference_mode():
        logits = model(torch.from_numpy(pictures).to(like.device, like.dtype))
    if logits.ndim != 2 or len(logits) != len(pictures):
        raise ValueError(f"model: expected logits [{len(pictures)},K], found {list(logits.shape)}")
    return as_array(logits.float().softmax(1))


def _class_names(given: Sequence[str] | None, shares: np.ndarray | None, truth: np.ndarray) -> list[str]:
    """K names: the given ones, the package's or numbers."""
    size = max(len(CLASSES), int(truth.max()) + 1) if shares is None else shares.shape[1]
    if given is None:
        return list(CLASSES) if size == len(CLASSES) else [str(k) for k in range(size)]
    if shares is not None and len(given) != size:
        raise ValueError(f"classes: expected {size} names, one per probability, found {len(given)}")
    return [str(name) for name in given]


def _draw_grid(
    pictures: np.ndarray, truth: np.ndarray, shares: np.ndarray | None, names: list[str], columns: int
) -> Figure:
    """Lay the cells out in inches, so that one picture and sixty look alike."""
    bars = 0 if shares is None else len(names) if len(names) <= 8 else 6
    label = 0.1 + 0.058 * min(max(len(name) for name in names), 20)
    side, edge, gap, head = max(1.6, label + 1.0), 0.3, 0.35, 0.62
    title, chart = (0.42, 0.08 + 0.145 * bars) if bars else (0.24, 0.0)
    width = 2 * edge + columns * (side + gap) - gap
    height = head + -(-len(pictures) // columns) * (title + side + chart + gap)
    figure = new_figure(width, height)

    def axes_at(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    guesses = truth if shares is None else shares.argmax(1)
    said = f"{int((guesses == truth).sum())} of {len(truth)} right" if bars else f"Pictures: {len(truth)}"
    figure.text(edge / width, 1 - 0.4 / height, said, size=13, weight="bold", color=INK)
    if bars and columns > 2:
        figure.text(
            1 - edge / width,
            1 - 0.4 / height,
            "dashed frame: wrong    bold: the real class",
            size=8,
            color=MUTED,
            ha="right",
        )
    for i, (picture, real, guess) in enumerate(zip(pictures, truth, guesses, strict=True)):
        x, y = edge + i % columns * (side + gap), head + title + i // columns * (title + side + chart + gap)
        axes = axes_at(x, y, side, side)
        _draw_picture(axes, picture, real != guess)
        text = f"real {shortened(names[real], int(side / 0.08) - 5)}"
        if shares is not None:
            mark = "✓" if real == guess else "✗"
            text += f"\n{mark} predicted {shortened(names[guess], int(side / 0.08) - 12)}"
            below = axes_at(x + label, y + side + 0.08, side - label, chart - 0.08)
            _draw_bars(below, shares[i], names, int(real), bars)
        # The family is named since others may lack the marks.
        axes.set_title(
            text,
            x=0,
            ha="left",
            size=8.5,
            color=INK if real == guess else WRONG,
            pad=5,
            linespacing=1.35,
            family="DejaVu Sans",
        )
    return figure


def _draw_picture(axes: Axes, picture: np.ndarray, wrong: bool) -> None:
    """One picture; a heavy dashed frame says wrong without need of colour."""
    pixels = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
    smooth = "bicubic" if max(pixels.shape) < 300 else "auto"
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=smooth)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=WRONG if wrong else OTHER, linewidth=2.4 if wrong else 0.8)
    if wrong:
        axes.spines[:].set(linestyle=(0, (3, 1.6)), capstyle="butt")


def _draw_bars(axes: Axes, share: np.ndarray, names: list[str], real: int, bars: int) -> None:
    """Bars of one picture's probabilities: the predicted one coloured, the real one's name bold."""
    shown, guess = list(range(len(names))), int(share.argmax())
    if bars < len(names):
        shown = np.argsort(-share, kind="stable")[:bars].tolist()
        shown = shown if real in shown else [*shown[:-1], real]
    colour = RIGHT if guess == real else WRONG
    axes.barh(range(bars), 1, height=0.62, color="#f1f3f5")
    axes.barh(range(bars), share[shown], height=0.62, color=[colour if k == guess else OTHER for k in shown])
    axes.set(xlim=(0, 1.48), ylim=(bars - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(bars), [shortened(names[k], 20) for k in shown])
    calm(axes)
    axes.tick_params(labelsize=6.5, pad=3)
    for row, (k, tick) in enumerate(zip(shown, axes.get_yticklabels(), strict=True)):
        weight = "bold" if k == real else "normal"
        tick.set(fontweight=weight, color=INK if k in (real, guess) else MUTED)
        if k in (real, guess):
            said = f"{100 * share[k]:.0f} %"
            axes.text(1.48, row, said, size=6.5, va="center", ha="right", color=INK, weight=weight)
