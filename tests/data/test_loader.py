from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dist_train.config import AugmentConfig, InputError
from dist_train.data.imageset import ImageSet
from dist_train.data.loader import ImageLoader, step_size

COUNT = 101


def numbered(count: int = COUNT) -> ImageSet:
    """Return images whose pixels tell their index."""
    images = np.zeros((count, 1, 4, 4), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    return ImageSet(images, np.arange(count) % 7, [str(i) for i in range(count)], tuple("abcdefg"))


def loaders(world_size: int, **options) -> list[ImageLoader]:
    options = {"batch_size": 16, "shuffle": True, "seed": 3} | options
    return [ImageLoader(numbered(), rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def joined(world_size: int, epoch: int = 0, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the global steps that `world_size` processes see together."""
    parts = loaders(world_size, **options)
    for loader in parts:
        loader.set_epoch(epoch)
    return [
        (torch.cat([b.images for b in step]), torch.cat([b.labels for b in step])) for step in zip(*parts, strict=True)
    ]


def indices(steps) -> list[int]:
    return [int(image[0, 0, 0]) for images, _ in steps for image in images]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_sample_once_in_the_same_order_for_any_number_of_processes(world_size):
    assert sorted(indices(joined(world_size))) == list(range(COUNT))
    assert indices(joined(world_size)) == indices(joined(1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_augmentation_and_mixup_do_not_depend_on_the_number_of_processes(world_size):
    options = {"augment": AugmentConfig(erase=0.5), "mixup": 0.4}
    for (images, labels), (same_images, same_labels) in zip(
        joined(1, **options), joined(world_size, **options), strict=True
    ):
        torch.testing.assert_close(images, same_images, rtol=0, atol=1e-6)
        torch.testing.assert_close(labels, same_labels, rtol=0, atol=1e-6)
        torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))


def test_epochs_and_seeds_differ_and_repeat():
    first = indices(joined(1))
    assert first != indices(joined(1, epoch=1))
    assert first != indices(joined(1, seed=4))
    assert first == indices(joined(1))


@pytest.mark.parametrize("batch_size", [1, 2, 16, 50, 101, 500])
def test_steps_are_even_and_cover_the_epoch(batch_size):
    sizes, remaining = [], COUNT
    while remaining:
        sizes.append(step_size(remaining, batch_size))
        remaining -= sizes[-1]
    assert sum(sizes) == COUNT
    assert len(sizes) == len(ImageLoader(numbered(), batch_size)) == -(-COUNT // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_scale_makes_the_average_over_processes_the_mean_of_the_step():
    for step in zip(*loaders(3), strict=True):
        count = sum(len(batch.labels) for batch in step)
        averaged = sum(batch.labels.float().sum() * batch.scale for batch in step) / 3
        assert averaged == pytest.approx(float(torch.cat([b.labels for b in step]).float().sum()) / count)


def test_a_position_resumes_on_another_number_of_processes_without_repeating_or_skipping():
    seen: list[int] = []
    state = {"epoch": 1, "position": 0}
    for world_size in (2, 1, 3):
        parts = loaders(world_size)
        for loader in parts:
            loader.load_state_dict(state)
            loader.set_epoch(1)
        steps = itertools.islice(zip(*parts, strict=True), 2 if world_size < 3 else None)
        seen += [int(image[0, 0, 0]) for step in steps for batch in step for image in batch.images]
        state = parts[0].state_dict()
    assert seen == indices(joined(1, epoch=1))


def test_validation_keeps_the_order_and_may_have_fewer_samples_than_processes():
    parts = [ImageLoader(numbered(2), 64, rank=rank, world_size=3) for rank in range(3)]
    labels = [label for loader in parts for batch in loader for label in batch.labels.tolist()]
    assert sorted(labels) == [0, 1]


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(InputError, match=r"train\.batch_size: 2 gives steps of 1 .* 3 processes"):
        loaders(3, batch_size=2)
