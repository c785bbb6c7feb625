"""Trains up to a step, resuming where the last call stopped, and writes which samples each step took, in order."""

import contextlib
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from dist_train import FaceModel, train
from dist_train.checkpoint import Checkpointer, find_checkpoint
from dist_train.config import DataConfig
from dist_train.data.images import load_splits
from dist_train.data.loader import ImageLoader
from dist_train.processes import default_accelerator

if __name__ == "__main__":
    run_dir, steps, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    accelerator = default_accelerator()
    torch.manual_seed(0)
    model = FaceModel("timm/test_convnext", pretrained=False)
    splits = load_splits(DataConfig(count=420))
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    taken: list[tuple[int, int, list[int]]] = []

    class Noting(ImageLoader):
        def __iter__(self):
            for batch in super().__iter__():
                taken.append((batch.start, self.rank, batch.samples.tolist()))
                yield batch

    checkpointer = Checkpointer(run_dir, accelerator, every_steps=1, resume_from=find_checkpoint(run_dir, "auto"))
    loaders = Noting(splits[0], 32, shuffle=True, **place), ImageLoader(splits[1], 32, **place)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    class Enough(Exception):
        pass

    save = checkpointer.save

    def save_and_stop(state):
        save(state)
        if state.progress.step == steps:
            raise Enough

    checkpointer.save = save_and_stop
    with contextlib.suppress(Enough):
        train(model, *loaders, optimizer, 1, accelerator=accelerator, checkpointer=checkpointer)
    checkpointer.flush()
    everyone = sorted(gather_object(taken))
    if accelerator.is_main_process:
        out.write_text(" ".join(str(sample) for _, _, samples in everyone for sample in samples))
