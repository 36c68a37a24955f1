"""Every model and every method gives the numbers of the published code."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.classes import CITYSCAPES
from models import SegmentationOutput, create_model
from models.distillation.losses import (
    FEATURE_LOSSES,
    channel_wise_divergence,
    pixel_wise_divergence,
)
from models.pyramid import DropPath
from tests.golden_data import (
    INPUTS,
    METHODS,
    PLAIN,
    arrays,
    build,
    golden_input,
    golden_labels,
    load,
    published_key,
    seed,
)

TRAINED = tuple(name for name in load("train_golden.json") if name in METHODS or name in PLAIN)


def assert_golden(name: str, actual: Tensor, tolerance: float = 3e-5) -> None:
    """Shape, statistics and stored values of a tensor, relative to its largest value."""
    golden = arrays()
    x = actual.detach().float().numpy()
    assert list(x.shape) == list(golden[f"{name}#shape"])
    mean, std, total, low, high = golden[f"{name}#stats"]
    scale = max(abs(low), abs(high))
    found = (
        x.mean(dtype=np.float64),
        x.std(dtype=np.float64),
        np.abs(x).sum(dtype=np.float64) / x.size,
        x.min(),
        x.max(),
    )
    np.testing.assert_allclose(
        found, (mean, std, total / x.size, low, high), rtol=0, atol=tolerance * scale, err_msg=name
    )
    if name in golden:
        values, stored = x, golden[name]
    else:
        values, stored = x.ravel()[:: -(-x.size // 1024)], golden[f"{name}#sample"]
    np.testing.assert_allclose(values, stored, rtol=0, atol=tolerance * scale, err_msg=name)


def without_randomness(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, DropPath):
            m.drop_prob = 0.0
        elif isinstance(m, nn.Dropout2d):
            m.p = 0.0
    return module


@pytest.mark.parametrize("name", [*PLAIN, *METHODS])
def test_parameters_are_the_published_ones(name: str) -> None:
    manifest = load("manifest.json")[name]
    model = create_model(PLAIN[name]) if name in PLAIN else build(name)
    assert {published_key(k): list(v.shape) for k, v in model.state_dict().items()} == manifest["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == manifest["total_params"]


@pytest.mark.parametrize("name", PLAIN)
def test_outputs(name: str) -> None:
    model = seed(create_model(PLAIN[name])).eval()
    inputs = [i for i in INPUTS if f"{name}/eval/{i}/logits#stats" in arrays()]
    assert inputs
    for i in inputs:
        with torch.no_grad():
            out = model(golden_input(i))
        assert_golden(f"{name}/eval/{i}/logits", out.logits)
        for k in range(4):
            assert_golden(f"{name}/eval/{i}/feat{k + 1}", out.features[k])
            assert_golden(f"{name}/eval/{i}/embed{k + 1}", out.embeddings[k])


@pytest.mark.parametrize(("name", "i"), [(name, i) for name in METHODS for i in "AB"])
def test_distillation_modules_in_evaluation(name: str, i: str) -> None:
    """A has two images, B one: both of CSF's squeezes."""
    distiller = build(name).eval()
    images = golden_input(i)
    with torch.no_grad():
        student = distiller.student(images)
        check_distiller(f"{name}/eval/{i}", distiller, images, student)


def check_distiller(
    prefix: str, distiller: nn.Module, images: Tensor, student: SegmentationOutput, tolerance: float = 3e-5
) -> None:
    assert_golden(f"{prefix}/logits", student.logits)
    for k, fused in enumerate(distiller.fusion(student.features), start=1):
        assert_golden(f"{prefix}/csf{k}", fused, tolerance)
    if distiller.alignment is not None:
        for k, projected in enumerate(distiller.alignment(images, student).values(), start=1):
            assert_golden(f"{prefix}/proj{k}", projected)


@pytest.mark.parametrize("name", [n for n in TRAINED if f"{n}/train/A/logits#stats" in arrays()])
def test_training_mode_outputs_and_batch_statistics(name: str) -> None:
    distiller = without_randomness(build(name)).train()
    images = golden_input("A")
    student = distiller.student(images)
    if distiller.fusion is None:
        assert_golden(f"{name}/train/A/logits", student.logits)
    else:
        # BatchNorm over the two values of CSF's squeeze magnifies rounding.
        check_distiller(f"{name}/train/A", distiller, images, student, tolerance=1e-4)
    buffers = {
        published_key(k) if name in METHODS else k.removeprefix("student."): v
        for k, v in distiller.state_dict().items()
    }
    after = [k for k in arrays() if k.startswith(f"{name}/train/A/after/") and k.endswith("#stats")]
    assert after
    for key in after:
        key = key.removesuffix("#stats")
        assert_golden(key, buffers[key.rsplit("/", 1)[1]])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_step(name: str, dtype: torch.dtype) -> None:
    """Losses and the gradient norm of every parameter. In float64 a wrong LayerNorm epsilon can't hide."""
    golden = load("train_golden.json")[name]
    suffix = "_float64" if dtype == torch.float64 else ""
    distiller = without_randomness(build(name)).train().to(dtype)
    losses = distiller(golden_input("A").to(dtype), golden_labels())
    total = sum(losses.values())
    total.backward()

    expected = golden["losses" + suffix]
    terms = {"ce": losses["ce"], "total": total}
    if name in METHODS:
        terms["hcl"] = losses["hcl"]
    for (key, value), weight in zip(
        ((k, v) for k, v in losses.items() if k.startswith("embed")),
        distiller.embed_weights,
        strict=False,
    ):
        terms["embed_mse" if name.startswith("skf_embed") else key.replace("embed", "embed_mse")] = value / weight
    assert set(terms) >= {k for k in expected if not k.startswith(("cwd", "embed_weighted"))}
    for key, value in terms.items():
        assert value.item() == pytest.approx(expected[key], rel=1e-10 if suffix else 1e-5), key
    assert_gradients(distiller, golden["grad_l2" + suffix], name, dtype)


def assert_gradients(distiller: nn.Module, expected: dict, name: str, dtype: torch.dtype) -> None:
    found = {}
    for key, parameter in distiller.named_parameters():
        key = published_key(key) if name in METHODS else key.removeprefix("student.")
        found[key] = None if parameter.grad is None else parameter.grad.norm().item()
    assert found.keys() == expected.keys()
    # Ahead of a BatchNorm some gradients are zero in exact arithmetic and noise in ours.
    absolute, relative = (1e-12, 1e-9) if dtype == torch.float64 else (5e-6, 5e-3)
    for key, value in expected.items():
        if value is None:
            assert not found[key], key
        else:
            assert found[key] == pytest.approx(value, rel=relative, abs=absolute), key


@pytest.mark.parametrize("name", [n for n in METHODS if "total_cwd_channel_T1" in load("train_golden.json").get(n, {})])
def test_other_feature_losses(name: str) -> None:
    golden = load("train_golden.json")[name]
    for loss, temperature, key in [
        (channel_wise_divergence, 1, "channel_T1"),
        (channel_wise_divergence, 4, "channel_T4"),
        (pixel_wise_divergence, 1, "spatial_T1"),
    ]:
        distiller = without_randomness(build(name, feature_loss=lambda s, t, f=loss, k=temperature: f(s, t, k))).train()
        total = sum(distiller(golden_input("A"), golden_labels()).values())
        assert total.item() == pytest.approx(golden[f"total_cwd_{key}"], rel=1e-5)
        if key == "channel_T1":
            total.backward()
            assert_gradients(distiller, golden["grad_l2_total_cwd_channel_T1"], name, torch.float32)


def test_losses_on_small_maps() -> None:
    """Maps so small that HCL leaves levels out, and both divergences at two temperatures."""
    golden = load("losses_golden.json")
    rng = np.random.default_rng(2)
    shapes = [(2, 8, 16, 32), (2, 12, 8, 16), (2, 16, 3, 6), (2, 20, 1, 2)]
    student, teacher = (
        [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes] for _ in range(2)
    )
    hcl = FEATURE_LOSSES["hcl"]
    assert hcl(student, teacher).item() == pytest.approx(golden["hcl"], rel=1e-5)
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        assert hcl([s], [t]).item() == pytest.approx(golden[f"hcl_level{i}"], rel=1e-5)
        for temperature in (1, 4):
            for loss, norm in (
                (channel_wise_divergence, "channel"),
                (pixel_wise_divergence, "spatial"),
            ):
                expected = golden[f"cwd/{norm}/kl/T{temperature}/{i}"]
                assert loss([s], [t], temperature).item() == pytest.approx(expected, rel=1e-5)


def test_palette_and_class_weights() -> None:
    palette = load("palette.json")["Colorize(20)"]
    assert CITYSCAPES.palette.tolist() == palette
    assert len(CITYSCAPES.weights) == 20 and CITYSCAPES.weights[19] == 0
