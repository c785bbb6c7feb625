"""The notebook's training: fp32, batch 32, PIL decoding in a plain DataLoader, Adam, .item() in each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dist_train import FaceModel
from dist_train.processes import default_accelerator


class Notebook:
    """Its model, ResNet18 from random weights, with its training loader over data/train."""

    def __init__(self, data: str) -> None:
        change = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.RandomRotation((-20, 20)), transforms.ToTensor()]
        )
        self.device = default_accelerator().device
        self.loader = DataLoader(ImageFolder(f"{data}/train", transform=change), batch_size=32, shuffle=True)
        self.model = FaceModel(pretrained=False).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.001)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
        """Train on the batches as the notebook does and return the number of images."""
        self.model.train()
        total_loss, right, count = 0.0, 0, 0
        for images, labels in batches:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.step()
            total_loss += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
        return count
