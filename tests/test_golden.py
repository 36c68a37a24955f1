"""Every model and every method gives the numbers of the published code."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasets import Augmentation
from datasets.classes import CITYSCAPES
from datasets.transforms import resize_image, to_float
from models import SegmentationOutput, create_model
from models.distillation import CrossSelectiveFusion, Distiller, EmbeddingAssistant, GLMixer
from models.distillation.csf import StageFusion
from models.distillation.losses import (
    FEATURE_LOSSES,
    channel_wise_divergence,
    pixel_wise_divergence,
)
from models.pvtv2 import FPN, FPNHead
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
from train import TransKD_EA, TransKD_GLMixer, TransKDBase, student, teacher
from train.engine import start
from train.options import DistillationOptions

WIDTHS = (32, 64, 160, 256), (64, 128, 320, 512)  # of the student's stages, and of the teacher's
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
    assert {published_key(k): list(v.shape) for k, v in model.state_dict().items()} == manifest[
        "state_dict"
    ]
    assert sum(p.numel() for p in model.parameters()) == manifest["total_params"]


@pytest.mark.parametrize("name", PLAIN)
def test_outputs(name: str) -> None:
    model = seed(create_model(PLAIN[name])).eval()
    inputs = [i for i in INPUTS if f"{name}/eval/{i}/logits#stats" in arrays()]
    assert inputs
    for i in inputs:
        with torch.no_grad():
            out = model(golden_input(i))
        assert_outputs(f"{name}/eval/{i}", out)


def assert_outputs(prefix: str, out: SegmentationOutput) -> None:
    assert_golden(f"{prefix}/logits", out.logits)
    for k in range(4):
        assert_golden(f"{prefix}/feat{k + 1}", out.features[k])
        assert_golden(f"{prefix}/embed{k + 1}", out.embeddings[k])


@pytest.mark.parametrize(("name", "i"), [(name, i) for name in METHODS for i in "AB"])
def test_distillation_modules_in_evaluation(name: str, i: str) -> None:
    """A has two images, B one: both of CSF's squeezes."""
    distiller = build(name).eval()
    images = golden_input(i)
    with torch.no_grad():
        student = distiller.student(images)
        check_distiller(f"{name}/eval/{i}", distiller, images, student)


def check_distiller(
    prefix: str,
    distiller: nn.Module,
    images: Tensor,
    student: SegmentationOutput,
    tolerance: float = 3e-5,
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
        assert_outputs(f"{name}/train/A", student)
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
        terms[
            "embed_mse" if name.startswith("skf_embed") else key.replace("embed", "embed_mse")
        ] = value / weight
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


@pytest.mark.parametrize(
    "name", [n for n in METHODS if "total_cwd_channel_T1" in load("train_golden.json").get(n, {})]
)
def test_other_feature_losses(name: str) -> None:
    golden = load("train_golden.json")[name]
    maps = []

    def feature_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        maps[:] = student, teacher
        return channel_wise_divergence(student, teacher)

    distiller = without_randomness(build(name, feature_loss=feature_loss)).train()
    total = sum(distiller(golden_input("A"), golden_labels()).values())
    assert total.item() == pytest.approx(golden["total_cwd_channel_T1"], rel=1e-5)
    total.backward()
    assert_gradients(distiller, golden["grad_l2_total_cwd_channel_T1"], name, torch.float32)
    for temperature in (1, 4):
        for loss, norm in (
            (channel_wise_divergence, "channel"),
            (pixel_wise_divergence, "spatial"),
        ):
            expected = golden["losses"][f"cwd_{norm}_T{temperature}"]
            assert loss(*maps, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_losses_on_small_maps() -> None:
    """Maps so small that HCL leaves levels out, and both divergences at two temperatures."""
    golden = load("losses_golden.json")
    rng = np.random.default_rng(2)
    shapes = [(2, 8, 16, 32), (2, 12, 8, 16), (2, 16, 3, 6), (2, 20, 1, 2)]
    student, teacher = (
        [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
        for _ in range(2)
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


TORCHS = (
    None  # a layer starts as torch makes it: uniform, deviation 1 / sqrt(3 · fan_in), the bias too
)


@pytest.mark.parametrize(
    ("make", "deviations"),
    [
        (
            partial(create_model, "segformer_b0"),
            {
                "patch_embed1.proj": (2 / (49 * 32)) ** 0.5,
                "block3.0.attn.q": 0.02,
                "block3.0.attn.sr": (2 / (4 * 160)) ** 0.5,
                "block3.0.mlp.dwconv.dwconv": (2 / 9) ** 0.5,
                "linear_c4.proj": TORCHS,
                "linear_fuse.conv": (2 / 256) ** 0.5,
                "linear_pred": TORCHS,
            },
        ),
        (
            partial(create_model, "pvt_v2_b0"),
            {
                "backbone.block1.0.mlp.fc1": 0.02,
                "neck.fpn_convs.0.conv": (2 / (9 * 256)) ** 0.5,
                "neck.lateral_convs.0.conv": (2 / 256) ** 0.5,
                "head.scale_heads.3.4.conv": (2 / (9 * 128)) ** 0.5,
                "head.conv_seg": TORCHS,
            },
        ),
        (
            partial(create_model, "lvt"),
            {
                "backbone.0.0.proj": TORCHS,
                "backbone.0.1.0.attn.attn": 0.02,
                "backbone.0.1.0.attn.weight": (2 / (9 * 64)) ** 0.5,
                "backbone.1.1.0.attn.ds": (2 / 9) ** 0.5,
                "backbone.1.1.0.attn.sr": (2 / (16 * 64)) ** 0.5,
                "backbone.1.1.0.mlp.fc1": TORCHS,
                "backbone.1.1.0.mlp.depconv": TORCHS,
                "linear_c4.proj": 0.02,
                "linear_fuse.conv": (2 / 256) ** 0.5,
                "linear_pred": TORCHS,
            },
        ),
        (
            partial(CrossSelectiveFusion, *WIDTHS),
            {
                "skfs.0.conv1.0": 256**-0.5,
                "skfs.0.conv2.0": (9 * 64) ** -0.5,
                "skfs.1.fc.0": TORCHS,
                "skfs.1.fc1.0": TORCHS,
                "skfs.1.fcs.0": TORCHS,
            },
        ),
        (
            partial(GLMixer, *WIDTHS),
            {
                "embed4_linearproject": TORCHS,
                "attn4.qkv": TORCHS,
                "attn4.proj": TORCHS,
                "conv1": TORCHS,
            },
        ),
        (
            partial(EmbeddingAssistant, *WIDTHS),
            {
                "embed4_linearproject": TORCHS,
                "patch_embed1.proj": (2 / (49 * 64)) ** 0.5,
                "patch_embed4.proj": (2 / (9 * 512)) ** 0.5,
            },
        ),
    ],
    ids=["segformer", "pvt_v2", "lvt", "csf", "gl_mixer", "ea"],
)
def test_initialisation(make: Callable[[], nn.Module], deviations: dict[str, float | None]) -> None:
    torch.manual_seed(0)
    module = make()
    state = module.state_dict()
    for layer, deviation in deviations.items():
        weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
        expected = deviation or (3 * weight[0].numel()) ** -0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.07), layer
        assert bias is None or bias.any() == (deviation is TORCHS), layer
    for layer, norm in module.named_modules():
        if isinstance(norm, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (norm.weight == 1).all() and not norm.bias.any(), layer


def test_scalars_start_as_published() -> None:
    scalars = [w.item() for w in EmbeddingAssistant(*WIDTHS).fuse_weights]
    assert scalars == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    mixer = GLMixer(*WIDTHS)  # the published ones are what was in memory
    assert mixer.atten_weight.item() == mixer.conv_weight.item() == 1


@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2", "pvt_v2_b0"])
def test_stochastic_depth_and_dropout(name: str) -> None:
    model = create_model(name)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(np.linspace(0, 0.1, len(rates)))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.1]


def test_a_dropped_path_is_an_image_s() -> None:
    """All of an image's tokens or none, at an unchanged mean; nothing is dropped in evaluation."""
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(2000, 3, 2)
    dropped = drop(x)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped[:, 0, 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_maps_of_odd_size_are_enlarged_as_published() -> None:
    """As ACDC's 512×910 has them: there the ways of rounding differ. CSF's and FPN's measured inputs are not so."""
    deeper = torch.rand(1, 8, 4, 29)
    expected = deeper[:, :, torch.arange(7) * 4 // 7][..., torch.arange(57) * 29 // 57]

    class Deeper(StageFusion):
        def add_gates(self, mid: int) -> None: ...

        def fuse(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    _, fused = Deeper(4, 8, mid=8)(torch.rand(1, 4, 7, 57), deeper)
    assert torch.equal(fused, expected)

    neck = FPN((8, 8, 8, 8), 8)
    neck.lateral_convs = neck.fpn_convs = nn.ModuleList(nn.Identity() for _ in range(4))
    zeros = torch.zeros(1, 8, 14, 114), torch.zeros(1, 8, 14, 114), torch.zeros(1, 8, 7, 57)
    assert torch.equal(neck((*zeros, deeper))[2], expected)

    head = FPNHead(1, 1, 1, dropout=0.0)
    head.scale_heads, head.conv_seg = neck.fpn_convs, nn.Identity()
    levels = [torch.zeros(1, 1, 1, 4), torch.tensor([[[[0.0, 1.0]]]]), *torch.zeros(2, 1, 1, 1, 1)]
    assert head(levels).flatten().tolist() == [0, 0.25, 0.75, 1]  # bilinear, corners not aligned


def test_images_are_resized_bilinearly_and_go_from_0_to_1() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    resized = torch.tensor(np.asarray(resize_image(Image.fromarray(pixels), 64)))
    image = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    expected = F.interpolate(image, (64, 128), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert (resized - expected).abs().max() <= 1
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0, 0.2, 1]
    )


def test_what_is_trained_on_is_moved_and_what_is_scored_is_not(
    scenes: Path, tmp_path: Path
) -> None:
    common = {"datadir": scenes, "height": 64, "cache": False, "device": "cpu"}
    for i, flags in enumerate(({}, {"flip": False, "shift": 1}, {"published_shift": True})):
        setup = start(student.Options(**common, **flags, output_dir=tmp_path / str(i)))
        assert setup.train_set.augment == Augmentation(
            **({"flip": True, "shift": 2, "seed": 0} | flags)
        )
        assert setup.val_set.augment is None


def test_recipe() -> None:
    """What the scripts do without being told otherwise."""
    data = {
        "dataset": "cityscapes",
        "height": 512,
        "flip": True,
        "shift": 2,
        "published_shift": False,
    }
    data |= {
        "scale": (1.0, 1.0),
        "crop": None,
        "jitter": 0.0,
        "normalisation": "none",
        "loss_size": "quarter",
    }
    adam = {
        "lr": 6e-5,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "decay": "all",
        "ema": 0.0,
    }
    schedule = {
        "schedule": "epoch",
        "lr_decay_epochs": 1500,
        "lr_power": 1.0,
        "warmup_steps": 0,
        "validate_every": 1,
    }
    network = {
        "drop_path_rate": 0.1,
        "dropout": 0.1,
        "precision": "fp32",
        "accumulate": 1,
        "keep_steps": False,
    }
    common = data | adam | schedule | network
    start = {"student_model": "segformer_b0", "student_pretrained": False, "student_weights": None}
    distilled = (
        common
        | start
        | {"num_epochs": 1000, "batch_size": 2, "teacher_model": "segformer_b2", "embed": 5}
    )
    distilled |= {
        "embed_weights": (0.1, 0.1, 0.5, 1.0),
        "knowledge_distillation_loss": "hcl",
        "lambda_cwd": 1.0,
    }
    distilled |= {"review_kd_loss_weight": 1.0, "temperature": 1.0, "logits_weight": 0.0}
    for script, expected in (
        (TransKDBase, distilled),
        (TransKD_GLMixer, distilled | {"add": False}),
        (TransKD_EA, distilled),
        (student, common | start | {"num_epochs": 500, "batch_size": 4}),
        (
            teacher,
            common
            | {"num_epochs": 1000, "batch_size": 8, "from_scratch": False, "teacher_weights": None},
        ),
    ):
        options = vars(script.Options(datadir=Path()))
        assert {name: options[name] for name in expected} == expected, script.__name__
    for stage in range(1, 5):
        options = TransKDBase.Options(datadir=Path(), embed=stage)
        assert (options.stages, options.losses()["embed_weights"]) == ((stage,), (1.0,))


@pytest.mark.parametrize(
    ("script", "name", "flags"),
    [
        (TransKDBase, "transkd_base_b0", {}),
        (TransKD_GLMixer, "transkd_gl_b0", {}),
        (TransKD_GLMixer, "transkd_gl_add_b0", {"add": True}),
        (TransKD_EA, "transkd_ea_b0", {}),
        (student, "mit_b0", {}),
        (teacher, "mit_b2", {"from_scratch": True}),
    ],
)
def test_scripts_train_what_is_published(
    script: ModuleType, name: str, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each builds the published modules with the recipe's weights and rates, and its flags reach them."""

    def built(**options: object) -> Distiller:
        distillers: list[Distiller] = []
        monkeypatch.setattr(script, "start", lambda options: SimpleNamespace(classes=CITYSCAPES))
        monkeypatch.setattr(
            script, "train", lambda distiller, setup, options: distillers.append(distiller)
        )
        script.main(script.Options(datadir=Path(), **flags, **options))
        return distillers[0]

    network = create_model("segformer_b1")  # as wide as B2, and sooner made
    monkeypatch.setattr(DistillationOptions, "teacher", lambda options, classes: network)
    distiller = built()
    keys = {
        published_key(k) if name in METHODS else k.removeprefix("student.")
        for k in distiller.state_dict()
    }
    assert keys == load("manifest.json")[name]["state_dict"].keys()
    assert distiller.class_weights.tolist() == pytest.approx(CITYSCAPES.weights)
    rates = [m.drop_prob for m in distiller.student.modules() if isinstance(m, DropPath)]
    assert (rates[0], rates[-1], distiller.student.dropout.p) == (0, pytest.approx(0.1), 0.1)
    assert getattr(distiller.alignment, "add", False) == flags.get("add", False)
    if name in METHODS:
        assert distiller.feature_loss is FEATURE_LOSSES["hcl"] and distiller.feature_weight == 1
        assert distiller.embed_weights == (0.1, 0.1, 0.5, 1.0)
        other = built(
            embed=4,
            knowledge_distillation_loss="KL",
            lambda_cwd=2.0,
            drop_path_rate=0.2,
            dropout=0.3,
        )
        assert (other.feature_loss_name, other.feature_weight, other.embed_weights) == (
            "KL",
            2.0,
            (1.0,),
        )
        assert other.alignment is not None and other.alignment.stages == (4,)
        assert other.student.dropout.p == 0.3
