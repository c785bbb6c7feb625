"""find_label_errors(): validation images whose label is likely wrong, as a run that never saw them finds.

In: a run and its data. Out: suspects, the likeliest first, as cleanlab's confident learning ranks them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train.config import Config, InputError
from dist_train.data.images import find_leaked, load_splits
from dist_train.evaluation import judge
from dist_train.model import load_run


class Suspect(NamedTuple):
    """An image whose label is doubted: its name in the data, what it is labelled and taken for, how surely."""

    name: str
    label: str
    predicted: str
    confidence: float


def find_label_errors(run_dir: Path, config: Config) -> list[Suspect]:
    """Return the suspects among the validation images that are not also in train.

    config: the run's. Raises InputError where cleanlab is not installed or the classes are not the model's.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise InputError("--run: needs cleanlab; pip install 'dist_train[audit]'") from error
    train, validation = load_splits(dataclasses.replace(config.data, drop_leaked=False, skip_bad=True))
    model = load_run(run_dir)
    model.check_classes(validation.classes, str(run_dir))
    unseen = validation.subset(np.flatnonzero(~find_leaked(train, validation)))
    if not len(unseen):
        return []
    shares = judge(model, unseen.images)
    found = find_label_issues(unseen.labels, shares, return_indices_ranked_by="self_confidence", n_jobs=1)
    names, predicted = unseen.classes, shares.argmax(1)
    return [
        Suspect(unseen.names[i], names[unseen.labels[i]], names[predicted[i]], float(shares[i].max())) for i in found
    ]
