"""The built-in faces: what draw_faces promises to the rest of the package."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dist_train.data.synthetic import ACTIONS, EXPRESSIONS, UNITS, draw_faces


def test_expressions_are_alphabetical_and_each_has_known_action_units() -> None:
    assert tuple(sorted(EXPRESSIONS)) == EXPRESSIONS
    assert set(ACTIONS) == set(EXPRESSIONS)
    assert all(set(variant) <= set(UNITS) for variants in ACTIONS.values() for variant in variants)


@pytest.mark.parametrize(("count", "size"), [(1, 48), (300, 48), (10, 16), (5, 97)])
def test_shapes_and_types(count: int, size: int) -> None:
    images, labels = draw_faces(count, seed=3, size=size)
    assert images.shape == (count, 1, size, size)
    assert images.dtype == np.uint8
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) <= set(range(len(EXPRESSIONS)))


def test_every_image_holds_a_picture() -> None:
    images, _ = draw_faces(500, seed=1)
    assert images.min() == 0
    assert images.max() > 245
    assert images.std(axis=(1, 2, 3)).min() > 8  # no blank frame
    assert np.isin(images, (0, 255)).mean(axis=(1, 2, 3)).max() < 0.6  # none lost to the exposure


def test_same_arguments_same_faces() -> None:
    images, labels = draw_faces(140, seed=5)
    again, same_labels = draw_faces(140, seed=5)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same_labels)


def test_another_seed_gives_other_people() -> None:
    ours, our_labels = draw_faces(140, seed=0)
    theirs, their_labels = draw_faces(140, seed=1)
    assert (our_labels != their_labels).any()
    gap = np.abs(ours[:, None].astype(np.int16) - theirs[None]).mean(axis=(2, 3, 4))
    assert gap.min() > 5  # grey levels a pixel: not one face comes twice


@pytest.mark.parametrize("count", [1, 7, 100, 700])
def test_labels_are_balanced_to_within_one(count: int) -> None:
    shares = np.bincount(draw_faces(count, size=16)[1], minlength=len(EXPRESSIONS))
    assert shares.max() - shares.min() <= 1


def test_labels_are_shuffled() -> None:
    labels = draw_faces(700, size=16)[1]
    assert (np.diff(labels) == 0).mean() == pytest.approx(1 / len(EXPRESSIONS), abs=0.06)


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_that_is_not_positive_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be at least 1, not {count}"):
        draw_faces(count)


def test_an_image_too_small_for_a_face_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be at least 16 pixels.*not 15"):
        draw_faces(4, size=15)


@pytest.fixture(scope="module")
def raw_pixel_model() -> Pipeline:
    images, labels = draw_faces(1500, seed=0, size=24)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    return model.fit(images.reshape(len(images), -1), labels)


def test_expressions_show_but_not_in_single_pixels(raw_pixel_model: Pipeline) -> None:
    images, labels = draw_faces(700, seed=1, size=24)
    assert 0.35 < raw_pixel_model.score(images.reshape(len(images), -1), labels) < 0.75


def test_mirrored_faces_keep_their_expression(raw_pixel_model: Pipeline) -> None:
    images, labels = draw_faces(700, seed=1, size=24)
    mirrored = images[..., ::-1].reshape(len(images), -1)
    assert 0.35 < raw_pixel_model.score(mirrored, labels) < 0.75
