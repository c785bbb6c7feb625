"""evaluate(): loss, accuracy and confusion matrix of a model on a loader, exact over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from dist_train.config import InputError
from dist_train.data.loader import ImageLoader
from dist_train.metrics import Results, Sums
from dist_train.processes import default_accelerator


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, without gradients; give each of its modules its mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:  # model.train() would wake modules that are kept in eval mode
            module.training = mode


def shard_exactly(loader: DataLoader | ImageLoader, accelerator: Accelerator) -> DataLoader | ImageLoader:
    """Return a loader that gives every sample to exactly one process, none twice."""
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
    with judging(model):
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
