"""Every model and every method gives the numbers of the published code."""

from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cli
from datasets.classes import CITYSCAPES
from models import create_model
from models.distillation import Distiller, EmbeddingAssistant, GLMixer, TransKD
from models.distillation.csf import CrossSelectiveFusion, SelectiveKernelFusion
from models.distillation.losses import FEATURE_LOSSES
from models.pvtv2 import FPN, FPNHead
from models.pyramid import DropPath
from tests.golden_data import (
    INPUTS,
    METHODS,
    PLAIN,
    arrays,
    golden_input,
    golden_labels,
    load,
    published_key,
    seeded,
    teacher_output,
    without_chance,
)
from train import TransKD_EA, TransKD_GLMixer, TransKDBase, student, teacher
from train.flags import DataOptions

WIDTHS = (32, 64, 160, 256), (64, 128, 320, 512)  # of the student's stages and the teacher's
TRAINED = tuple(name for name in load("train_golden.json") if name in METHODS or name in PLAIN)
DIVERGENCES = ((FEATURE_LOSSES["CWloss"], "channel"), (FEATURE_LOSSES["KL"], "spatial"))


def assert_golden(name: str, actual: Tensor, tolerance: float = 3e-5) -> None:
    """Shape, statistics and stored values of a tensor, relative to its largest value."""
    golden = arrays()
    x = actual.detach().float().numpy()
    assert list(x.shape) == list(golden[f"{name}#shape"])
    mean, std, total, low, high = golden[f"{name}#stats"]
    average = np.abs(x).sum(dtype=np.float64) / x.size
    found = (x.mean(dtype=np.float64), x.std(dtype=np.float64), average, x.min(), x.max())
    expected = (mean, std, total / x.size, low, high)
    atol = tolerance * max(abs(low), abs(high))
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol, err_msg=name)
    close(found, expected)
    if name in golden:
        close(x, golden[name])
    else:
        close(x.ravel()[:: -(-x.size // 1024)], golden[f"{name}#sample"])


def published_state(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the golden rows' names, with their gradients."""
    state = module.state_dict(keep_vars=True)
    if name in METHODS:
        return {published_key(key): value for key, value in state.items()}
    return {key.removeprefix("student."): value for key, value in state.items()}


def losses_of(name: str, distiller: Distiller, dtype: torch.dtype) -> dict[str, Tensor]:
    """One training step's losses on input A."""
    taught = teacher_output(METHODS[name].teacher, dtype) if name in METHODS else None
    return distiller(golden_input("A").to(dtype), golden_labels(), taught)


def assert_outputs(prefix: str, distiller: Any, tolerance: float = 3e-5) -> None:
    """Those of the network and, where there are some, of the modules beside it."""
    images = golden_input(prefix[-1])
    out = distiller.student(images)
    maps = {"logits": [out.logits]}
    if isinstance(distiller, TransKD):
        maps["csf"] = distiller.fusion(out.features)
        if distiller.alignment is not None:
            maps["proj"] = distiller.alignment(images, out).values()
    else:
        maps |= {"feat": out.features, "embed": out.embeddings}
    for kind, tensors in maps.items():
        for k, tensor in enumerate(tensors, start=1):
            key = kind if kind == "logits" else f"{kind}{k}"
            assert_golden(f"{prefix}/{key}", tensor, tolerance if kind == "csf" else 3e-5)


@pytest.mark.parametrize("name", [*PLAIN, *METHODS])
def test_parameters_and_outputs(name: str) -> None:
    """A has two images, B one: both of CSF's squeezes. C has an odd size."""
    distiller = seeded(name).eval()
    manifest, state = load("manifest.json")[name], published_state(name, distiller)
    assert {key: list(value.shape) for key, value in state.items()} == manifest["state_dict"]
    assert sum(p.numel() for p in distiller.parameters()) == manifest["total_params"]
    inputs = [i for i in INPUTS if f"{name}/eval/{i}/logits#stats" in arrays()]
    assert {"A", "B"} <= {*inputs}
    with torch.no_grad():
        for i in inputs:
            assert_outputs(f"{name}/eval/{i}", distiller)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_step(name: str, dtype: torch.dtype) -> None:
    """Losses, gradient norms, BatchNorm. In float64 a wrong epsilon can't hide."""
    golden = load("train_golden.json")[name]
    suffix = "_float64" if dtype == torch.float64 else ""
    distiller = without_chance(seeded(name).train()).to(dtype)
    losses = losses_of(name, distiller, dtype)
    total = sum(losses.values())
    total.backward()

    found = {"ce": losses["ce"], "total": total}
    if name in METHODS:
        found["hcl"] = losses["hcl"]
        embeds = [key for key in losses if key.startswith("embed")]
        for key, weight in zip(embeds, distiller.embed_weights, strict=False):
            stage = "" if name.startswith("skf_embed") else key.removeprefix("embed")
            found[f"embed_mse{stage}"] = losses[key] / weight
    expected = golden["losses" + suffix]
    assert found.keys() >= {k for k in expected if not k.startswith(("cwd", "embed_weighted"))}
    for key, value in found.items():
        assert value.item() == pytest.approx(expected[key], rel=1e-10 if suffix else 1e-5), key
    assert_gradients(name, distiller, golden["grad_l2" + suffix], dtype)
    if dtype == torch.float32:
        prefix, state = f"{name}/train/A/after/", published_state(name, distiller)
        after = {key.partition("#")[0] for key in arrays() if key.startswith(prefix)}
        assert after
        for key in after:
            assert_golden(key, state[key.removeprefix(prefix)])
        # BatchNorm over the two values of CSF's squeeze magnifies rounding.
        assert_outputs(f"{name}/train/A", distiller, tolerance=1e-4)


def assert_gradients(name: str, distiller: Distiller, expected: Any, dtype: torch.dtype) -> None:
    state = published_state(name, distiller)
    found = {key: p.grad for key, p in state.items() if isinstance(p, nn.Parameter)}
    assert found.keys() == expected.keys()
    # Ahead of a BatchNorm some gradients are zero in exact arithmetic and noise in ours.
    absolute, relative = (1e-12, 1e-9) if dtype == torch.float64 else (5e-6, 5e-3)
    for key, value in expected.items():
        gradient = found[key]
        if value is None:
            assert gradient is None or not gradient.norm(), key
        else:
            close = pytest.approx(value, rel=relative, abs=absolute)
            assert gradient is not None and gradient.norm().item() == close, key


@pytest.mark.parametrize(
    "name", [n for n in METHODS if "total_cwd_channel_T1" in load("train_golden.json").get(n, {})]
)
def test_other_feature_losses(name: str) -> None:
    golden = load("train_golden.json")[name]
    distiller = without_chance(seeded(name).train())
    distiller.feature_loss = FEATURE_LOSSES["CWloss"]
    total = sum(losses_of(name, distiller, torch.float32).values())
    assert total.item() == pytest.approx(golden["total_cwd_channel_T1"], rel=1e-5)
    total.backward()
    assert_gradients(name, distiller, golden["grad_l2_total_cwd_channel_T1"], torch.float32)
    fused = distiller.fusion(distiller.student(golden_input("A")).features)
    taught = teacher_output(METHODS[name].teacher, torch.float32).features
    for temperature in (1, 4):
        for loss, norm in DIVERGENCES:
            expected = golden["losses"][f"cwd_{norm}_T{temperature}"]
            total = sum(loss(s, t, temperature) for s, t in zip(fused, taught, strict=True))
            assert total.item() == pytest.approx(expected, rel=1e-5)


def test_losses_on_small_maps() -> None:
    """Maps so small that HCL leaves levels out, and both divergences at two temperatures."""
    golden = load("losses_golden.json")
    rng = np.random.default_rng(2)
    shapes = [(2, 8, 16, 32), (2, 12, 8, 16), (2, 16, 3, 6), (2, 20, 1, 2)]
    ours, theirs = (
        [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
        for _ in range(2)
    )
    hcl = FEATURE_LOSSES["hcl"]
    total = sum(hcl(s, t) for s, t in zip(ours, theirs, strict=True))
    assert total.item() == pytest.approx(golden["hcl"], rel=1e-5)
    for i, (s, t) in enumerate(zip(ours, theirs, strict=True)):
        assert hcl(s, t).item() == pytest.approx(golden[f"hcl_level{i}"], rel=1e-5)
        for temperature in (1, 4):
            for loss, norm in DIVERGENCES:
                expected = golden[f"cwd/{norm}/kl/T{temperature}/{i}"]
                assert loss(s, t, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_palette() -> None:
    assert CITYSCAPES.palette.tolist() == load("palette.json")["Colorize(20)"]


INITIAL = [  # a layer, and the deviation of its weights; None: as torch makes it
    ("segformer_b0", "patch_embed1.proj", (2 / (49 * 32)) ** 0.5),
    ("segformer_b0", "block3.0.attn.q", 0.02),
    ("segformer_b0", "block3.0.mlp.dwconv.dwconv", (2 / 9) ** 0.5),
    ("segformer_b0", "linear_fuse.conv", (2 / 256) ** 0.5),
    ("segformer_b0", "linear_c4.proj", None),
    ("pvt_v2_b0", "neck.fpn_convs.0.conv", (2 / (9 * 256)) ** 0.5),
    ("lvt", "backbone.0.1.0.attn.weight", (2 / (9 * 64)) ** 0.5),
    ("lvt", "backbone.1.1.0.attn.ds", (2 / 9) ** 0.5),
    ("lvt", "backbone.1.1.0.attn.sr", (2 / (16 * 64)) ** 0.5),
    ("lvt", "linear_c4.proj", 0.02),
    ("lvt", "backbone.0.0.proj", None),
    (CrossSelectiveFusion, "skfs.0.conv1.0", 256**-0.5),
    (CrossSelectiveFusion, "skfs.0.conv2.0", (9 * 64) ** -0.5),
    (CrossSelectiveFusion, "skfs.1.fcs.0", None),
    (GLMixer, "embed4_linearproject", None),
    (EmbeddingAssistant, "patch_embed4.proj", (2 / (9 * 512)) ** 0.5),
]


@pytest.mark.parametrize(("network", "layer", "deviation"), INITIAL)
def test_initialisation(network: Any, layer: str, deviation: float | None) -> None:
    """As published; torch's own start is uniform, of deviation 1 / sqrt(3 · fan_in)."""
    torch.manual_seed(0)
    module = create_model(network) if isinstance(network, str) else network(*WIDTHS)
    state = module.state_dict()
    weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
    expected = deviation or (3 * weight[0].numel()) ** -0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.07)
    assert bias is None or bias.any() == (deviation is None)


def test_scalars_start() -> None:
    """EA's as published, and GL-Mixer's two, where the published ones are what was in memory."""
    state = EmbeddingAssistant(*WIDTHS, mix=True).state_dict()
    scalars = [state[f"fuse_weights.{k}"].item() for k in range(8)]
    assert scalars == pytest.approx(np.arange(1, 9) / 10)
    assert state["atten_weight"] == state["conv_weight"] == 1


def test_stochastic_depth_and_dropout() -> None:
    """All of an image's tokens are dropped or none, at an unchanged mean; none in evaluation."""
    model = create_model("segformer_b0")
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(np.linspace(0, 0.1, 8))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.1]
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(2000, 3, 2)
    dropped = drop(x)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped[:, 0, 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_maps_of_odd_size_are_enlarged_as_published() -> None:
    """ACDC's 512×910 has such maps; ways of rounding differ there, and no golden input has them."""
    deeper = torch.rand(1, 64, 4, 29)
    expected = deeper[:, :, torch.arange(7) * 4 // 7][..., torch.arange(57) * 29 // 57]
    stage = SelectiveKernelFusion(4, 8)
    stage.fuse = lambda x, y: y
    _, fused = stage(torch.rand(1, 4, 7, 57), deeper)
    assert torch.equal(fused, expected)

    neck = FPN((64,) * 4, 64)
    neck.lateral_convs = neck.fpn_convs = nn.ModuleList(nn.Identity() for _ in range(4))
    zeros = torch.zeros(1, 64, 14, 114), torch.zeros(1, 64, 14, 114), torch.zeros(1, 64, 7, 57)
    assert torch.equal(neck((*zeros, deeper))[2], expected)

    head = FPNHead((1, 1, 1, 1), 1, dropout=0.0)
    head.scale_heads, head.classifier = neck.fpn_convs, nn.Identity()
    levels = [torch.zeros(1, 1, 1, 4), torch.tensor([[[[0.0, 1.0]]]]), *torch.zeros(2, 1, 1, 1, 1)]
    head.neck = nn.Identity()
    logits = head(levels)
    assert logits.flatten().tolist() == [0, 0.25, 0.75, 1]  # bilinear, corners not aligned


PAPER = """
    --dataset cityscapes --height 512 --flip --shift 2 --no-published-shift --scale 1 1 --crop None
    --normalisation none --loss-size quarter --class-weights published
    --lr 6e-5 --betas 0.9 0.999 --eps 1e-8 --weight-decay 0.01 --decay all --clip-grad None
    --schedule epoch --lr-decay-epochs 1500 --lr-power 1 --warmup-steps 0
    --validate-every 1 --no-keep-steps --precision fp32 --accumulate 1
    --drop-path-rate 0.1 --dropout 0.1
"""
STUDENT = "--student-model segformer_b0 --no-student-pretrained --student-weights None"
DISTILLED = f"""{STUDENT} --num-epochs 1000 --batch-size 2 --teacher-model None
    --embed 5 --embed-weights 0.1 0.1 0.5 1 --knowledge-distillation-loss hcl --lambda-cwd 1
    --review-kd-loss-weight 1 --temperature 1 --logits-weight 0
"""
TEACHER = "--num-epochs 1000 --batch-size 8 --teacher-model segformer_b2 --no-from-scratch"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (TransKDBase, DISTILLED),
        (TransKD_GLMixer, f"{DISTILLED} --no-add"),
        (TransKD_EA, DISTILLED),
        (student, f"{STUDENT} --num-epochs 500 --batch-size 4"),
        (teacher, f"{TEACHER} --teacher-weights None"),
    ],
)
def test_recipe(script: ModuleType, flags: str) -> None:
    words = ["--datadir", "data"]
    told = cli.parse(script.Options, [*words, *PAPER.split(), *flags.split()])
    assert cli.parse(script.Options, words) == told


@pytest.mark.parametrize(
    ("script", "name", "flags"),
    [
        (TransKDBase, "transkd_base_b0", {}),
        (TransKD_GLMixer, "transkd_gl_b0", {}),
        (TransKD_GLMixer, "transkd_gl_add_b0", {"add": True}),
        (TransKD_EA, "transkd_ea_b0", {}),
        (student, "mit_b0", {}),
        (teacher, "mit_b2", {}),
    ],
)
def test_scripts_build_the_published(script: Any, name: str, flags: Any, monkeypatch: Any) -> None:
    run = SimpleNamespace(classes=CITYSCAPES, class_weights=lambda: CITYSCAPES.weights)
    built: list[Any] = []
    monkeypatch.setattr(script, "start", lambda options: run)
    monkeypatch.setattr(script, "train", lambda distiller, *others: built.append(distiller))
    options = script.Options(data=DataOptions(datadir=Path()), **flags)
    if name in METHODS:
        network = create_model("segformer_b1")  # as wide as B2, and sooner made
        monkeypatch.setattr(script, "load_teacher", lambda *_: network)
        options.distillation.knowledge_distillation_loss = "KL"
        options.distillation.embed_weights = (1.0, 2.0, 3.0, 4.0)
    elif script is teacher:
        options.teacher.from_scratch = True
    script.main(options)
    (distiller,) = built
    published = load("manifest.json")[name]["state_dict"]
    assert published_state(name, distiller).keys() == published.keys()
    if name in METHODS:
        assert distiller.feature_loss.func is FEATURE_LOSSES["KL"]
        assert distiller.embed_weights == (1.0, 2.0, 3.0, 4.0)
    if script is TransKD_GLMixer:
        assert distiller.alignment.mixer.add == flags.get("add", False)
