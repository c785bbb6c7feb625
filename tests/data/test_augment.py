from __future__ import annotations

import torch

from dist_train.config import AugmentConfig
from dist_train.data.augment import DRAWS, augment
from dist_train.data.synthetic import draw_faces

NOTHING = {"flip": 0.0, "rotate": 0.0, "translate": 0.0, "scale": 0.0, "brightness": 0.0, "contrast": 0.0}
IMAGES = torch.from_numpy(draw_faces(16, seed=5)[0])
CHANCE = torch.rand(16, DRAWS, generator=torch.Generator().manual_seed(0))


def test_without_changes_only_the_range_changes():
    changed = augment(IMAGES, CHANCE, AugmentConfig(**NOTHING))
    torch.testing.assert_close(changed, IMAGES / 255)


def test_flip_mirrors_exactly_the_chosen_share():
    config = AugmentConfig(**(NOTHING | {"flip": 0.5}))
    changed = augment(IMAGES, CHANCE, config)
    flipped = CHANCE[:, 0] < 0.5
    assert 0 < int(flipped.sum()) < 16
    expected = torch.where(flipped.view(-1, 1, 1, 1), IMAGES.flip(3), IMAGES) / 255
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)


def test_a_sample_is_changed_by_its_own_draws_alone():
    config = AugmentConfig(erase=0.5)
    together = augment(IMAGES, CHANCE, config)
    alone = torch.cat([augment(IMAGES[i : i + 1], CHANCE[i : i + 1], config) for i in range(16)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert len({float(image.sum()) for image in augment(IMAGES[:1].repeat(16, 1, 1, 1), CHANCE, config)}) == 16


def test_values_stay_between_0_and_1_with_the_strongest_changes():
    config = AugmentConfig(rotate=180, translate=0.9, scale=0.9, brightness=0.9, contrast=0.9, erase=1.0)
    changed = augment(IMAGES, CHANCE, config)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert changed.isfinite().all()


def test_shift_moves_by_its_share_of_the_side():
    image = torch.zeros(1, 1, 20, 20, dtype=torch.uint8)
    image[0, 0, 10, 10] = 255
    draws = torch.full((1, DRAWS), 0.5)
    draws[0, 3] = 1.0  # the farthest to the left
    changed = augment(image, draws, AugmentConfig(**(NOTHING | {"translate": 0.2})))
    assert divmod(int(changed.argmax()), 20) == (10, 6)


def test_erase_grays_between_2_and_20_percent():
    changed = augment(IMAGES, CHANCE, AugmentConfig(**(NOTHING | {"erase": 1.0})))
    share = ((changed - IMAGES / 255).abs() > 1e-6).float().mean(dim=(1, 2, 3))
    assert share.min() > 0.005
    assert share.max() <= 0.22
    assert share.max() - share.min() > 0.05
