from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_train import evaluate
from dist_train.config import InputError
from dist_train.metrics import Meter, Results, Sums

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(500, 7, generator=GENERATOR)
LABELS = torch.randint(0, 7, (500,), generator=GENERATOR)


def summed(order: list[int], size: int) -> Results:
    sums = Sums(7, torch.device("cpu"))
    for chunk in torch.tensor(order).split(size):
        logits, labels = LOGITS[chunk], LABELS[chunk]
        sums.update(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    return sums.reduce(Accelerator(cpu=True))


def test_figures_are_those_of_sklearn_and_torch():
    results = summed(list(range(500)), 64)
    predicted = LOGITS.argmax(1)
    assert results.count == 500
    assert results.accuracy == accuracy_score(LABELS, predicted)
    assert results.macro_f1 == pytest.approx(f1_score(LABELS, predicted, average="macro"), abs=1e-9)
    assert results.loss == pytest.approx(float(F.cross_entropy(LOGITS, LABELS)), abs=1e-6)
    assert np.array_equal(results.confusion, confusion_matrix(LABELS, predicted))


def test_adding_batches_in_another_order_gives_the_same_loss_to_the_last_bit():
    sums, backwards = Sums(7, torch.device("cpu")), Sums(7, torch.device("cpu"))
    batches = [
        (F.cross_entropy(lo, la, reduction="sum"), lo, la)
        for lo, la in zip(LOGITS.split(7), LABELS.split(7), strict=True)
    ]
    for batch, reverse in zip(batches, reversed(batches), strict=True):
        sums.update(*batch)
        backwards.update(*reverse)
    assert float(sums.loss) == float(backwards.loss)


def test_mixed_labels_count_for_their_greatest_share():
    sums = Sums(3, torch.device("cpu"))
    sums.update(torch.tensor(1.0), torch.eye(3)[:2], torch.tensor([[0.6, 0.4, 0.0], [0.8, 0.2, 0.0]]))
    assert sums.reduce(Accelerator(cpu=True)).accuracy == 0.5


def test_meter_tells_the_epoch_and_what_is_new_and_survives_a_checkpoint():
    accelerator = Accelerator(cpu=True)
    meter, resumed = Meter(accelerator), Meter(accelerator)
    for number, chunk in enumerate(torch.arange(500).split(100)):
        meter.update(F.cross_entropy(LOGITS[chunk], LABELS[chunk], reduction="sum"), LOGITS[chunk], LABELS[chunk])
        if number == 1:
            assert [results.count for results in meter.look()[:2]] == [200, 200]
        if number == 2:
            resumed.load_state_dict(meter.state_dict())
            resumed.start_clock()
        if number > 2:
            resumed.update(F.cross_entropy(LOGITS[chunk], LABELS[chunk], reduction="sum"), LOGITS[chunk], LABELS[chunk])
    total, recent, _ = meter.look()
    total_resumed, recent_resumed, _ = resumed.look()
    assert (total.count, recent.count) == (500, 300)
    assert (total.loss_sum, recent.loss_sum) == (total_resumed.loss_sum, recent_resumed.loss_sum)
    assert torch.equal(recent.confusion, recent_resumed.confusion)
    assert meter.end_epoch()[0].count == 500


def test_evaluate_counts_every_sample_and_restores_the_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Identity())
    results = evaluate(model.train(), DataLoader(TensorDataset(LOGITS, LABELS), batch_size=64))
    assert results.accuracy == accuracy_score(LABELS, LOGITS.argmax(1))
    assert model.training


def test_evaluate_refuses_an_empty_loader():
    with pytest.raises(InputError, match="no samples"):
        evaluate(torch.nn.Identity(), DataLoader(TensorDataset(LOGITS[:0], LABELS[:0])))
