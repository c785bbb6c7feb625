"""Evaluates a fixed model with both kinds of loaders; started by accelerate launch."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from dist_train import FaceModel, evaluate
from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.data.loader import ImageLoader
from dist_train.processes import default_accelerator

if __name__ == "__main__":
    accelerator = default_accelerator()
    torch.manual_seed(0)
    model = FaceModel("timm/resnet10t", pretrained=False)
    _, faces = load_splits(DataConfig(count=202, validation_share=0.5))
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    plain = DataLoader(TensorDataset(torch.from_numpy(faces.images), torch.from_numpy(faces.labels)), 16)
    results = [evaluate(model, loader, accelerator=accelerator) for loader in (ImageLoader(faces, 16, **place), plain)]
    if accelerator.is_main_process:
        figures = [[r.accuracy, r.loss, r.count, r.confusion.tolist()] for r in results]
        Path(sys.argv[1]).write_text(json.dumps({"processes": accelerator.num_processes, "figures": figures}))
