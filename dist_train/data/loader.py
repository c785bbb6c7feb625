"""Global shuffling, sharding over processes and the position for resume, over images in memory or on the disk.

In: an ImageSet. Out: batches whose samples, order and augmentation depend on seed, epoch and position in the
global order only, never on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from dist_train.config import AugmentConfig, InputError
from dist_train.data.ahead import Moved, Mover, ahead
from dist_train.data.augment import DRAWS, augment
from dist_train.data.imageset import ImageSet
from dist_train.data.lazy import LazyImages
from dist_train.processes import longest_wait

AHEAD = 2
"""Batches that are prepared before they are due, where that is done by a thread."""


class Batch(NamedTuple):
    """What one process computes in one step.

    images: uint8 0..255 or float32 0..1 [B, C, H, W]; labels: int64 [B], or float32 [B, K] class shares
    (mixup); scale: factor that turns this process's summed loss into its part of the step's mean loss, such
    that the average over processes is that mean; parts: into how many the smallest share of a process can be
    split; samples: int64 [B] on the host, their indices in the data; start: position of the step in the epoch's
    global order.
    """

    images: Tensor
    labels: Tensor
    scale: float
    parts: int
    samples: Tensor
    start: int

    def micro_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yield up to `count` parts (images, labels, whether it is the last), as many on every process."""
        count = max(1, min(count, self.parts))
        parts = zip(self.images.tensor_split(count), self.labels.tensor_split(count), strict=True)
        for number, (images, labels) in enumerate(parts, start=1):
            yield images, labels, number == count


class UnreadableImage(InputError):
    """An image of a step cannot be read; raised on all processes, before the step."""


class EpochDraws(NamedTuple):
    """All that chance decides in an epoch, by position in its global order.

    order: int64 [N], indices of samples; changes: float32 [N, DRAWS] in 0..1, for augment (N = 0 without);
    shares: float32 [N] in 0..1, of the sample itself in its mixture, or None without mixup.
    """

    order: Tensor
    changes: Tensor
    shares: Tensor | None


class Step(NamedTuple):
    """This process's share of a step.

    start, size: the step in the epoch's global order; rows: int64 [B], this process's positions in that order;
    needed: int64 [M], in rising order, those and, for mixup, their partners'.
    """

    start: int
    size: int
    rows: Tensor
    needed: Tensor


def step_size(remaining: int, batch_size: int) -> int:
    """Return how many samples the next step takes of the `remaining` ones of an epoch.

    An epoch of N samples is cut into ceil(N / batch_size) steps of equal size, to within one sample: no step
    is left tiny, none is dropped. The size depends on the remaining count only, so a training may be resumed
    at any position.
    """
    return math.ceil(remaining / math.ceil(remaining / batch_size))


class ImageLoader:
    """Batches of one process out of an ImageSet.

    batch_size counts the images of a step over all `world_size` processes together. With `shuffle`, samples come
    in an order drawn from (seed, epoch); with `augment`, each is changed by draws from (seed, epoch, position);
    with `mixup` > 0 (Beta's alpha), each is mixed with another of the same step. Raises InputError where a
    step of a shuffled set has fewer samples than there are processes.

    Images that are not on the device, or not decoded, are got there ahead of time by a thread. UnreadableImage is
    raised on all processes, before the step, for one that cannot be read. Where torch.distributed is initialised, all
    processes make their loaders together.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: AugmentConfig | None = None,
        mixup: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        residency: str = "auto",
    ) -> None:
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.augment, self.mixup, self.seed = augment, mixup, seed
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.epoch, self.position = 0, 0
        smallest = len(data) // math.ceil(len(data) / batch_size)
        if shuffle and smallest < world_size:
            raise InputError(
                f"train.batch_size: {batch_size} gives steps of {smallest} (train has {len(data)} images), too few for "
                f"{world_size} processes; raise train.batch_size or start fewer processes"
            )
        lazy = isinstance(data.images, LazyImages)
        lazies = [lazy] * world_size
        if several := world_size > 1 and distributed.is_initialized():
            distributed.all_gather_object(lazies, lazy)  # machines may differ in what fits in their memory
        self._images = None if lazy else _place(torch.from_numpy(data.images), self.device, residency)
        self._labels = torch.from_numpy(data.labels).to(self.device)
        self._ahead = AHEAD if self._images is None or self._images.device.type != self.device.type else 0
        self._mover = Mover(self.device)
        # gloo: of the hosts, so that no device waits
        together = several and any(lazies)
        self._group: Any = distributed.new_group(backend="gloo", timeout=longest_wait()) if together else None

    def go_alone(self) -> None:
        """Agree no more with other processes' loaders: what cannot be read is then told to this process only."""
        if self._group:
            distributed.destroy_process_group(self._group)
        self._group = None

    def __len__(self) -> int:
        """Return the number of steps from the position to the epoch's end."""
        return math.ceil((len(self.data) - self.position) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first sample, unless it is under way (after load_state_dict)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return epoch and position, in samples of the epoch's global order."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the epoch and position of `state`."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of each step from the position to the epoch's end; then start over."""
        draws = self._draw_epoch()
        with closing(ahead(lambda step: self._fetch(draws.order[step.needed]), self._steps(), self._ahead)) as fetched:
            for step, found in fetched:
                images, labels = self._batch(draws, step, self._mover.receive(self._agree(found)))
                start, size = step.start, step.size
                self.position = start + size  # before the yield: a checkpoint made at this step must not repeat it
                samples = draws.order[step.rows]
                yield Batch(images, labels, self.world_size / size, size // self.world_size, samples, start)
        self.position = 0

    def _steps(self) -> Iterator[Step]:
        """Yield this process's share of each step from the position to the epoch's end."""
        start = self.position
        while (remaining := len(self.data) - start) > 0:
            size = step_size(remaining, self.batch_size)
            first, end = (start + size * part // self.world_size for part in (self.rank, self.rank + 1))
            rows = torch.arange(first, end)
            # a sample's partner is at the step's mirror position, which need not be one of this process's rows
            needed = torch.cat([rows, 2 * start + size - 1 - rows]).unique() if self.mixup else rows
            yield Step(start, size, rows, needed)
            start += size

    def _draw_epoch(self) -> EpochDraws:
        count = len(self.data)
        random = np.random.default_rng([self.seed, self.epoch])  # torch's generators use 32 bits of a seed only
        order = torch.from_numpy(random.permutation(count)) if self.shuffle else torch.arange(count)
        changes = torch.from_numpy(random.random((count if self.augment else 0, DRAWS), dtype=np.float32))
        shares = torch.from_numpy(random.beta(self.mixup, self.mixup, count)).float() if self.mixup else None
        return EpochDraws(order, changes, shares)

    def _fetch(self, samples: Tensor) -> Moved | InputError:
        """Return the images of `samples` (int64 [M]) on their way to the device, or what is wrong with one of them."""
        try:
            if self._images is None:
                return self._mover.send(torch.from_numpy(self.data.images[samples.numpy()]))
            return self._mover.send(self._images[_send(samples, self._images.device)])
        except InputError as error:
            return error

    def _agree(self, found: Moved | InputError) -> Moved:
        """Return what was found, or raise what is wrong on any process; a collective call where any are lazy."""
        fault = str(found) if isinstance(found, InputError) else None
        faults = [fault]
        if self._group:
            bad = torch.tensor(fault is not None, dtype=torch.int32)
            distributed.all_reduce(bad, distributed.ReduceOp.MAX, self._group)
            if bad:
                faults *= self.world_size
                distributed.all_gather_object(faults, fault, self._group)
        for fault in filter(None, faults):
            raise UnreadableImage(fault)
        assert isinstance(found, Moved)
        return found

    def _batch(self, draws: EpochDraws, step: Step, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels of a step; images: uint8 [M, C, H, W], of the needed positions."""
        if draws.shares is None:
            return self._change(draws, step.rows, images)
        (own, labels), (others, other_labels) = (
            self._change(draws, rows, images[_send(torch.searchsorted(step.needed, rows), self.device)])
            for rows in (step.rows, 2 * step.start + step.size - 1 - step.rows)
        )
        share = _send(draws.shares[step.rows], self.device)
        mixed = torch.lerp(others, own, share.view(-1, 1, 1, 1))
        one_hot = torch.eye(len(self.data.classes), device=self.device)
        return mixed, torch.lerp(one_hot[other_labels], one_hot[labels], share.view(-1, 1))

    def _change(self, draws: EpochDraws, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at `rows` changed by their draws, and their labels; images: uint8 [B, C, H, W]."""
        labels = self._labels[_send(draws.order[rows], self.device)]
        if self.augment is not None:
            images = augment(images, _send(draws.changes[rows], self.device), self.augment)
        elif self.mixup:
            images = images.float() / 255
        return images, labels


def _place(images: Tensor, device: torch.device, residency: str) -> Tensor:
    """Return the images where they stay: on the device, or on the host if they take half its free memory."""
    if residency == "auto":
        fits = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        residency = "device" if fits else "host"
    return images.to(device) if residency == "device" else images


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; to a GPU from pinned memory, or the host would wait until it has come."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
