"""What a model makes of a data set, exact over processes: evaluate() for figures, judge() for each sample's classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from dist_train.config import InputError
from dist_train.data.lazy import LazyImages
from dist_train.data.loader import ImageLoader
from dist_train.metrics import Results, Sums
from dist_train.model import eval_mode
from dist_train.processes import default_accelerator, together

JUDGED_AT_ONCE = 256


def shard_exactly(loader: DataLoader | ImageLoader, accelerator: Accelerator) -> DataLoader | ImageLoader:
    """Return a loader that gives every sample to exactly one process, none twice; InputError where that cannot be."""
    if accelerator.num_processes > 1 and getattr(getattr(loader, "batch_sampler", None), "even_batches", False):
        raise InputError("validation: accelerator.prepare() made the loader repeat samples; give the one before it")
    if not isinstance(loader, DataLoader) or isinstance(loader, DataLoaderShard):
        return loader
    if isinstance(loader.dataset, IterableDataset) and accelerator.num_processes > 1:
        raise InputError("validation: an IterableDataset cannot be shared exactly by several processes")
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
        even_batches=False,
        rng_types=["generator"],  # a shuffled loader's order is the main process's on all
    )


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a loader's batch; InputError for what is not a pair of them."""
    if not isinstance(batch, Sequence) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch[:2]):
        raise InputError(f"the loader gives batches of type {type(batch).__name__}; expected tensors (images, labels)")
    return batch[0], batch[1]


def evaluate(model: nn.Module, loader: DataLoader | ImageLoader, *, accelerator: Accelerator | None = None) -> Results:
    """Return the figures of `model` over all samples of `loader`, each counted once for any number of processes.

    loader: batches that begin with images and labels (int64 [B]). The model runs in eval mode without
    gradients and is put back into the mode it had.
    """
    accelerator = accelerator or default_accelerator()
    model = accelerator.unwrap_model(model, keep_torch_compile=True).to(accelerator.device)
    sharded = accelerator.distributed_type == DistributedType.FSDP  # then every process must run every batch
    if sharded and not isinstance(loader, ImageLoader) and accelerator.num_processes > 1:
        raise InputError("validation: with FSDP an ordinary DataLoader may leave processes waiting; use an ImageLoader")
    sums = None
    # parameters that FSDP gathers first in inference mode could not be trained any more
    with eval_mode(model), torch.no_grad() if sharded else torch.inference_mode():
        for batch in tqdm(
            shard_exactly(loader, accelerator),
            "validation",
            leave=False,
            disable=None if accelerator.is_main_process else True,
        ):
            images, labels = split_batch(batch)
            if not len(labels) and not sharded:
                continue
            with accelerator.autocast():
                logits = model(images)
            logits = logits.float()
            sums = sums or Sums(logits.shape[1], accelerator.device)
            sums.update(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    # with fewer samples than processes one may have seen none, and not know the number of classes
    classes = accelerator.gather(torch.tensor([sums.num_classes if sums else 0], device=accelerator.device))
    if not classes.any():
        raise InputError("the loader has no samples to evaluate")
    return (sums or Sums(int(classes.max()), accelerator.device)).reduce(accelerator)


def judge(
    model: nn.Module, images: np.ndarray | LazyImages, *, accelerator: Accelerator | None = None, tta: bool = False
) -> np.ndarray:
    """Return the probabilities of each image's classes, float32 [N, K], in order and the same on every process.

    images: uint8 [N, C, H, W]; of LazyImages only a batch is in memory, and an InputError for one that cannot be read
    is raised on all processes. tta: average over ten views, the image and its mirror image, each where it is and
    shifted a little up, down, left and right. Batches are dealt to the processes whole, so that an image is
    computed in the same company, and to the same bits, for any number of processes.
    """
    accelerator = accelerator or default_accelerator()
    model = accelerator.unwrap_model(model, keep_torch_compile=True).to(accelerator.device)
    found = together(_judge_own, model, images, accelerator, tta)
    size = accelerator.gather(torch.tensor([found[0][1].shape[1] if found else 0], device=accelerator.device)).max()
    every = torch.zeros(len(images), int(size), device=accelerator.device)
    for rows, probabilities in found:
        every[rows.to(accelerator.device)] = probabilities
    return accelerator.reduce(every, "sum").cpu().numpy()  # each row is of one process, and 0 on the others


def _judge_own(
    model: nn.Module, images: np.ndarray | LazyImages, accelerator: Accelerator, tta: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of this process's batches, int64 [B], and the probabilities of their classes, [B, K]."""
    batches = list(torch.arange(len(images)).split(JUDGED_AT_ONCE))
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    found: list[tuple[Tensor, Tensor]] = []
    with eval_mode(model), torch.inference_mode():
        for number in tqdm(own, "judging", leave=False, disable=None if accelerator.is_main_process else True):
            rows = batches[number]
            batch = torch.from_numpy(images[rows.numpy()]).to(accelerator.device)
            views = _views(batch) if tta else [batch]
            with accelerator.autocast():
                shares = [model(view).float().softmax(1) for view in views]
            found.append((rows, torch.stack(shares).mean(0)))
    return found


def _views(images: Tensor) -> list[Tensor]:
    """Return ten views of the images, [N, C, H, W] each; what a shift brings in repeats the edge."""
    step = max(1, round(images.shape[-1] / 24))
    shifts = ((0, 0), (step, 0), (-step, 0), (0, step), (0, -step))
    height, width = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    views = []
    for base, (down, right) in itertools.product((images, images.flip(-1)), shifts):
        rows, columns = (height - down).clamp(0, len(height) - 1), (width - right).clamp(0, len(width) - 1)
        views.append(base[..., rows, :][..., columns])
    return views
