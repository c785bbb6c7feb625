"""The notebook's code as a user writes it: plain torchvision data, plain loaders, plain Adam."""

import sys

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dist_train import FaceModel, plot_history, train, view_results

if __name__ == "__main__":
    data, out, *weights = sys.argv[1:]
    change = transforms.Compose(
        [transforms.RandomHorizontalFlip(), transforms.RandomRotation((-20, 20)), transforms.ToTensor()]
    )
    trainset = ImageFolder(f"{data}/train", transform=change)
    validset = ImageFolder(f"{data}/validation", transform=transforms.ToTensor())
    trainloader = DataLoader(trainset, batch_size=32, shuffle=True)
    validloader = DataLoader(validset, batch_size=32)

    model = FaceModel(weights=weights[0]) if weights else FaceModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    train_loss, train_acc, valid_loss, valid_acc = history = train(
        model, trainloader, validloader, optimizer, num_epochs=2
    )
    assert len(train_loss) == len(train_acc) == len(valid_loss) == len(valid_acc) == 2

    plot_history(history).savefig(f"{out}/curves.png")
    images, labels = next(iter(validloader))
    view_results(images, labels, model).savefig(f"{out}/results.png")
