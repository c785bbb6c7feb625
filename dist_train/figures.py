"""Figures of a training: its history, a grid of judged pictures, the confusion matrix.
All are matplotlib Figures made without pyplot: no global state, no display needed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from dist_train.config import CLASSES

INK, MUTED, FAINT, HAIR, PAPER = "#22272e", "#66707c", "#98a1ab", "#dfe3e8", "#ffffff"
# After Okabe and Ito's blue and vermillion, which the common colour-vision deficiencies keep apart.
RIGHT, WRONG, OTHER = "#0072b2", "#c94f00", "#b9c0c8"
RIGHT_RAMP = LinearSegmentedColormap.from_list("right", ["#f3f6f9", "#7db4d8", RIGHT, "#004a78"])
WRONG_RAMP = LinearSegmentedColormap.from_list("wrong", ["#f8f6f4", "#f2b48a", WRONG, "#7d3000"])


class _NotebookFigure(Figure):
    """A Figure that shows itself in a notebook even where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_history(history: Sequence[Sequence[float]]) -> Figure:
    """Loss and accuracy over the epochs, the best validation epoch of each ringed and said in words.

    history: four lists (train_loss, train_acc, valid_loss, valid_acc) with one number per epoch,
    accuracies in 0..1. Values that are not finite leave a gap in their line and are counted in words.
    Raises ValueError if these are not four lists of one length, or if they are empty.
    """
    lists = [np.asarray(values, dtype=float).ravel() for values in history]
    lengths = [len(values) for values in lists]
    if len(lists) != 4 or len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            "history: expected four lists (train_loss, train_acc, valid_loss, valid_acc) of one "
            f"length of at least 1, found {len(lists)} of lengths {lengths}"
        )
    figure = _NotebookFigure(figsize=(10.5, 4.2), dpi=144, facecolor=PAPER)
    loss, accuracy = figure.subplots(
        1, 2, gridspec_kw={"left": 0.06, "right": 0.905, "bottom": 0.13, "top": 0.83, "wspace": 0.42}
    )
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _draw_panel(loss, "Loss", lambda v, at: f"Lowest validation loss {v:.3g} in epoch {at}", lists[::2], np.nanargmin)
    _draw_panel(
        accuracy,
        "Accuracy",
        lambda v, at: f"Best validation accuracy {v * 100:.1f} % in epoch {at}",
        lists[1::2],
        np.nanargmax,
    )
    return figure


def _draw_panel(
    axes: Axes, name: str, words: Callable[[float, int], str], lines: list[np.ndarray], best: Callable[..., Any]
) -> None:
    """One panel: both lines named at their ends, the best validation epoch ringed and told below the name."""
    # Beyond 1e100 the axis limits would overflow; such a loss tells no more than an infinite one.
    both = np.stack([np.where(np.abs(values) < 1e100, values, np.nan) for values in lines])
    lost, epochs = int(np.isnan(both).sum()), both.shape[1]
    low, high = (np.nanmin(both), np.nanmax(both)) if lost < both.size else (0.0, 1.0)
    pad = max(0.08 * (high - low), 0.1 * abs(high) - (high - low) / 2, 1e-6)
    # No room below 0, nor above 100 %, that would invite a tick there.
    bottom = low - pad if low < 0 else max(low - pad, -0.015 * max(high, 1e-6))
    top = high + pad if name == "Loss" or high > 1 else min(high + pad, 1.015)
    axes.set(xlim=(1 - max(0.02 * epochs, 0.15), epochs + max(0.01 * epochs, 0.1)), ylim=(bottom, top))
    said, ends = "No finite validation value", []
    if not np.isnan(both[1]).all():
        at = int(best(both[1]))
        said = words(both[1, at], at + 1)
        axes.axvline(at + 1, color=OTHER, lw=1.2, ls=":", zorder=1)
        axes.plot(
            [at + 1], both[1, at], "o", ms=9, mfc=PAPER, mec=RIGHT, mew=1.8, zorder=5, clip_on=False, label="best"
        )
    # A point between two gaps has no line to show it, so broken lines get markers too.
    marker = "o" if epochs <= 20 or lost else ""
    for values, text, colour, width in ((both[0], "train", MUTED, 1.4), (both[1], "validation", RIGHT, 2.2)):
        axes.plot(range(1, epochs + 1), values, color=colour, lw=width, marker=marker, ms=3.5, zorder=4, label=text)
        ends += [((v - bottom) / (top - bottom), text, colour) for v in values[~np.isnan(values)][-1:]]
    if len(ends) == 2 and abs(ends[0][0] - ends[1][0]) < 0.065:
        middle, shift = (ends[0][0] + ends[1][0]) / 2, 0.0325 if ends[0][0] >= ends[1][0] else -0.0325
        ends = [(middle + shift, *ends[0][1:]), (middle - shift, *ends[1][1:])]
    for y, text, colour in ends:
        axes.text(
            1.025,
            y,
            text,
            transform=axes.transAxes,
            color=colour,
            size=9.5,
            va="center",
            weight="bold" if colour == RIGHT else "normal",
        )
    said += f" ({lost} values not finite)" if lost else ""
    axes.text(0, 1.13, name, transform=axes.transAxes, size=13, weight="bold", color=INK)
    axes.text(0, 1.05, said, transform=axes.transAxes, size=9.5, color=INK)
    step = next((s for s in (1, 5, 10, 20, 50, 100) if epochs <= 10 * s), -(-epochs // 10))
    axes.set_xticks(sorted({1, *range(step, epochs + 1, step)}))
    axes.set_xlabel("Epoch")
    axes.grid(axis="y", color=HAIR, lw=0.8)
    _calm(axes)
    axes.spines["bottom"].set(visible=True, color=OTHER)


def _calm(axes: Axes) -> None:
    """No box, no tick marks, quiet labels."""
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED, pad=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=9.5)


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
    pictures, truth = _checked_pictures(images), _array(labels)
    count = len(pictures)
    if truth.shape != (count,) or truth.dtype.kind not in "iu":
        raise ValueError(f"labels: expected integers [{count}], one per image, found {truth.dtype} {list(truth.shape)}")
    if columns < 1 or (model is not None and probabilities is not None):
        raise ValueError(
            f"expected at least 1 column, found {columns}"
            if columns < 1
            else "expected a model or probabilities, found both"
        )
    shares = None if probabilities is None else _array(probabilities).astype(float)
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


def _array(values: Any) -> np.ndarray:
    """A tensor of any device and type, or anything array-like, as an array."""
    if isinstance(values, torch.Tensor):
        return (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
    return np.asarray(values)


def _checked_pictures(images: Any) -> np.ndarray:
    """The images as float32 [N,1|3,H,W] in 0..1."""
    pictures = _array(images)
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
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            logits = model(torch.from_numpy(pictures).to(like.device, like.dtype))
    finally:
        # One by one: model.train() would wake modules that someone froze in eval mode.
        for module, mode in modes:
            module.training = mode
    if logits.ndim != 2 or len(logits) != len(pictures):
        raise ValueError(f"model: expected logits [{len(pictures)},K], found {list(logits.shape)}")
    return _array(logits.float().softmax(1))


def _class_names(given: Sequence[str] | None, shares: np.ndarray | None, truth: np.ndarray) -> list[str]:
    """K names: the given ones, the package's or numbers."""
    size = max(len(CLASSES), int(truth.max()) + 1) if shares is None else shares.shape[1]
    if given is None:
        return list(CLASSES) if size == len(CLASSES) else [str(k) for k in range(size)]
    if shares is not None and len(given) != size:
        raise ValueError(f"classes: expected {size} names, one per probability, found {len(given)}")
    return [str(name) for name in given]


def _short(name: str, most: int) -> str:
    """The name in at most so many characters; both ends stay, as long names often differ at the end."""
    tail = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}"


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
    figure = _NotebookFigure(figsize=(width, height), dpi=144, facecolor=PAPER)

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
        text = f"real {_short(names[real], int(side / 0.08) - 5)}"
        if shares is not None:
            mark = "✓" if real == guess else "✗"
            text += f"\n{mark} predicted {_short(names[guess], int(side / 0.08) - 12)}"
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
    axes.set_yticks(range(bars), [_short(names[k], 20) for k in shown])
    _calm(axes)
    axes.tick_params(labelsize=6.5, pad=3)
    for row, (k, tick) in enumerate(zip(shown, axes.get_yticklabels(), strict=True)):
        weight = "bold" if k == real else "normal"
        tick.set(fontweight=weight, color=INK if k in (real, guess) else MUTED)
        if k in (real, guess):
            said = f"{100 * share[k]:.0f} %"
            axes.text(1.48, row, said, size=6.5, va="center", ha="right", color=INK, weight=weight)


def plot_confusion(matrix: Any, classes: Sequence[str]) -> Figure:
    """The confusion matrix as a coloured table: shares of the real class, and counts.

    matrix: counts, integers >= 0 [K,K], rows real and columns predicted; classes: the K names.
    A class without pictures has dashes in its row. Raises ValueError for another shape, type or range.
    """
    counts, size = _array(matrix), len(classes)
    if size == 0 or counts.shape != (size, size) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(
            f"matrix: expected integers of at least 0, [K,K] for the {size} classes, K >= 1, "
            f"found {counts.dtype} {list(counts.shape)} from {counts.min(initial=0)}"
        )
    totals, total, hits = counts.sum(1), int(counts.sum()), int(np.trace(counts))
    labels = [_short(str(name), 24) for name in classes]
    longest = max(map(len, labels))
    slanted, margin, cell = longest > 9, 0.75 + 0.08 * longest, 0.72 if size < 12 else 0.6
    foot, table = 0.65 + 0.05 * longest * slanted, cell * size
    width, height = max(margin + table + 0.35, 5.0), foot + table + 0.95
    figure = _NotebookFigure(figsize=(width, height), dpi=144, facecolor=PAPER)
    axes = figure.add_axes((margin / width, foot / height, table / width, table / height))
    _draw_cells(axes, counts, totals)
    axes.set(xlim=(0, size), ylim=(size, 0), xlabel="Predicted", ylabel="Real")
    axes.set_xticks(
        np.arange(size) + 0.5,
        labels,
        rotation=40 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    axes.set_yticks(np.arange(size) + 0.5, [f"{n}\n{t:,}" for n, t in zip(labels, totals, strict=True)])
    _calm(axes)
    axes.tick_params(labelcolor=INK)
    said = f"{hits:,} of {total:,} right" + (f" ({100 * hits / total:.1f} %)" if total else "")
    hint = "Rows: real class and its number of pictures; shares are of the row"
    figure.text(0.25 / width, 1 - 0.38 / height, said, size=13, weight="bold", color=INK)
    figure.text(0.25 / width, 1 - 0.62 / height, hint, size=8.5, color=MUTED)
    return figure


def _draw_cells(axes: Axes, counts: np.ndarray, totals: np.ndarray) -> None:
    """Right cells in blue, wrong ones in vermillion, the darker the larger their share of the row."""
    shares, diagonal = counts / np.maximum(totals, 1)[:, None], np.eye(len(counts), dtype=bool)
    for ramp, hidden in ((RIGHT_RAMP, ~diagonal), (WRONG_RAMP, diagonal)):
        seen = np.ma.masked_array(shares, hidden | (totals == 0)[:, None])
        axes.pcolormesh(seen, cmap=ramp, vmin=0, vmax=1, edgecolors=PAPER, linewidth=2.5)
    for (row, column), count in np.ndenumerate(counts):
        share, x = shares[row, column], column + 0.5
        if totals[row] == 0:
            axes.text(x, row + 0.5, "–", ha="center", va="center", size=10, color=FAINT)
            continue
        # Each colour starts where it reads better than the other on both ramps.
        colour = PAPER if share > 0.52 else INK if count else FAINT
        weight = "bold" if row == column else "normal"
        axes.text(x, row + 0.51, f"{100 * share:.0f} %", ha="center", size=10, color=colour, weight=weight)
        axes.text(x, row + 0.58, f"{count:,}", ha="center", va="top", size=7.5, color=colour)
