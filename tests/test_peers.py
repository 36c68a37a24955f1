"""The same weights give the same numbers in other libraries' implementations."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForImageClassification, SegformerModel
from transformers import SegformerForSemanticSegmentation as Peer

from models import create_model, load_model, start_from
from models.layouts import IMAGENET
from models.layouts.huggingface import architecture
from tests.golden_data import without_chance
from tests.peers import MMSegNetwork, randomise, with_segformers_eps

Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, of_ours: Function, of_theirs: Function) -> None:
    """Two functions of an image in both precisions, on an odd size too; to the largest value."""
    torch.manual_seed(1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours.to(dtype)
        theirs.to(dtype)
        for shape in ((2, 3, 64, 128), (1, 3, 65, 131)):
            images = torch.rand(shape, dtype=dtype)
            actual, expected = of_ours(images), of_theirs(images)
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    """`theirs` is given what `ours` makes of its input."""

    def logits(images: Tensor) -> Tensor:
        out = theirs(ours.normalisation(images) if ours.normalisation else images)
        return getattr(out, "logits", out)

    assert_same(ours, theirs, lambda images: ours(images).logits, logits)


@pytest.mark.parametrize(("name", "num_classes"), [("segformer_b0", 19), ("segformer_b3", 20)])
def test_ours_loads_huggingface(name: str, num_classes: int, tmp_path: Path) -> None:
    """Also where blocks have two digits."""
    theirs = randomise(Peer(SegformerConfig(**architecture(name), num_labels=num_classes)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.name, ours.num_classes, ours.training) == (name, num_classes, False)
    assert_same_logits(ours, with_segformers_eps(theirs))


@pytest.mark.parametrize("kind", [SegformerForImageClassification, SegformerModel])
def test_encoders_of_huggingface_start_ours(kind: type, tmp_path: Path) -> None:
    theirs = randomise(kind(SegformerConfig(**architecture("segformer_b0"), num_labels=1000)))
    theirs.save_pretrained(tmp_path)
    ours = create_model("segformer_b0").eval()
    assert start_from(ours, tmp_path) is False
    encoder = getattr(with_segformers_eps(theirs), "segformer", theirs)
    functions = (lambda x: ours.encoder(x)[0][-1]), (lambda x: encoder(x).last_hidden_state)
    assert_same(ours, theirs, *functions)


def test_ours_loads_mmsegmentation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, whole, encoder = randomise(MMSegNetwork("segformer_b0", 48, 19)), "w.pth", "mit.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": theirs.state_dict()}, tmp_path / whole)
    torch.save(theirs.backbone.state_dict(), tmp_path / encoder)
    ours = load_model(tmp_path / whole)
    assert (ours.name, ours.num_classes, ours.normalisation) == ("segformer_b0", 19, IMAGENET)
    # An ImageNet encoder, and the encoder of a whole network, whose head is of another kind.
    images = torch.ones(1, 3, 32, 32)
    expected = ours.encoder(images)[0][-1]
    for file, normalisation in ((encoder, None), (whole, IMAGENET)):
        model = create_model("segformer_b0").eval()
        head = model.head.classifier.weight.clone()
        caplog.clear()
        assert start_from(model, tmp_path / file) is False
        assert ("decode head of another kind" in caplog.text) == (file == whole)
        assert model.normalisation == normalisation
        assert torch.equal(model.head.classifier.weight, head)
        torch.testing.assert_close(model.encoder(images)[0][-1], expected)
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # as every one of theirs has
    assert_same_logits(ours, theirs)
    # BatchNorm sees what it sees there.
    assert_same_logits(without_chance(ours.train()), theirs.train())


def test_pvt_v2_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm saves starts ours, its classifier left out; what timm makes of the names of
    PVTv2's authors is that again."""
    names = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc")
    for name in (*names, ".transforms", ".transforms.functional"):  # it needs none of them
        monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())
    timm = pytest.importorskip("timm.models.pvt_v2", reason="timm is missing")
    theirs = randomise(timm.pvt_v2_b0())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = create_model("pvt_v2_b0").eval()
    assert start_from(ours, tmp_path) is False
    converted = timm.checkpoint_filter_fn(ours.encoder.state_dict(), theirs)
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in converted.items())

    def in_a_row(maps: Iterable[Tensor]) -> Tensor:
        return torch.cat([feature.flatten(1) for feature in maps], 1)

    def expected(x: Tensor) -> Tensor:
        return in_a_row(theirs.forward_intermediates(x, intermediates_only=True))

    # As they stand: timm has PVTv2's eps in every LayerNorm.
    assert_same(ours, theirs, lambda x: in_a_row(ours.encoder(x)[0]), expected)
