"""evaluate(): loss, accuracy and confusion matrix of a model on a loader, exact over processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from dist_train.config import InputError
from dist_train.data.loader import ImageLoader
from dist_train.metrics import Results, Sums
from dist_train.processes import default_accelerator


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


def evaluate(model: nn.Module, loader: DataLoader | ImageLoader, *, accelerator: Accelerator | None = None) -> Results:
    """Return the figures of `model` over all samples of `loader`, each counted once for any number of processes.

    loader: batches that begin with images and labels (int64 [B]). The model runs in eval mode without
    gradients and is put back into the mode it had.
    """
    accelerator = accelerator or default_accelerator()
    model = accelerator.unwrap_model(model, keep_torch_compile=True).to(accelerator.device)
    training = model.training
    model.eval()
    sums = None
    with torch.inference_mode():
        for batch in tqdm(
            shard_exactly(loader, accelerator),
            "validation",
            leave=False,
            disable=None if accelerator.is_main_process else True,
        ):
            images, labels = batch[0], batch[1]
            if not len(labels):
                continue
            with accelerator.autocast():
                logits = model(images)
            logits = logits.float()
            sums = sums or Sums(logits.shape[1], accelerator.device)
            sums.update(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    model.train(training)
    # with fewer samples than processes one may have seen none, and not know the number of classes
    classes = accelerator.gather(torch.tensor([sums.num_classes if sums else 0], device=accelerator.device))
    if not classes.any():
        raise InputError("the loader has no samples to evaluate")
    return (sums or Sums(int(classes.max()), accelerator.device)).reduce(accelerator)
