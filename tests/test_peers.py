"""The same weights give the same numbers in other libraries' implementations."""

import importlib.util
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

from errors import UserError
from models import create_model, load_backbone, load_model
from models.layouts.huggingface import from_huggingface, huggingface_shape, to_huggingface
from models.segformer import CONFIGS, SegFormer
from tests.golden_data import seed

SIZES = [(2, 3, 64, 128), (1, 3, 65, 131)]


def huggingface_config(name: str, num_classes: int) -> SegformerConfig:
    return SegformerConfig(**huggingface_shape(name), num_labels=num_classes)


def with_segformers_eps(peer: nn.Module) -> nn.Module:
    """Every LayerNorm of theirs has eps 1e-5; SegFormer's blocks and stages have 1e-6."""
    for name, module in peer.named_modules():
        if (
            isinstance(module, nn.LayerNorm)
            and "patch_embeddings" not in name
            and "sequence_reduction" not in name
        ):
            module.eps = 1e-6
    return peer


def randomise(module: nn.Module) -> nn.Module:
    """Weights of their own kind of randomness for every entry, BatchNorm's statistics included."""
    generator = torch.Generator().manual_seed(0)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            fan_in = value[0].numel() if value.dim() > 1 else 25
            value.copy_(1 + noise.abs() if key.endswith("running_var") else noise / fan_in**0.5)
            if value.dim() == 1 and key.endswith("weight"):
                value += 1
    return module.eval()


def write_folder(model: SegFormer, folder: Path) -> Path:
    save_file(to_huggingface(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    huggingface_config(model.name, model.num_classes).save_pretrained(folder)
    return folder


def difference(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> float:
    """Largest difference of the logits, relative to the largest logit."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    with torch.no_grad():
        actual, expected = ours.to(dtype)(images).logits, theirs.to(dtype)(images).logits
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for shape in SIZES:
            assert difference(ours, with_segformers_eps(theirs), shape, dtype) < tolerance


@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2"])
def test_huggingface_loads_ours(name: str, tmp_path: Path) -> None:
    ours = seed(create_model(name)).eval()
    theirs, report = SegformerForSemanticSegmentation.from_pretrained(
        write_folder(ours, tmp_path), output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize(("name", "num_classes"), [("segformer_b0", 19), ("segformer_b2", 20)])
def test_ours_loads_huggingface(name: str, num_classes: int, tmp_path: Path) -> None:
    theirs = randomise(SegformerForSemanticSegmentation(huggingface_config(name, num_classes)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.name, ours.num_classes, ours.training) == (name, num_classes, False)
    assert_same(ours, theirs)
    from_file = load_model(tmp_path / "model.safetensors").state_dict()
    assert all(
        torch.equal(from_file[key], value.to(from_file[key]))
        for key, value in ours.state_dict().items()
    )


def test_eps_is_the_only_difference(tmp_path: Path) -> None:
    """Without `with_segformers_eps` the two differ, by more than float64's rounding and by little."""
    ours = seed(create_model("segformer_b0")).eval()
    theirs = SegformerForSemanticSegmentation.from_pretrained(write_folder(ours, tmp_path)).eval()
    assert 1e-8 < difference(ours, theirs, SIZES[0], torch.float64) < 1e-4
    assert difference(ours, with_segformers_eps(theirs), SIZES[0], torch.float64) < 1e-13


@pytest.mark.parametrize("kind", [SegformerForImageClassification, SegformerModel])
def test_encoders_of_huggingface_start_a_backbone(kind: type, tmp_path: Path) -> None:
    theirs = randomise(kind(huggingface_config("segformer_b0", 1000)))
    theirs.save_pretrained(tmp_path)
    ours = create_model("segformer_b0")
    head = ours.linear_pred.weight.clone()
    assert load_backbone(ours, tmp_path) is False
    assert torch.equal(ours.linear_pred.weight, head)
    images = torch.rand(SIZES[1])
    with torch.no_grad():
        expected = getattr(with_segformers_eps(theirs), "segformer", theirs)(
            images
        ).last_hidden_state
        actual = ours.eval()(images, logits=False).features[-1]
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(UserError, match="without a decode head"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_rename_table_is_a_bijection(name: str) -> None:
    """Over every key of every size: onto exactly the peer's keys, and back to the same tensors."""
    with torch.device("meta"):
        ours = create_model(name).state_dict()
    state = {key: torch.full(value.shape, n).float() for n, (key, value) in enumerate(ours.items())}
    for value in state.values():  # halves of kv differ
        if value.dim() and len(value) > 1:
            value[: len(value) // 2] += 0.5
    theirs = to_huggingface(state)
    kv = sum(".attn.kv." in key for key in state)
    assert len(theirs) == len(state) + kv and not theirs.keys() & state.keys()
    if name == "segformer_b0":
        with torch.device("meta"):
            peer = SegformerForSemanticSegmentation(huggingface_config(name, 20))
        assert len(theirs) == len(peer.state_dict())
    back = from_huggingface(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@given(
    st.dictionaries(
        st.text(string.ascii_lowercase + ".0123456789_", min_size=1),
        st.just(torch.zeros(2)),
        max_size=4,
    )
)
def test_keys_without_a_rule_are_kept(state: dict[str, Tensor]) -> None:
    """Whatever else a file holds reaches the loader, which refuses it by name."""
    assert from_huggingface(state).keys() == state.keys()


def test_unfit_huggingface_files_are_refused_by_name(tmp_path: Path) -> None:
    state = to_huggingface(create_model("segformer_b0").state_dict())
    lost = "segformer.encoder.block.0.1.attention.self.value.weight"
    path = tmp_path / "model.safetensors"
    save_file(
        {k: v for k, v in state.items() if k != lost} | {"decode_head.extra": torch.zeros(1)}, path
    )
    with pytest.raises(
        UserError, match=r"missing: block1\.1\.attn\.kv\.weight.*unknown: .*decode_head\.extra"
    ):
        load_model(tmp_path)
    save_file(state | {lost: torch.zeros(16, 32)}, path)
    with pytest.raises(UserError, match=r"missing: block1\.1\.attn\.kv\.weight"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"no weights at .*model\.safetensors"):
        load_model(tmp_path)


# timm's PVTv2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pvt_v2() -> Iterator[ModuleType]:
    """timm's module. timm imports torchvision for its data sets and transforms; none of it is in this network."""
    names = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc")
    names += (".transforms", ".transforms.functional")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in names:
                patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        yield pytest.importorskip(
            "timm.models.pvt_v2", reason="timm is missing; make test installs it"
        )


@torch.no_grad()
def assert_same_features(ours: nn.Module, theirs: nn.Module) -> None:
    """As they stand: timm has PVTv2's eps in every LayerNorm."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for shape in SIZES:
            images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
            actual = ours.to(dtype).encode(images)[0]
            expected = (
                theirs.to(dtype).eval().forward_intermediates(images, intermediates_only=True)
            )
            for a, b in zip(actual, expected, strict=True):
                assert (a - b).abs().max() < tolerance * b.abs().max()


def test_ours_loads_timm(pvt_v2: ModuleType, tmp_path: Path) -> None:
    """What timm saves starts ours, its classifier left out."""
    theirs = randomise(pvt_v2.pvt_v2_b0())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = create_model("pvt_v2_b0").eval()
    head = {
        key: value.clone()
        for key, value in ours.state_dict().items()
        if not key.startswith("backbone.")
    }
    assert load_backbone(ours, tmp_path) is False
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in head.items())
    assert_same_features(ours, theirs)
    with pytest.raises(UserError, match="without a decode head"):
        load_model(tmp_path)


def test_timm_loads_the_official_layout(pvt_v2: ModuleType) -> None:
    """The file as PVTv2's authors name it, through timm's own conversion."""
    ours = seed(create_model("pvt_v2_b2")).eval()
    official = {
        k.removeprefix("backbone."): v
        for k, v in ours.state_dict().items()
        if k.startswith("backbone.")
    }
    theirs = pvt_v2.pvt_v2_b2(num_classes=0)
    theirs.load_state_dict(pvt_v2.checkpoint_filter_fn(official, theirs))
    assert_same_features(ours, theirs)


def test_other_pvts_of_timm_are_refused(pvt_v2: ModuleType, tmp_path: Path) -> None:
    """PVTv2-B2-Li pools where B2 reduces by a convolution."""
    torch.save(pvt_v2.pvt_v2_b2_li().state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"does not fit pvt_v2_b2 .*attn\.sr\.weight \(64, 64, 1, 1\) instead of"
    ):
        load_backbone(create_model("pvt_v2_b2"), tmp_path / "w.pth")
