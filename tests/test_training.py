from __future__ import annotations

import itertools
import json
import math
import signal
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_train import evaluate, train
from dist_train.checkpoint import Checkpointer
from dist_train.config import Config, DataConfig, InputError, ModelConfig, OptimConfig, TrainConfig
from dist_train.data.images import load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.loader import ImageLoader
from dist_train.data.synthetic import EXPRESSIONS, draw_faces
from dist_train.faults import Watch
from dist_train.metrics import Results
from dist_train.model import FaceModel
from dist_train.optim import build_optimizer, build_schedule
from dist_train.run import build_model
from dist_train.state import Epoch, Progress
from dist_train.training import History


class Small(nn.Module):
    """A classifier without batch statistics, so that batches may be split."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 7))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float() / (255 if images.dtype == torch.uint8 else 1) - 0.5)


@pytest.fixture(scope="module")
def faces() -> tuple[ImageSet, ImageSet]:
    return load_splits(DataConfig(count=260, validation_share=0.25))


def fit(
    faces, epochs: int = 2, model: nn.Module | None = None, batch_size: int = 32, lr: float = 0.1, **options
) -> History:
    model = model or Small()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    trainloader = ImageLoader(faces[0], batch_size, shuffle=True)
    return train(
        model, trainloader, ImageLoader(faces[1], 64), optimizer, epochs, accelerator=Accelerator(cpu=True), **options
    )


def test_history_has_one_value_per_epoch_and_loss_falls(faces):
    train_loss, train_acc, valid_loss, valid_acc = history = fit(faces, 12)
    assert [len(values) for values in history] == [12] * 4
    assert train_loss[-1] < train_loss[0]
    assert all(0 <= value <= 1 for value in train_acc + valid_acc)
    assert valid_acc[-1] > 0.2
    assert valid_loss[-1] < math.log(7)


def test_ordinary_dataloaders_and_image_loaders_train_alike(faces):
    """Unshuffled, the same batches: the same losses."""
    sets = [TensorDataset(torch.from_numpy(split.images) / 255, torch.from_numpy(split.labels)) for split in faces]
    model, same = Small(), Small()
    plain = train(model, DataLoader(sets[0], 39), DataLoader(sets[1], 64), torch.optim.SGD(model.parameters(), 0.1), 3)
    loader = ImageLoader(faces[0], 39)
    own = train(same, loader, ImageLoader(faces[1], 64), torch.optim.SGD(same.parameters(), 0.1), 3)
    assert len(faces[0]) % 39 == 0
    for values, same_values in zip(plain, own, strict=True):
        assert values == pytest.approx(same_values, abs=1e-5)


def test_micro_batches_change_nothing_but_memory(faces):
    whole, split = Small(), Small()
    fit(faces, model=whole)
    fit(faces, model=split, gradient_accumulation=3)
    for parameter, same in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, atol=1e-6, rtol=1e-5)


def test_the_schedule_steps_once_per_optimizer_step(faces):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loader = ImageLoader(faces[0], 32, shuffle=True)
    scheduler = build_schedule(optimizer, OptimConfig(lr=1.0, warmup_epochs=1), len(loader), 3 * len(loader))
    train(model, loader, ImageLoader(faces[1], 64), optimizer, 3, scheduler=scheduler, gradient_accumulation=2)
    assert scheduler.last_epoch == 3 * len(loader)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("kind", "middle", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)])
def test_schedules_warm_up_and_fall(kind, middle, end):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 2.0)
    schedule = build_schedule(optimizer, OptimConfig(lr=2.0, schedule=kind, warmup_epochs=2), 10, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    assert rates[:20] == sorted(rates[:20])
    assert 0 < rates[0] < 0.1
    assert [rates[20], rates[60], rates[100]] == pytest.approx([1, middle, end])


def test_clipping_bounds_the_step(faces):
    model = Small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fit(faces, 1, model, batch_size=500, lr=1.0, clip_grad=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_early_stopping_waits_patience_epochs(faces):
    history = fit(faces, 20, lr=1e-12, patience=3)
    assert len(history.valid_acc) == 4


def test_max_steps_ends_within_an_epoch(faces):
    model = Small()
    progress = Progress()
    history = fit(faces, 20, model, max_steps=9, progress=progress)
    assert len(history.train_loss) == 2
    assert progress.step == 9


def test_the_average_of_weights_is_what_is_validated(faces):
    """Against an average made by hand: timm's warm-up is decay min(0.99, 1 - 1 / (n + 1) ** (2/3)) at step n + 1."""
    model, average = Small(), Small()

    class Steps(torch.optim.SGD):
        done = 0

        def step(self, closure=None):
            super().step(closure)
            decay = min(0.99, 1 - (1 + Steps.done) ** (-2 / 3)) if Steps.done else 0.0
            Steps.done += 1
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(parameter.detach(), 1 - decay)

    loader = ImageLoader(faces[0], 32, shuffle=True)
    history = train(model, loader, ImageLoader(faces[1], 64), Steps(model.parameters(), 0.1), 3, ema=0.99)
    assert fit(faces, 3).train_loss == history.train_loss
    assert evaluate(average, ImageLoader(faces[1], 64)).loss == pytest.approx(history.valid_loss[-1], abs=1e-5)
    assert history.valid_loss[-1] != pytest.approx(fit(faces, 3).valid_loss[-1], abs=1e-4)


DIVERGES = ("--optim.lr", "1e30")


def test_a_training_that_diverges_gives_up_with_the_state_before_it_saved(smoke, capsys):
    run_dir = smoke("run", *DIVERGES, code=1)
    said = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in said and "Traceback" not in said
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    first = int(checkpoint.name.removeprefix("step_")) + 1
    assert f"the first of them step {first};" in said
    other = smoke("other", *DIVERGES, "--train.max_bad_steps", "99", "--save.every_steps", "1", "--save.keep", "99")
    summary = json.loads((other / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["best_epoch"] is summary["best_valid_acc"] is summary["final_valid_loss"] is None
    before = load_file(other / "checkpoints" / checkpoint.name / "model.safetensors")
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    names = (run_dir / "bad_samples.txt").read_text().splitlines()
    assert len({name.split(": ")[1] for name in names}) == len(names) == pytest.approx(3 * 30, abs=3)
    assert {name.split(": ")[0] for name in names} == {f"step {first + n}" for n in range(3)}
    assert not (run_dir / "best").exists()
    smoke("run", *DIVERGES, "--resume", "auto", code=1)
    assert f"the first of them step {first};" in capsys.readouterr().err


def test_no_checkpoint_is_newer_than_the_state_before_the_bad_steps(smoke, capsys):
    run_dir = smoke("run", *DIVERGES, "--save.every_steps", "1", "--save.keep", "1", code=1)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert f"the first of them step {int(checkpoint.name[5:]) + 1};" in capsys.readouterr().err


def test_a_scaler_skips_a_step_whose_infinite_loss_has_finite_gradients(faces, tmp_path):
    class Overflowing(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([super().forward(images)[:, :1], torch.full((len(images), 6), -math.inf)], 1)

    model, accelerator = Overflowing(), Accelerator(cpu=True)
    before = [parameter.clone() for parameter in model.parameters()]
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    watch = Watch(accelerator, Checkpointer(tmp_path, accelerator))
    loaders = ImageLoader(faces[0], 32), ImageLoader(faces[1], 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, *loaders, optimizer, 1, accelerator=accelerator, watch=watch, max_steps=1)
    assert all(map(torch.equal, model.parameters(), before))
    assert accelerator.scaler.get_scale() == 4.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trained_model_that_was_moved_can_be_trained_again():
    images, labels = map(torch.from_numpy, draw_faces(64))
    loader, model = DataLoader(TensorDataset(images, labels), 32), Small()
    for _ in range(2):
        train(model, loader, loader, torch.optim.SGD(model.parameters(), 0.1), 1)
        model.cpu()


def test_a_second_interrupt_leaves_at_once(tmp_path):
    accelerator = Accelerator(cpu=True)
    watch = Watch(accelerator, Checkpointer(tmp_path, accelerator))
    with watch.signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_during_validation_leaves_the_epoch_and_a_step_of_the_next_saved(smoke, monkeypatch):
    def evaluate_and_signal(*arguments: Any, **options: Any) -> Results:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr("dist_train.training.evaluate", evaluate_and_signal)
    run_dir = smoke("run", "--train.max_steps", "24", "--save.keep", "9", code=75)
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step_00000012", "step_00000013"]


@pytest.mark.parametrize("best_on", ["accuracy", "macro_f1", "loss"])
def test_the_best_epoch_is_that_of_the_figure_asked_for(faces, best_on):
    progress, figures = Progress(), []

    class Noting:
        def after_epoch(self, step: int, rows: list[Epoch], valid: Results) -> None:
            figures.append(-valid.loss if best_on == "loss" else getattr(valid, best_on))

    fit(faces, 6, lr=0.5, best_on=best_on, progress=progress, tracker=Noting(), log_every=10**6)
    assert progress.best_epoch == 1 + figures.index(max(figures))


def test_biases_and_norms_do_not_decay(faces):
    model = build_model(Config(model=ModelConfig("timm/test_resnet", pretrained=False)), faces[0])
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0)


def test_an_error_of_a_file_elsewhere_is_not_laid_to_the_run_folder(smoke, monkeypatch):
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/elsewhere")

    monkeypatch.setattr(FaceModel, "forward", fail)
    with pytest.raises(PermissionError, match="/elsewhere"):
        smoke("run")


def test_bad_steps_on_both_sides_of_an_epochs_end_leave_the_whole_new_epoch_to_be_resumed(smoke, monkeypatch, capsys):
    """Of 12 steps an epoch the last two and the next one."""
    forward, count = FaceModel.forward, itertools.count(1)

    def spoiled(model: FaceModel, images: torch.Tensor) -> torch.Tensor:
        bad = model.training and next(count) > 10
        return forward(model, images) * (float("nan") if bad else 1)

    options = ("--train.epochs", "2", "--train.max_steps", "24")
    with monkeypatch.context() as patch:
        patch.setattr(FaceModel, "forward", spoiled)
        run_dir = smoke("run", *options, code=1)
    assert "first of them step 11;" in capsys.readouterr().err
    newest = max((run_dir / "checkpoints").iterdir())
    state = torch.load(newest / "state.pt", weights_only=True)
    assert state["parts"]["batches"] == {"epoch": 1, "position": 0}
    assert (newest.name, state["progress"]["step"]) == ("step_00000012", 12)
    best = load_file(run_dir / "best" / "model.safetensors")  # of the first epoch
    assert all(torch.equal(tensor, best[name]) for name, tensor in load_file(newest / "model.safetensors").items())
    smoke("run", *options, "--resume", "auto")
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 24


def test_a_training_without_a_finite_validation_figure_has_no_best_model(smoke, capsys):
    run_dir = smoke("run", *DIVERGES, "--train.max_bad_steps", "100")
    assert "no best model" in capsys.readouterr().err
    assert not (run_dir / "best").exists()
    assert (run_dir / "summary.json").exists()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimizer_makes_the_steps_of_the_plain_one(name):
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = FaceModel("timm/resnet10t", pretrained=False).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01), fused)
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        for _ in range(3):
            (model(torch.rand(8, 1, 48, 48)).sum() * 0).backward()  # gradients as autograd lays them out
            for parameter in model.parameters():
                parameter.grad.add_(torch.randn(parameter.shape))
            optimizer.step()
        weights.append(model.state_dict())
    for key, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][key], rtol=1e-4, atol=1e-6)


def test_an_accelerator_that_divides_gradients_by_itself_is_refused(faces):
    model, accelerator = Small(), Accelerator(cpu=True, gradient_accumulation_steps=2)
    loaders = ImageLoader(faces[0], 32, shuffle=True), ImageLoader(faces[1], 64)
    with pytest.raises(InputError, match="gradient_accumulation"):
        train(model, *loaders, torch.optim.SGD(model.parameters(), 0.1), 1, accelerator=accelerator)


def test_batches_that_are_no_pairs_are_refused(faces):
    rows = [{"image": torch.zeros(1, 48, 48), "label": 0}] * 8
    model = Small()
    with pytest.raises(InputError, match="type dict; expected tensors"):
        train(model, DataLoader(rows, 4), DataLoader(rows, 4), torch.optim.SGD(model.parameters(), 0.1), 1)


def test_label_smoothing_raises_the_training_loss_only(faces):
    plain, smooth = fit(faces, 1, lr=1e-12), fit(faces, 1, lr=1e-12, label_smoothing=0.5)
    assert smooth.train_loss[0] != pytest.approx(plain.train_loss[0], abs=1e-6)
    assert smooth.valid_loss[0] == pytest.approx(plain.valid_loss[0], abs=1e-6)


def test_mixup_trains_on_class_shares(faces):
    model = Small()
    loader = ImageLoader(faces[0], 32, shuffle=True, mixup=0.2)
    history = train(model, loader, ImageLoader(faces[1], 64), torch.optim.Adam(model.parameters(), 3e-3), 8)
    assert history.train_loss[-1] < history.train_loss[0]


def test_seeded_dropout_repeats_and_is_new_at_every_step(faces):
    def losses(seed: int) -> list[float]:
        model = nn.Sequential(Small(), nn.Dropout(0.5))
        return fit(faces, 2, model, seed=seed).train_loss

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_the_classes_of_drawn_faces_are_the_packages():
    assert load_splits(DataConfig(count=70))[0].classes == EXPRESSIONS
    assert set(draw_faces(7)[1].tolist()) == set(range(7))


def test_sync_batchnorm_replaces_every_batchnorm(faces):
    settings = ModelConfig("timm/test_resnet", pretrained=False)
    kinds, counts = (nn.BatchNorm2d, nn.SyncBatchNorm), []
    for shared in (False, True):
        model = build_model(Config(model=settings, train=TrainConfig(sync_batchnorm=shared)), faces[0])
        counts.append([sum(isinstance(module, kind) for module in model.modules()) for kind in kinds])
    assert counts[0][0] > 0 and counts[0][1] == 0
    assert counts[1] == [0, counts[0][0]]
