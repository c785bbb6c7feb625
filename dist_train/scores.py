"""Figures of a classifier from the probabilities it gave: per class, calibration, intervals, temperature.

In: probabilities, float [N, K], rows summing to 1, and labels, int [N]. All shares are 0..1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BINS = 15
RESAMPLES = 2000
Interval = tuple[float, float]


class ClassScore(NamedTuple):
    """Figures of one class; those whose denominator is 0 are 0, as in sklearn."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Bin(NamedTuple):
    """Answers of about one confidence: how many, how sure on average, and the share of right ones."""

    images: int
    confidence: float
    accuracy: float


def count_confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return int64 [K, K]: rows real, columns predicted."""
    size = probabilities.shape[1]
    return np.bincount(labels * size + probabilities.argmax(1), minlength=size * size).reshape(size, size)


def score_classes(confusion: np.ndarray, classes: tuple[str, ...]) -> list[ClassScore]:
    """Return the figures of each class."""
    columns = [values.tolist() for values in _class_shares(confusion)]
    return [ClassScore(*row) for row in zip(classes, *columns, confusion.sum(1).tolist(), strict=True)]


def _class_shares(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1, [..., K] each, of confusion matrices [..., K, K]."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted, real = confusion.sum(-2), confusion.sum(-1)
    return tuple(a / np.maximum(b, 1) for a, b in ((right, predicted), (right, real), (2 * right, predicted + real)))


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int = 2) -> float:
    """Return the share of samples whose real class is among the k likeliest."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((order == labels[:, None]).any(1).mean())


def find_intervals(confusion: np.ndarray, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % bootstrap intervals of accuracy and macro-F1.

    Drawing N samples with replacement draws their cells of the confusion matrix, which is one multinomial draw.
    """
    count, size = int(confusion.sum()), len(confusion)
    draws = np.random.default_rng(seed).multinomial(count, confusion.ravel() / count, RESAMPLES)
    draws = draws.reshape(RESAMPLES, size, size)
    found = {"accuracy": np.trace(draws, axis1=1, axis2=2) / count, "macro_f1": _class_shares(draws)[2].mean(1)}
    return {name: (float(low), float(high)) for name, (low, high) in _percentiles(found).items()}


def _percentiles(draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.percentile(values, (2.5, 97.5)) for name, values in draws.items()}


def find_mistakes(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the positions of the samples judged wrongly, the most confident mistakes first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]


# Calibration


def find_reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[Bin]:
    """Return BINS bins of equal width over the confidence, the empty ones with nan."""
    confidence, right = probabilities.max(1).astype(float), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # right-closed, as is usual
    counts = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=values, minlength=BINS) / counts for values in (confidence, right)]
    return [Bin(*row) for row in zip(counts.tolist(), *(mean.tolist() for mean in means), strict=True)]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Return the mean distance of confidence and accuracy, over samples."""
    total = sum(row.images for row in bins)
    return sum(row.images * abs(row.confidence - row.accuracy) for row in bins if row.images) / total


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log p / temperature): above 1 less sure, below 1 surer, the order kept."""
    logits = _logits(probabilities) / temperature
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature, 0.05 to 20, of the least log loss."""
    # Newton's steps in 1 / temperature, in which the log loss is convex
    logits, rows = _logits(probabilities), np.arange(len(labels))
    inverse = 1.0
    for _ in range(50):
        shares = apply_temperature(probabilities, 1 / inverse)
        mean = (shares * logits).sum(1)
        slope = (mean - logits[rows, labels]).mean()
        curve = ((shares * logits**2).sum(1) - mean**2).mean()
        step = np.clip(slope / max(curve, 1e-12), -inverse, inverse / 2)  # at most a factor of 2
        inverse = float(np.clip(inverse - step, 0.05, 20))
        if abs(step) < 1e-9:
            break
    return 1 / inverse


def _logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(float), 1e-30))


def describe(
    probabilities: np.ndarray, labels: np.ndarray, leaked: np.ndarray, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return all figures as plain numbers, for report.json.

    leaked: bool [N], the samples whose pixels the model has seen in training.
    """
    confusion = count_confusion(probabilities, labels)
    intervals = find_intervals(confusion)
    scores = score_classes(confusion, classes)
    bins = find_reliability(probabilities, labels)
    temperature = fit_temperature(probabilities, labels)
    cooled = find_reliability(apply_temperature(probabilities, temperature), labels)
    return {
        "images": len(labels),
        "accuracy": float(np.trace(confusion) / len(labels)),
        "accuracy_interval": intervals["accuracy"],
        **_describe_clean(probabilities[~leaked], labels[~leaked]),
        "images_seen_in_training": int(leaked.sum()),
        "macro_f1": float(np.mean([row.f1 for row in scores])),
        "macro_f1_interval": intervals["macro_f1"],
        "top2_accuracy": top_k_accuracy(probabilities, labels),
        "ece": expected_calibration_error(bins),
        "temperature": temperature,
        "ece_at_temperature": expected_calibration_error(cooled),
        "classes": [row._asdict() for row in scores],
        "confusion": confusion.tolist(),
        "confusion_normalised": (confusion / np.maximum(confusion.sum(1, keepdims=True), 1)).tolist(),
        "reliability": [
            row._asdict() if row.images else {"images": 0, "confidence": None, "accuracy": None} for row in bins
        ],
    }


def _describe_clean(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the figures of the samples not seen in training, or None where there are none."""
    if not len(labels):
        return {"clean_images": 0, "clean_accuracy": None, "clean_accuracy_interval": None}
    confusion = count_confusion(probabilities, labels)
    return {
        "clean_images": len(labels),
        "clean_accuracy": float(np.trace(confusion) / len(labels)),
        "clean_accuracy_interval": find_intervals(confusion)["accuracy"],
    }
