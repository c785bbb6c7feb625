"""Figures of a training: its history, the confusion matrix, the reliability of its probabilities.
All are matplotlib Figures made without pyplot's state: no display needed."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dist_train.scores import Bin

INK, MUTED, FAINT, HAIR, PAPER = "#22272e", "#66707c", "#98a1ab", "#dfe3e8", "#ffffff"
# After Okabe and Ito's blue and vermillion, which the common colour-vision deficiencies keep apart.
RIGHT, WRONG, OTHER = "#0072b2", "#c94f00", "#b9c0c8"
RIGHT_RAMP = LinearSegmentedColormap.from_list("right", ["#f3f6f9", "#7db4d8", RIGHT, "#004a78"])
WRONG_RAMP = LinearSegmentedColormap.from_list("wrong", ["#f8f6f4", "#f2b48a", WRONG, "#7d3000"])


def new_figure(width: float, height: float) -> Figure:
    """Return an empty Figure of that many inches which shows itself in notebooks and can be logged to W&B.

    It is a plain Figure, as W&B knows no other; and wandb.Image looks for pyplot before it takes one.
    """
    if getattr(sys.modules.get("wandb"), "run", None):
        import matplotlib.pyplot  # noqa: F401
    figure = Figure(figsize=(width, height), dpi=144, facecolor=PAPER)
    figure.__dict__["_repr_png_"] = partial(_png, figure)  # IPython's name for it; pyplot would have to be imported
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def as_array(values: Any) -> np.ndarray:
    """A tensor of any device and type, or anything array-like, as an array."""
    if isinstance(values, torch.Tensor):
        return (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
    return np.asarray(values)


def shortened(name: str, most: int) -> str:
    """The name in at most so many characters; both ends stay, as long names often differ at the end.

    A dollar sign is escaped, which would begin a formula in a figure.
    """
    tail = (most - 1) // 2
    short = name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}"
    return short.replace("$", r"\$")


def plot_history(history: Sequence[Sequence[float]]) -> Figure:
    """Loss and accuracy over the epochs, the best validation epoch of each ringed and said in words.

    history: four lists (train_loss, train_acc, valid_loss, valid_acc) with one number per epoch,
    accuracies in 0..1. Values that are not finite leave a gap in their line and are counted in words.
    Raises ValueError if these are not four lists of one length, or if they are empty.
    """
    lists = check_history(history)
    figure = new_figure(10.5, 4.2)
    loss, accuracy = figure.subplots(
        1, 2, gridspec_kw={"left": 0.06, "right": 0.905, "bottom": 0.13, "top": 0.83, "wspace": 0.42}
    )
    draw_loss(loss, lists)
    draw_accuracy(accuracy, lists)
    return figure


def check_history(history: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Return the four lists of a history as arrays; ValueError if it has others."""
    lists = [np.asarray(values, dtype=float).ravel() for values in history]
    lengths = [len(values) for values in lists]
    if len(lists) != 4 or len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            "history: expected four lists (train_loss, train_acc, valid_loss, valid_acc) of one "
            f"length of at least 1, found {len(lists)} of lengths {lengths}"
        )
    return lists


def draw_loss(axes: Axes, lists: list[np.ndarray]) -> None:
    """Draw the losses of a history, from check_history."""
    _draw_panel(axes, "Loss", lambda v, at: f"Lowest validation loss {v:.3g} in epoch {at}", lists[::2], np.nanargmin)


def draw_accuracy(axes: Axes, lists: list[np.ndarray]) -> None:
    """Draw the accuracies of a history, from check_history."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")

    def say(value: float, at: int) -> str:
        return f"Best validation accuracy {value * 100:.1f} % in epoch {at}"

    _draw_panel(axes, "Accuracy", say, lists[1::2], np.nanargmax)


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
    calm(axes)
    axes.spines["bottom"].set(visible=True, color=OTHER)


def plot_rates(rates: Any, losses: Any, smoothed: Any, suggested: float, configured: float) -> Figure:
    """The loss over the learning rate of a range test, with the rate that it suggests and the one in the config.

    rates, losses, smoothed: numbers [N], N >= 1, rates rising. Losses that are not finite leave a gap.
    """
    rates, losses, smoothed = (np.asarray(values, dtype=float) for values in (rates, losses, smoothed))
    figure = new_figure(7.0, 4.2)
    axes = figure.add_axes((0.09, 0.14, 0.87, 0.68))
    axes.plot(rates, losses, "o", ms=3, color=OTHER)
    axes.plot(rates, smoothed, color=RIGHT, lw=2.2)
    known = smoothed[np.isfinite(smoothed)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    pad = 0.15 * max(high - low, 0.1)  # a single wild loss must not flatten the curve
    axes.set(xscale="log", xlim=(rates[0], rates[-1] * 1.05), ylim=(low - pad, high + pad))
    for rate, name, colour, style, height in (
        (suggested, "suggested", RIGHT, "-", 0.94),
        (configured, "in the config", MUTED, ":", 0.86),
    ):
        if rates[0] <= rate <= rates[-1]:
            axes.axvline(rate, color=colour, lw=1.2, ls=style, zorder=1)
            axes.text(
                rate, height, f"{name}  ", transform=axes.get_xaxis_transform(), ha="right", size=9.5, color=colour
            )
    axes.minorticks_off()
    axes.set(xlabel="Learning rate", ylabel="Training loss")
    axes.grid(axis="y", color=HAIR, lw=0.8)
    calm(axes)
    axes.spines["bottom"].set(visible=True, color=OTHER)
    axes.text(0, 1.14, "Learning-rate range test", transform=axes.transAxes, size=13, weight="bold", color=INK)
    said = f"Suggested {suggested:.2g}: a tenth of the rate at which the smoothed loss is lowest"
    axes.text(0, 1.05, said, transform=axes.transAxes, size=9.5, color=INK)
    return figure


def calm(axes: Axes) -> None:
    """No box, no tick marks, quiet labels."""
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED, pad=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=9.5)


def plot_confusion(matrix: Any, classes: Sequence[str]) -> Figure:
    """The confusion matrix as a coloured table: shares of the real class, and counts.

    matrix: counts, integers >= 0 [K,K], rows real and columns predicted; classes: the K names.
    A class without pictures has dashes in its row. Raises ValueError for another shape, type or range.
    """
    counts, size = as_array(matrix), len(classes)
    if size == 0 or counts.shape != (size, size) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(
            f"matrix: expected integers of at least 0, [K,K] for the {size} classes, K >= 1, "
            f"found {counts.dtype} {list(counts.shape)} from {counts.min(initial=0)}"
        )
    totals, total, hits = counts.sum(1), int(counts.sum()), int(np.trace(counts))
    labels = [shortened(str(name), 24) for name in classes]
    longest = max(map(len, labels))
    slanted, margin, cell = longest > 9, 0.75 + 0.08 * longest, 0.72 if size < 12 else 0.6
    foot, table = 0.65 + 0.05 * longest * slanted, cell * size
    width, height = max(margin + table + 0.35, 5.0), foot + table + 0.95
    figure = new_figure(width, height)
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
    calm(axes)
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


def plot_reliability(bins: Sequence[Bin]) -> Figure:
    """How often answers of a confidence are right, and how many there are; calibrated answers lie on the diagonal."""
    figure = new_figure(4.7, 4.6)
    axes = figure.add_axes((0.14, 0.34, 0.81, 0.54))
    below = figure.add_axes((0.14, 0.11, 0.81, 0.14), sharex=axes)
    width, total = 1 / len(bins), sum(row.images for row in bins)
    middles = (np.arange(len(bins)) + 0.5) * width
    axes.bar(middles, [row.accuracy if row.images else 0 for row in bins], 0.86 * width, color=RIGHT)
    axes.plot([0, 1], [0, 1], color=WRONG, lw=1.6, ls=(0, (4, 2)))
    below.bar(middles, [row.images / max(total, 1) for row in bins], 0.86 * width, color=OTHER)
    for part, name in ((axes, "Right"), (below, "Answers")):
        part.set_ylabel(name)
        part.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        part.grid(axis="y", color=HAIR, lw=0.8)
        part.set_axisbelow(True)
        calm(part)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    below.locator_params(axis="y", nbins=2)
    below.set_xlabel("Confidence")
    below.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.text(0, 1.13, "Reliability", transform=axes.transAxes, size=13, weight="bold", color=INK)
    axes.text(
        0,
        1.04,
        "Below the dashed line: too sure. Above: not sure enough",
        transform=axes.transAxes,
        size=9.5,
        color=INK,
    )
    return figure
