"""Tests of dist_train.scores: figures agree with sklearn's and with their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from dist_train import scores

RANDOM = np.random.default_rng(0)
NAMES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")


def drawn(count: int = 3000, sharpness: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them made less sure by a factor of two; class 1 is never predicted."""
    logits = RANDOM.normal(size=(count, 7)) * sharpness
    logits[:, 1] -= 100
    true = np.exp(logits / 2)
    labels = (true.cumsum(1) / true.sum(1, keepdims=True) < RANDOM.random((count, 1))).sum(1)
    shares = np.exp(logits)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32), labels


SHARES, LABELS = drawn()
LABELS[:30] = 1


def test_figures_are_those_of_sklearn():
    leaked = np.arange(len(LABELS)) % 10 == 0
    found = scores.describe(SHARES, LABELS, leaked, NAMES)
    predicted = SHARES.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(LABELS, predicted), abs=1e-9)
    assert found["macro_f1"] == pytest.approx(f1_score(LABELS, predicted, average="macro", zero_division=0), abs=1e-9)
    assert found["top2_accuracy"] == pytest.approx(top_k_accuracy_score(LABELS, SHARES, k=2, labels=range(7)), abs=1e-9)
    assert found["confusion"] == confusion_matrix(LABELS, predicted).tolist()
    assert np.allclose(found["confusion_normalised"], confusion_matrix(LABELS, predicted, normalize="true"), atol=1e-9)
    table = np.array(precision_recall_fscore_support(LABELS, predicted, zero_division=0)).T
    assert np.allclose([list(row.values())[1:] for row in found["classes"]], table, atol=1e-9)
    assert found["classes"][1] == {"name": "disgust", "precision": 0, "recall": 0, "f1": 0, "support": 30}
    assert found["clean_accuracy"] == pytest.approx(accuracy_score(LABELS[~leaked], predicted[~leaked]), abs=1e-9)
    assert (found["images"], found["clean_images"], found["images_seen_in_training"]) == (3000, 2700, 300)
    assert json.loads(json.dumps(found, allow_nan=False)) is not None


def test_reliability_is_that_of_a_plain_loop():
    confidence, right = SHARES.max(1), SHARES.argmax(1) == LABELS
    error = 0.0
    bins = scores.find_reliability(SHARES, LABELS)
    for number, row in enumerate(bins):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert row.images == inside.sum()
        if row.images:
            assert row.accuracy == pytest.approx(right[inside].mean(), abs=1e-6)
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert sum(row.images for row in bins) == len(LABELS)
    assert scores.expected_calibration_error(bins) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.3, 5.0])
def test_temperature_is_the_best_one_and_mends_calibration(factor):
    shares, labels = drawn(20000, 2.0)
    shares = scores.apply_temperature(shares, factor)
    found = scores.fit_temperature(shares, labels)
    assert found == pytest.approx(2 / factor, rel=0.05)
    best = minimize_scalar(
        lambda t: log_loss(labels, scores.apply_temperature(shares, t), labels=range(7)), bounds=(0.05, 20)
    )
    assert found == pytest.approx(best.x, rel=1e-4)
    mended = scores.apply_temperature(shares, found)
    assert scores.expected_calibration_error(scores.find_reliability(mended, labels)) < 0.015
    assert np.array_equal(mended.argmax(1), shares.argmax(1))


def test_intervals_are_those_of_drawing_samples_again():
    confusion = scores.count_confusion(SHARES, LABELS)
    low, high = scores.find_intervals(confusion)["accuracy"]
    right = SHARES.argmax(1) == LABELS
    again = [right[RANDOM.integers(0, len(right), len(right))].mean() for _ in range(1000)]
    assert (low, high) == pytest.approx(np.percentile(again, (2.5, 97.5)), abs=0.003)
    assert scores.find_intervals(confusion) == scores.find_intervals(confusion)
    f1 = scores.find_intervals(confusion)["macro_f1"]
    assert f1[0] < f1_score(LABELS, SHARES.argmax(1), average="macro", zero_division=0) < f1[1]


def test_without_clean_images_there_is_no_clean_accuracy():
    found = scores.describe(SHARES, LABELS, np.ones(len(LABELS), bool), NAMES)
    assert found["clean_images"] == 0 and found["clean_accuracy"] is None
