"""PVTv2 and LVT beside SegFormer: recognised, loaded and distilled in any pair."""

from pathlib import Path

import pytest
import torch
from torch import nn

from datasets.classes import CITYSCAPES
from errors import UserError
from models import MODELS, SegmentationModel, create_model, load_backbone, load_model, save_model
from models.checkpoints import recognise
from models.distillation import CrossSelectiveFusion, Distiller, EmbeddingAssistant
from tests.golden_data import seed

OTHERS = ("pvt_v2_b0", "lvt")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recognised_by_its_keys(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert recognise(state) == name
    assert (
        recognise(
            {key: value for key, value in state.items() if not key.startswith(("norm1.", "neck."))}
        )
        == name
    )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", [(32, 32), (65, 131), (33, 98)])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    model = create_model(name).eval()
    with torch.inference_mode():
        out = model(torch.rand(1, 3, *size))
    assert out.logits.shape == (1, 20, -(-size[0] // 4), -(-size[1] // 4))
    for feature, embedding, channels in zip(
        out.features, out.embeddings, model.channels, strict=True
    ):
        assert feature.shape[1] == channels
        assert embedding.shape == (1, feature[0, 0].numel(), channels)


@pytest.mark.parametrize("name", OTHERS)
def test_saved_and_published_files_load(name: str, tmp_path: Path) -> None:
    model = seed(create_model(name, 12)).eval()
    save_model(model, tmp_path / "w.safetensors")
    beside = {"skfs.0.conv1.0.weight": torch.zeros(64, 256, 1, 1)}
    student = {f"module.student.{key}": value for key, value in model.state_dict().items()}
    torch.save(
        {"state_dict": student | {f"module.{key}": value for key, value in beside.items()}},
        tmp_path / "w.pth",
    )
    images = torch.rand(1, 3, 64, 64)
    for file in ("w.safetensors", "w.pth"):
        loaded = load_model(tmp_path / file)
        assert (loaded.name, loaded.num_classes) == (name, 12)
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, model(images).logits)


def imagenet_encoder(model: SegmentationModel) -> dict[str, torch.Tensor]:
    """A PVTv2's file as its authors publish it: the bare encoder and ImageNet's classifier."""
    state = {
        k.removeprefix("backbone."): v
        for k, v in model.state_dict().items()
        if k.startswith("backbone.")
    }
    return state | {
        "head.weight": torch.zeros(1000, model.channels[-1]),
        "head.bias": torch.zeros(1000),
    }


def test_imagenet_encoder_starts_a_pvtv2(tmp_path: Path) -> None:
    source, target = seed(create_model("pvt_v2_b0")), create_model("pvt_v2_b0")
    torch.save(imagenet_encoder(source), tmp_path / "pvt_v2_b0.pth")
    head = target.state_dict()["head.conv_seg.weight"].clone()
    assert load_backbone(target, tmp_path / "pvt_v2_b0.pth") is False
    for key, value in target.state_dict().items():
        if key.startswith("backbone."):
            assert torch.equal(value, source.state_dict()[key]), key
    assert torch.equal(target.state_dict()["head.conv_seg.weight"], head)
    with pytest.raises(UserError, match="pvt_v2_b0's encoder without a decode head"):
        load_model(tmp_path / "pvt_v2_b0.pth")
    for other in ("pvt_v2_b1", "segformer_b0", "lvt"):
        with pytest.raises(UserError, match="it looks like pvt_v2_b0"):
            load_backbone(create_model(other), tmp_path / "pvt_v2_b0.pth")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("segformer_b0", "pvt_v2_b1"), ("pvt_v2_b0", "segformer_b1"), ("lvt", "pvt_v2_b1")],
)
def test_any_pair_is_distilled(student: str, teacher: str) -> None:
    """On an odd size, with the method that needs most of the student; every parameter learns."""
    networks = create_model(student), create_model(teacher)
    channels = networks[0].channels, networks[1].channels
    distiller = Distiller(
        networks[0],
        CITYSCAPES.weights,
        teacher=networks[1],
        fusion=CrossSelectiveFusion(*channels),
        alignment=EmbeddingAssistant(*channels),
    ).train()
    losses = distiller(torch.rand(2, 3, 65, 98), torch.randint(0, 19, (2, 17, 25)))
    assert list(losses) == ["ce", "hcl", "embed1", "embed2", "embed3", "embed4"]
    sum(losses.values()).backward()
    for key, parameter in distiller.named_parameters():
        unused = ".fc1.0." in key and "skfs" in key  # CSF's squeeze for a batch of one
        assert (parameter.grad is None) == unused, key
        assert unused or torch.isfinite(parameter.grad).all(), key


def test_a_too_narrow_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="segformer_b0 is narrower than the student lvt"):
        Distiller(
            create_model("lvt"), None, teacher=create_model("segformer_b0"), fusion=nn.Identity()
        )
