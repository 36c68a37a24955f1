"""The same weights give the same numbers in other libraries' implementations."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SegformerForImageClassification, SegformerModel
from transformers import SegformerForSemanticSegmentation as Peer

from errors import UserError
from models import create_model, load_model, start_from
from models.layouts import IMAGENET
from models.layouts.huggingface import from_huggingface, to_huggingface
from models.pyramid import DropPath
from models.segformer import CONFIGS
from tests.golden_data import seed
from tests.peers import MMSegNetwork, huggingface_config, randomise, with_segformers_eps

SIZES = [(2, 3, 64, 128), (1, 3, 65, 131)]
Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def difference(
    ours: Function, theirs: Function, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> float:
    """Largest difference of two functions of an image, relative to the largest value."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    actual, expected = ours(images), theirs(images)
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same(ours: nn.Module, theirs: nn.Module, of_ours: Function, of_theirs: Function) -> None:
    """In both precisions, on an odd size too."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours.to(dtype)
        theirs.to(dtype)
        for shape in SIZES:
            assert difference(of_ours, of_theirs, shape, dtype) < tolerance


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    """`theirs` is given what `ours` makes of its input."""

    def logits(images: Tensor) -> Tensor:
        out = theirs(ours.normalisation(images) if ours.normalisation else images)
        return getattr(out, "logits", out)

    assert_same(ours, theirs, lambda images: ours(images).logits, logits)


def test_huggingface_loads_ours(tmp_path: Path) -> None:
    ours = seed(create_model("segformer_b0")).eval()
    state = to_huggingface(ours.state_dict())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    huggingface_config("segformer_b0", 20).save_pretrained(tmp_path)
    theirs, report = Peer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, with_segformers_eps(theirs.eval()))


@pytest.mark.parametrize(("name", "num_classes"), [("segformer_b0", 19), ("segformer_b1", 20)])
def test_ours_loads_huggingface(name: str, num_classes: int, tmp_path: Path) -> None:
    theirs = randomise(Peer(huggingface_config(name, num_classes)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.name, ours.num_classes, ours.training) == (name, num_classes, False)
    assert_same_logits(ours, with_segformers_eps(theirs))


@pytest.mark.parametrize("kind", [SegformerForImageClassification, SegformerModel])
def test_encoders_of_huggingface_start_ours(kind: type, tmp_path: Path) -> None:
    theirs = randomise(kind(huggingface_config("segformer_b0", 1000)))
    theirs.save_pretrained(tmp_path)
    ours = create_model("segformer_b0").eval()
    head = ours.head.classifier.weight.clone()
    assert start_from(ours, tmp_path) is False
    assert torch.equal(ours.head.classifier.weight, head)
    encoder = getattr(with_segformers_eps(theirs), "segformer", theirs)
    functions = (lambda x: ours.encoder(x)[0][-1]), (lambda x: encoder(x).last_hidden_state)
    assert difference(*functions, SIZES[1]) < 1e-5
    with pytest.raises(UserError, match="without a decode head"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_every_size_is_renamed_and_back(name: str) -> None:
    with torch.device("meta"):
        ours = create_model(name).state_dict()
        peer = Peer(huggingface_config(name, 20))
    state = {key: torch.full(value.shape, n).float() for n, (key, value) in enumerate(ours.items())}
    for value in state.values():  # halves of kv differ
        if value.dim() and len(value) > 1:
            value[: len(value) // 2] += 0.5
    theirs = to_huggingface(state)
    assert len(theirs) == len(peer.state_dict()) and not theirs.keys() & state.keys()
    back = from_huggingface(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("changed", [{}, {"weight": torch.zeros(16, 32)}], ids=["lost", "misfit"])
def test_unfit_huggingface_files_are_refused_by_name(changed: dict, tmp_path: Path) -> None:
    state = to_huggingface(create_model("segformer_b0").state_dict())
    value = "segformer.encoder.block.0.1.attention.self.value."
    del state[f"{value}weight"]
    state |= {f"{value}{leaf}": tensor for leaf, tensor in changed.items()}
    save_file(state | {"decode_head.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    says = r"missing: block1\.1\.attn\.kv\.weight.*unknown: .*decode_head\.extra"
    with pytest.raises(UserError, match=says):
        load_model(tmp_path)


def with_mmseg_eps(model: nn.Module) -> nn.Module:
    """Every LayerNorm of theirs has 1e-6."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model


def test_ours_loads_mmsegmentation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, whole, encoder = randomise(MMSegNetwork("segformer_b0", 48, 19)), "w.pth", "mit.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": theirs.state_dict()}, tmp_path / whole)
    torch.save(theirs.backbone.state_dict(), tmp_path / encoder)
    ours = load_model(tmp_path / whole)
    assert (ours.name, ours.num_classes, ours.normalisation) == ("segformer_b0", 19, IMAGENET)
    functions = (lambda x: ours(x).logits), (lambda x: theirs(IMAGENET(x)))
    assert difference(*functions, SIZES[1]) < 1e-4  # their eps left out
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
    assert_same_logits(with_mmseg_eps(ours), theirs)
    for module in ours.train().modules():
        if isinstance(module, DropPath | nn.Dropout2d):
            module.eval()
    assert_same_logits(ours, theirs.train())  # BatchNorm sees what it sees there


def test_pvt_v2_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm saves starts ours, its classifier left out; what timm makes of the names of
    PVTv2's authors is that again."""
    names = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc")
    if importlib.util.find_spec("torchvision") is None:  # it isn't needed for this network
        for name in (*names, ".transforms", ".transforms.functional"):
            monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())
    timm = pytest.importorskip("timm.models.pvt_v2", reason="timm is missing")
    theirs = randomise(timm.pvt_v2_b0())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = create_model("pvt_v2_b0").eval()
    head = {key: value.clone() for key, value in ours.head.state_dict().items()}
    assert start_from(ours, tmp_path) is False
    assert all(torch.equal(ours.head.state_dict()[key], value) for key, value in head.items())
    with pytest.raises(UserError, match="without a decode head"):
        load_model(tmp_path)
    converted = timm.checkpoint_filter_fn(ours.encoder.state_dict(), theirs)
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in converted.items())

    def in_a_row(maps: Iterable[Tensor]) -> Tensor:
        return torch.cat([feature.flatten(1) for feature in maps], 1)

    def expected(x: Tensor) -> Tensor:
        return in_a_row(theirs.forward_intermediates(x, intermediates_only=True))

    # As they stand: timm has PVTv2's eps in every LayerNorm.
    assert_same(ours, theirs, lambda x: in_a_row(ours.encoder(x)[0]), expected)
