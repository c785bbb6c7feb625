from __future__ import annotations

import logging
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from dist_train import CLASSES, FaceModel, load_run
from dist_train.config import InputError

IMAGES = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "backbone", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "timm/resnet10t", "timm/convnext_atto"]
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_torchvision_and_timm_classifiers_by_name(backbone, in_channels):
    model = FaceModel(backbone, num_classes=5, pretrained=False, in_channels=in_channels).eval()
    with torch.inference_mode():
        logits = model(IMAGES)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits, model(IMAGES / 255))
        assert model(IMAGES.expand(-1, 3, -1, -1)).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", ["googlenet", "vgg11", "densenet121", "vit_b_16", "swin_t", "timm/vit_tiny_patch16_224"]
)
def test_larger_classifiers_by_name(backbone):
    model = FaceModel(backbone, pretrained=False).train()
    assert model(torch.rand(2, 3, 224, 224)).shape == (2, 7)


def test_normalisation_is_that_of_the_weights():
    assert FaceModel(pretrained=False).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    model = FaceModel("timm/vit_tiny_patch16_224", pretrained=False)
    assert tuple(model.mean.flatten().tolist()) == pytest.approx(cfg.mean)
    assert tuple(model.std.flatten().tolist()) == pytest.approx(cfg.std)


def test_defaults_are_the_notebooks():
    model = FaceModel(pretrained=False)
    assert model.classes == CLASSES
    assert isinstance(model.backbone, torchvision.models.ResNet)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_local_weights_replace_a_head_of_another_size(tmp_path, caplog, ending):
    file = tmp_path / f"resnet18.{ending}"
    published = torchvision.models.resnet18(weights=None)
    if ending == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in published.state_dict().items()}}, file)
    else:
        safetensors.torch.save_file(published.state_dict(), file)
    with caplog.at_level(logging.INFO, "dist_train"):
        model = FaceModel(weights=file)
    assert "fc.weight of shape [1000, 512] stays behind; a new random one of [7, 512] replaces it" in caplog.text
    assert torch.equal(model.backbone.conv1.weight, published.conv1.weight)
    gray = FaceModel(weights=file, in_channels=1)
    torch.testing.assert_close(gray.backbone.conv1.weight, published.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet18"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_small_stem_shrinks_less_and_is_random_whatever_the_weights(tmp_path, caplog, backbone, stride):
    published = torchvision.models.resnet18(weights=None)
    safetensors.torch.save_file(published.state_dict(), tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO, "dist_train"):
        model = FaceModel(backbone, weights=tmp_path / "w.safetensors", stem_stride=stride).eval()
    assert "conv1.weight of shape [64, 3, 7, 7] stays behind" in caplog.text
    seen = []
    model.backbone.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert model(torch.rand(2, 1, 48, 48)).shape == (2, 7)
    assert seen == [48 // stride]
    assert torch.equal(model.backbone.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    model.save(tmp_path / "saved")
    torch.testing.assert_close(load_run(tmp_path / "saved")(torch.ones(1, 1, 48, 48)), model(torch.ones(1, 1, 48, 48)))


def test_a_stem_that_cannot_be_replaced_is_told():
    with pytest.raises(InputError, match=r"model.stem_stride: mobilenet_v3_small has no 7x7 stem to replace"):
        FaceModel("mobilenet_v3_small", pretrained=False, stem_stride=1)


def test_timm_weights_from_a_file(tmp_path):
    published = timm.create_model("resnet10t", num_classes=1000)
    safetensors.torch.save_file(published.state_dict(), tmp_path / "w.safetensors")
    model = FaceModel("timm/resnet10t", weights=tmp_path / "w.safetensors")
    assert torch.equal(model.backbone.layer1[0].conv1.weight, published.layer1[0].conv1.weight)


def test_published_weights_are_loaded_from_the_hubs_cache(tmp_path, monkeypatch):
    """The download is torchvision's own; what lies in its cache is used, with the digest it checks."""
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    published = torchvision.models.resnet18(weights=None)
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(published.state_dict(), checkpoints / weights.url.rsplit("/", 1)[1])
    model = FaceModel()
    assert torch.equal(model.backbone.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert model.backbone.fc.weight.shape == (7, 512)


def test_published_weights_with_other_key_names_are_loaded(tmp_path):
    """Densenet's published files have older names, which torchvision turns into its own."""
    weights = torchvision.models.DenseNet121_Weights.DEFAULT
    state = torchvision.models.densenet121(weights=None).state_dict()
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    older = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value
        for key, value in state.items()
        if "tracked" not in key
    }
    torch.save(older, checkpoints / weights.url.rsplit("/", 1)[1])
    model = FaceModel("densenet121")
    assert torch.equal(model.backbone.features.conv0.weight, state["features.conv0.weight"])


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet18"])
def test_weights_that_cannot_be_fetched_say_the_ways_out(backbone):
    with pytest.raises(InputError, match=r"model\.pretrained: .*cannot be fetched.*model\.weights.*pretrained: false"):
        FaceModel(backbone)


def mismatch(state):
    state["extra"] = torch.zeros(1)
    del state["layer1.0.conv1.weight"]
    state["conv1.weight"] = torch.zeros(8, 3, 7, 7)
    return state


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (None, "does not exist"),
        (lambda file: file.write_bytes(b"junk"), "not a readable weights file"),
        (lambda file: torch.save([1, 2], file), "no state dict"),
        (lambda file: torch.save(torch.nn.Linear(1, 1), file), "not a readable weights file"),  # pickled code
        (
            lambda file: torch.save(mismatch(torchvision.models.resnet18().state_dict()), file),
            r"missing: layer1.0.conv1.weight; 1 unknown: extra; 1 of another shape: conv1.weight \[8, 3, 7, 7\]",
        ),
    ],
)
def test_bad_weights_files_are_refused_by_name(tmp_path, write, said):
    file = tmp_path / "weights.pth"
    if write:
        write(file)
    with pytest.raises(InputError, match=said) as error:
        FaceModel(weights=file)
    assert str(file) in str(error.value)


def test_unknown_backbones_name_the_nearest():
    with pytest.raises(InputError, match=r"resnet81.*did you mean resnet18\?"):
        FaceModel("resnet81", pretrained=False)
    with pytest.raises(InputError, match=r"convnext_ato.*did you mean convnext_atto\?"):
        FaceModel("timm/convnext_ato", pretrained=False)


def test_a_saved_model_comes_back(tmp_path):
    model = FaceModel("timm/resnet10t", 3, pretrained=False, classes=["a", "b", "c"], image_size=64).eval()
    model.to(memory_format=torch.channels_last).save(tmp_path / "best")
    again = load_run(tmp_path)
    assert again.classes == ("a", "b", "c")
    assert again.image_size == 64
    assert not again.training
    with torch.inference_mode():
        torch.testing.assert_close(again(IMAGES), model(IMAGES))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_run_is_refused(tmp_path, damage):
    FaceModel("timm/resnet10t", pretrained=False).save(tmp_path / "best")
    (tmp_path / "best" / damage).write_text("{")
    with pytest.raises(InputError, match=damage):
        load_run(tmp_path)
    (tmp_path / "best" / damage).unlink()
    with pytest.raises(InputError, match=damage):
        load_run(tmp_path)
