"""Small trainings and an evaluation whose figures its test knows; started by accelerate launch, writes JSON."""

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_train import FaceModel, evaluate, train
from dist_train.checkpoint import Checkpointer
from dist_train.config import DataConfig, InputError, TrackConfig, TrainConfig
from dist_train.data.images import load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.lazy import LazyImages
from dist_train.data.loader import ImageLoader
from dist_train.faults import Watch
from dist_train.outputs import leave_pictures
from dist_train.processes import build_accelerator, local_main_first
from dist_train.state import Progress, TrainState
from dist_train.tracking import Tracker
from dist_train.training import History

SAMPLES = 101


class Small(nn.Module):
    """A classifier without batch statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 7))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255 - 0.5)


class Telling(nn.Module):
    """Judges every sample to be of its own class, which is its index."""

    def forward(self, indices: Tensor) -> Tensor:
        return F.one_hot(indices, SAMPLES).float()


def streamed(data: ImageSet) -> ImageSet:
    """Return the same images as files that are decoded when they are needed."""
    files = [BytesIO() for _ in data.images]
    for file, image in zip(files, data.images, strict=True):
        Image.fromarray(image[0]).save(file, "png")
    names = [f"{i}.png" for i in range(len(files))]
    images = LazyImages(
        lambda i: BytesIO(files[i].getvalue()), names, np.arange(len(files)), 1, 48, ThreadPoolExecutor(1)
    )
    return dataclasses.replace(data, images=images)


def small_training(
    bf16_gradients: bool = False, gradient_accumulation: int = 1, streaming_ranks: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Train 70 images in steps of 10 and 11; return losses, and whether all gradients were numbers of bf16."""
    accelerator = build_accelerator(TrainConfig(precision="no", bf16_gradients=bf16_gradients))
    faces = load_splits(DataConfig(count=95, validation_share=0.25))
    if accelerator.process_index in streaming_ranks:
        faces = streamed(faces[0]), streamed(faces[1])
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loaders = ImageLoader(faces[0], 11, shuffle=True, **place), ImageLoader(faces[1], 16, **place)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rounded: list[bool] = []
    optimizer.register_step_pre_hook(
        lambda *_: rounded.extend(torch.equal(p.grad, p.grad.bfloat16().float()) for p in model.parameters())
    )
    history = train(model, *loaders, optimizer, 3, accelerator=accelerator, gradient_accumulation=gradient_accumulation)
    return {"losses": history.train_loss + history.valid_loss, "rounded": all(rounded)}


def shuffled_evaluation() -> list[int]:
    """Return how often each sample is counted."""
    indices = torch.arange(SAMPLES)
    loader = DataLoader(TensorDataset(indices, indices), 16, shuffle=True)
    accelerator = build_accelerator(TrainConfig(precision="no"))
    return evaluate(Telling(), loader, accelerator=accelerator).confusion.diagonal().tolist()


def refusal_of_repeated_samples() -> str:
    indices = torch.arange(SAMPLES)
    accelerator = build_accelerator(TrainConfig(precision="no"))
    loader = accelerator.prepare(DataLoader(TensorDataset(indices, indices), 16))
    try:
        evaluate(Telling(), loader, accelerator=accelerator)
    except InputError as error:
        return str(error)
    return ""


def one_bad_loss() -> dict[str, Any]:
    """Train a step in which rank 1's loss is not a number; return what each process then has."""
    accelerator = build_accelerator(TrainConfig(precision="no"))
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    faces = load_splits(DataConfig(count=95))
    loaders = ImageLoader(faces[0], 16, **place), ImageLoader(faces[1], 16, **place)
    model = nn.Sequential(Small(), nn.BatchNorm1d(7))
    if accelerator.process_index == 1:
        model.register_forward_hook(lambda module, _, logits: logits * float("nan") if module.training else logits)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    watch = Watch(accelerator, Checkpointer(Path("nowhere"), accelerator))
    train(
        model, *loaders, torch.optim.SGD(model.parameters(), 0.1), 1, accelerator=accelerator, watch=watch, max_steps=1
    )
    after = list(model.state_dict().values())
    return {
        "skipped": gather_object([all(map(torch.equal, before, after))]),
        "weights": gather_object([float(sum(tensor.double().sum() for tensor in after))]),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after),
    }


def turns() -> list[tuple[float, float]]:
    """Return when each process began and ended what the main process does first."""

    def take_time() -> tuple[float, float]:
        started = time.monotonic()
        time.sleep(0.2)
        return started, time.monotonic()

    accelerator = build_accelerator(TrainConfig(precision="no"))
    return gather_object([local_main_first(accelerator, take_time)])


def validated_then_trained() -> list[float]:
    """Return by how much two losses of sharded weights, which are validated first, differ from the first one."""
    accelerator = build_accelerator(TrainConfig(precision="no"))
    accelerator.state.distributed_type = DistributedType.FSDP
    images, labels = torch.zeros(2, 1, 48, 48), torch.tensor([1, 1])
    model = Small()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    evaluate(model, ImageLoader(load_splits(DataConfig(count=95))[1], 16), accelerator=accelerator)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
    accelerator.state.distributed_type = DistributedType.MULTI_CPU
    return [loss - losses[0] for loss in losses]


def pictures(folder: Path) -> list[str]:
    """Return the pictures of a run whose folder the main process alone sees."""
    accelerator = build_accelerator(TrainConfig(precision="no"))
    run_dir = folder / "run" if accelerator.is_main_process else folder / "not yet here"
    if accelerator.is_main_process:
        FaceModel("timm/test_resnet", pretrained=False).save(run_dir / "best")
    tracker = Tracker(accelerator, TrackConfig(tool="none"), run_dir, {}, None)
    leave_pictures(run_dir, History([1], [1], [1], [1]), load_splits(DataConfig(count=95))[1], tracker, accelerator)
    return sorted(file.name for file in run_dir.glob("*.png"))


def sharded_and_restored(folder: Path) -> list[bool]:
    """Return whether weights and momentum of a sharded training come back from its checkpoint."""
    accelerator = build_accelerator(TrainConfig(precision="no"))
    states = []
    for seed, resume_from in ((0, None), (1, folder / "checkpoints" / "step_00000001")):
        model = Small(seed)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        state = TrainState(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), Progress())
        checkpointer = Checkpointer(folder, accelerator, resume_from=resume_from)
        if resume_from is None:
            F.cross_entropy(model(torch.rand(2, 1, 48, 48)), torch.tensor([1, 1])).backward()
            state.optimizer.step()
            state.progress.step = 1
            checkpointer.save(state)
            checkpointer.flush()
            accelerator.wait_for_everyone()
        checkpointer.restore(state)
        momenta = (state.optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters())
        states.append([tensor.full_tensor() for tensor in (*model.parameters(), *momenta)])
    return [torch.equal(*pair) for pair in zip(*states, strict=True)]


def figures() -> dict[str, Any]:
    return {
        "fp32": small_training(),
        "bf16": small_training(bf16_gradients=True),
        "accumulated": small_training(gradient_accumulation=4),
        "one streams": small_training(streaming_ranks=(1,)),
        "counted": shuffled_evaluation(),
    }


if __name__ == "__main__":
    found = figures() | {"pictures": pictures(Path(sys.argv[1]).parent), "refusal": refusal_of_repeated_samples()}
    found |= {"one is bad": one_bad_loss(), "turns": turns()}
    found |= {
        "restored": sharded_and_restored(Path(sys.argv[1]).parent / "sharded"),
        "sharded": validated_then_trained(),
    }
    if build_accelerator(TrainConfig(precision="no")).is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
