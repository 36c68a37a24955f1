"""mmsegmentation's SegFormers in, ours out: compared with its network written out plainly, and with itself where it is.

It needs an environment of its own, where these tests run by `python -m pytest tests/test_mmsegmentation.py -n 0`:

    pip install torch==2.13.0 'numpy<2' 'setuptools<81' mmcv-lite==2.1.0 mmengine==0.10.7 mmsegmentation==1.2.2 \
        ftfy regex safetensors==0.8.0 tyro rich tensorboard pytest-xdist pytest-timeout
"""

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasets.classes import CITYSCAPES
from datasets.transforms import resize_image, to_float
from errors import UserError
from models import create_model, load_backbone, load_model, load_weights, save_model
from models.checkpoints import IMAGENET
from models.distillation import Distiller
from models.export import Options, main
from models.layouts.mmsegmentation import from_mmseg, to_mmseg
from models.segformer import CONFIGS
from tests.golden_data import seed
from train.TransKDBase import Options as TrainingOptions

State = dict[str, Tensor]
SIZES = [(2, 3, 64, 128), (1, 3, 65, 131)]


def shapes(name: str, width: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """What mmsegmentation's checkpoint of that network holds."""
    encoder, _ = CONFIGS[name]
    found: dict[str, tuple[int, ...]] = {}

    def add(module: str, *weight: int, bias: bool = True) -> None:
        found[f"{module}.weight"] = weight
        if bias:
            found[f"{module}.bias"] = weight[:1]

    for i, (c, depth, sr) in enumerate(
        zip(encoder.channels, encoder.depths, encoder.sr_ratios, strict=True)
    ):
        stage = f"backbone.layers.{i}"
        add(
            f"{stage}.0.projection",
            c,
            3 if i == 0 else encoder.channels[i - 1],
            *(7, 7) if i == 0 else (3, 3),
        )
        add(f"{stage}.0.norm", c)
        for block in (f"{stage}.1.{j}" for j in range(depth)):
            add(f"{block}.norm1", c)
            found |= {
                f"{block}.attn.attn.in_proj_weight": (3 * c, c),
                f"{block}.attn.attn.in_proj_bias": (3 * c,),
            }
            add(f"{block}.attn.attn.out_proj", c, c)
            if sr > 1:
                add(f"{block}.attn.sr", c, c, sr, sr)
                add(f"{block}.attn.norm", c)
            add(f"{block}.norm2", c)
            add(f"{block}.ffn.layers.0", 4 * c, c, 1, 1)
            add(f"{block}.ffn.layers.1", 4 * c, 1, 3, 3)
            add(f"{block}.ffn.layers.4", c, 4 * c, 1, 1)
        add(f"{stage}.2", c)
    add("decode_head.conv_seg", num_classes, width, 1, 1)
    inputs = {f"convs.{i}": c for i, c in enumerate(encoder.channels)} | {"fusion_conv": 4 * width}
    for module, channels in inputs.items():
        add(f"decode_head.{module}.conv", width, channels, 1, 1, bias=False)
        add(f"decode_head.{module}.bn", width)
        statistics = {"running_mean": (width,), "running_var": (width,), "num_batches_tracked": ()}
        found |= {f"decode_head.{module}.bn.{leaf}": shape for leaf, shape in statistics.items()}
    return found


def random_state(name: str, width: int, num_classes: int) -> State:
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for key, shape in shapes(name, width, num_classes).items():
        noise = torch.randn(shape, generator=generator) / math.sqrt(
            math.prod(shape[1:]) if len(shape) > 1 else 25
        )
        positive = key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight"))
        state[key] = torch.tensor(7) if not shape else 1 + noise.abs() if positive else noise
    return state


def plain_forward(state: State, images: Tensor, heads: tuple[int, ...] = (1, 2, 5, 8)) -> Tensor:
    """mmsegmentation's network, from its configuration's modules: images that are normalised -> logits."""

    def of(module: str) -> tuple[Tensor, Tensor | None]:
        return state[f"{module}.weight"], state.get(f"{module}.bias")

    def norm(x: Tensor, module: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *of(module), eps=1e-6)

    def conv_module(x: Tensor, module: str) -> Tensor:
        statistics = (
            state[f"{module}.bn.{leaf}"]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(F.conv2d(x, *of(f"{module}.conv")), *statistics, eps=1e-5))

    def attention(x: Tensor, x_map: Tensor, module: str, heads: int) -> Tensor:
        keys = x
        if f"{module}.sr.weight" in state:
            kernel = state[f"{module}.sr.weight"]
            keys = (
                F.conv2d(x_map, *of(f"{module}.sr"), stride=kernel.shape[-1])
                .flatten(2)
                .transpose(1, 2)
            )
            keys = norm(keys, f"{module}.norm")
        inner = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True).to(x.dtype)
        inner.load_state_dict(
            {k.split(".attn.attn.")[1]: v for k, v in state.items() if f"{module}.attn." in k}
        )
        return inner(x, keys, keys, need_weights=False)[0]

    maps, x = [], images
    for i in range(4):
        stage = f"backbone.layers.{i}"
        kernel, stride = (7, 4) if i == 0 else (3, 2)
        x = F.conv2d(x, *of(f"{stage}.0.projection"), stride=stride, padding=kernel // 2)
        h, w = x.shape[2:]
        tokens = norm(x.flatten(2).transpose(1, 2), f"{stage}.0.norm")
        blocks = sorted(
            {key.split(".")[4] for key in state if key.startswith(f"{stage}.1.")}, key=int
        )
        for block in (f"{stage}.1.{j}" for j in blocks):
            y = norm(tokens, f"{block}.norm1")
            tokens = tokens + attention(
                y, y.transpose(1, 2).unflatten(2, (h, w)), f"{block}.attn", heads[i]
            )
            y = norm(tokens, f"{block}.norm2").transpose(1, 2).unflatten(2, (h, w))
            y = F.conv2d(y, *of(f"{block}.ffn.layers.0"))
            y = F.gelu(F.conv2d(y, *of(f"{block}.ffn.layers.1"), padding=1, groups=y.shape[1]))
            tokens = tokens + F.conv2d(y, *of(f"{block}.ffn.layers.4")).flatten(2).transpose(1, 2)
        x = norm(tokens, f"{stage}.2").transpose(1, 2).unflatten(2, (h, w))
        maps.append(
            F.interpolate(
                conv_module(x, f"decode_head.convs.{i}"),
                (maps or [x])[0].shape[2:],
                mode="bilinear",
            )
        )
    return F.conv2d(
        conv_module(torch.cat(maps, 1), "decode_head.fusion_conv"), *of("decode_head.conv_seg")
    )


def with_their_eps(model: nn.Module) -> nn.Module:
    """Every LayerNorm of theirs has 1e-6; SegFormer's patch embeddings and reductions have 1e-5."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model


@torch.no_grad()
def difference(ours: nn.Module, theirs: Any, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Of the logits, relative to the largest; `theirs` takes normalised images."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    normalise = ours.normalisation or (lambda x: x)  # type: ignore[truthy-function]
    actual, expected = ours.to(dtype)(images).logits, theirs(normalise(images))
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def approximate(normalisation: Any) -> list[list[float]]:
    return [[round(value, 9) for value in values] for values in normalisation]


def assert_same(ours: nn.Module, state: State, double: float = 1e-12) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, double)):
        cast = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in state.items()
        }
        for shape in SIZES:
            assert (
                difference(
                    with_their_eps(ours), lambda x, s=cast: plain_forward(s, x), shape, dtype
                )
                < tolerance
            )


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, State]:
    """A SegFormer-B0 of theirs on Cityscapes, as their training saves it."""
    state, path = random_state("segformer_b0", 48, 19), tmp_path / "segformer_mit-b0.pth"
    torch.save({"meta": {"epoch": 3, "classes": ("road",)}, "state_dict": state}, path)
    return path, state


def test_theirs_in(foreign: tuple[Path, State], tmp_path: Path) -> None:
    path, state = foreign
    ours = load_model(path)
    assert (ours.name, ours.num_classes, ours.normalisation) == ("segformer_b0", 19, IMAGENET)
    save_model(ours, tmp_path / "w.safetensors")
    again = load_model(tmp_path / "w.safetensors")
    assert again.normalisation == IMAGENET
    images = torch.rand(SIZES[1])
    with torch.no_grad():
        assert torch.equal(again(images).logits, ours(images).logits)
    load_weights(again, path)
    teaching = TrainingOptions(datadir=tmp_path, teacher_weights=path, teacher_model="segformer_b0")
    distiller = Distiller(create_model("segformer_b0"), None, teacher=teaching.teacher(CITYSCAPES))
    assert torch.equal(
        distiller.teacher(images, logits=False).features[3], ours(images).features[3]
    )
    assert (
        difference(ours, lambda x: plain_forward(state, x), SIZES[0], torch.float32) < 1e-4
    )  # their eps left out
    assert_same(ours, state)


def test_training_normalises_over_the_resized_sum(foreign: tuple[Path, State]) -> None:
    """The fusion's matrix before the resize gives BatchNorm the very same input in training."""
    path, _ = foreign
    model = load_model(path).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    features = tuple(
        torch.randn(2, c, *hw, dtype=torch.float64)
        for c, hw in zip(model.channels, ((9, 7), (5, 4), (3, 2), (2, 1)), strict=True)
    )
    head = model.decode_head
    stages = [
        F.interpolate(conv(f), (9, 7), mode="bilinear")
        for conv, f in zip(head.convs, features, strict=True)
    ]
    expected = head.conv_seg(head.fusion_conv(torch.cat(stages, 1)))
    torch.testing.assert_close(model.decode(features), expected)


def test_their_encoders_start_ours(
    foreign: tuple[Path, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ImageNet encoder, and the encoder of a whole network."""
    path, state = foreign
    encoder = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    torch.save(encoder, tmp_path / "mit_b0.pth")
    features = []
    for file, normalisation in ((tmp_path / "mit_b0.pth", None), (path, IMAGENET)):
        model = create_model("segformer_b0").eval()
        head = model.linear_pred.weight.clone()
        assert load_backbone(model, file) is False
        assert model.normalisation == normalisation and torch.equal(model.linear_pred.weight, head)
        assert ("decode head in" in capsys.readouterr().err) == (file == path)
        features.append(model.encode(torch.ones(1, 3, 32, 32))[0][-1])
    assert torch.equal(*features)
    torch.testing.assert_close(
        features[0], load_model(path).encode(torch.ones(1, 3, 32, 32))[0][-1]
    )


def test_unfit_files_are_refused_by_name(foreign: tuple[Path, State], tmp_path: Path) -> None:
    path, state = foreign
    lost = "backbone.layers.2.1.1.ffn.layers.1.bias"
    torch.save(
        {k: v for k, v in state.items() if k != lost} | {"decode_head.extra": torch.zeros(1)},
        tmp_path / "w.pth",
    )
    with pytest.raises(
        UserError,
        match=r"missing: block3\.1\.mlp\.dwconv\.dwconv\.bias; 1 unknown: decode_head\.extra",
    ):
        load_model(tmp_path / "w.pth")
    damaged = {"backbone.layers.0.1.0.attn.attn.in_proj_bias": torch.tensor(1.0)}
    damaged |= {"backbone.layers.0.1.0.ffn.layers.0.weight": torch.zeros(128)}
    torch.save(state | damaged, tmp_path / "w.pth")
    with pytest.raises(
        UserError,
        match=r"1 unknown: block1\.0\.attn\.qkv\.bias; .* block1\.0\.mlp\.fc1\.weight \(128,\)",
    ):
        load_model(tmp_path / "w.pth")
    with pytest.raises(UserError, match="decode head is mmsegmentation's"):
        load_weights(create_model("segformer_b0", 19), path)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cfg", "data_preprocessor = dict(mean=[0.0, 255, 51.0], std=[\n    255, 255, 51,\n])"),
        (
            "config",
            "img_norm_cfg = {'mean': (0, 255.0, 51), 'std': (255, 255, 51), 'to_rgb': True}",
        ),
    ],
    ids=["1.x", "0.x"],
)
def test_their_configuration_is_honoured(
    key: str, text: str, foreign: tuple[Path, State], tmp_path: Path
) -> None:
    torch.save(
        {"meta": {key: f"reduction = 'mean'\n{text}"}, "state_dict": foreign[1]}, tmp_path / "w.pth"
    )
    assert load_model(tmp_path / "w.pth").normalisation == ((0.0, 1.0, 0.2), (1.0, 1.0, 0.2))


# Out ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("export")
    network = seed(create_model("segformer_b0")).eval()
    save_model(network, folder / "student.safetensors", dataset="ACDC")
    main(
        Options(
            weights=folder / "student.safetensors",
            format="mmseg",
            output=folder / "mmseg",
            height=64,
        )
    )
    return network, folder / "mmseg"


def test_ours_out(exported: tuple[nn.Module, Path]) -> None:
    network, folder = exported
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    state = content["state_dict"]
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes(
        "segformer_b0", 512, 20
    )
    assert content["meta"]["dataset_meta"]["classes"][-1] == "ignore"
    config: dict[str, Any] = {}
    exec((folder / "config.py").read_text(), config)
    model = config["model"]
    assert (model["decode_head"]["channels"], model["decode_head"]["num_classes"]) == (512, 20)
    assert (model["data_preprocessor"]["mean"], model["data_preprocessor"]["std"]) == (
        [0.0] * 3,
        [255.0] * 3,
    )
    assert load_model(folder).normalisation is None
    assert (
        difference(network, lambda x: plain_forward(state, x), SIZES[1], torch.float32) < 1e-4
    )  # their eps left out
    assert_same(
        seed(create_model("segformer_b0")).eval(), state, double=1e-7
    )  # 1 - eps is rounded in the file


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_every_size(name: str) -> None:
    """Ours out has exactly their keys and shapes, with the head twice as wide; and back, the encoder is as it was."""
    with torch.device("meta"):
        ours = create_model(name).state_dict()
    theirs = to_mmseg(ours)
    assert {key: tuple(value.shape) for key, value in theirs.items()} == shapes(
        name, 2 * CONFIGS[name][1], 20
    )
    back = from_mmseg(theirs)
    for key in ours.keys() | back.keys():
        assert key.startswith(("linear_", "decode_head.")) or ours[key].shape == back[key].shape, (
            key
        )


def test_theirs_out(foreign: tuple[Path, State], tmp_path: Path) -> None:
    """A network of theirs goes back as it came, with the normalisation that it expects."""
    path, state = foreign
    main(Options(weights=path, format="mmseg", output=tmp_path / "back"))
    back = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert approximate(load_model(tmp_path / "back").normalisation) == approximate(IMAGENET)
    with pytest.raises(UserError, match="can't hold"):
        main(Options(weights=path, format="hf", output=tmp_path / "hf"))


# The library itself ---------------------------------------------------------------------------------------------------


def import_mmseg() -> Any:
    """mmseg with a stand-in for mmcv's compiled operators, which SegFormer uses none of."""
    operators = types.ModuleType("mmcv.ops")

    def operator(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})

    operators.__getattr__ = operator  # type: ignore[method-assign]
    sys.modules.setdefault("mmcv.ops", operators)
    import mmseg.apis
    import mmseg.utils

    mmseg.utils.register_all_modules()
    return mmseg


try:
    mmseg = import_mmseg()
except ImportError as error:
    mmseg, MISSING = None, f"{error}; this file says what environment it takes"
needs_mmseg = pytest.mark.skipif(mmseg is None, reason=str(globals().get("MISSING")))


@needs_mmseg
@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2"])
def test_mmsegmentation_computes_what_we_load(name: str, tmp_path: Path) -> None:
    state = random_state(name, 256, 19)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "w.pth")
    folder = Path(mmseg.__file__).parent / ".mim" / "configs" / "segformer"
    config = mmseg.apis.inference.Config.fromfile(
        folder / f"segformer_mit-{name[-2:]}_8xb1-160k_cityscapes-1024x1024.py"
    )
    config.model.backbone.init_cfg = None
    config.model.decode_head.norm_cfg.type = "BN"
    theirs = mmseg.registry.MODELS.build(config.model).eval()
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == shapes(
        name, 256, 19
    )
    theirs.load_state_dict(state)
    ours = with_their_eps(load_model(tmp_path / "w.pth"))
    preprocessor = config.model.data_preprocessor
    expected = (
        [value / 255 for value in values] for values in (preprocessor.mean, preprocessor.std)
    )
    assert approximate(ours.normalisation) == approximate(expected)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for shape in SIZES:
            assert difference(ours, theirs.to(dtype), shape, dtype) < tolerance


@needs_mmseg
def test_mmsegmentation_loads_our_export(exported: tuple[nn.Module, Path]) -> None:
    """By its own commands: from the folder's configuration and checkpoint, from a photograph's pixels to classes."""
    network, folder = exported
    theirs = mmseg.apis.init_model(
        str(folder / "config.py"), str(folder / "checkpoint.pth"), device="cpu"
    )
    assert theirs.dataset_meta["classes"][0] == "road"
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 250, 3), np.uint8))
    found = mmseg.apis.inference_model(
        theirs, np.array(photograph)[..., ::-1].copy()
    )  # it reads BGR
    pixels = torch.from_numpy(np.array(resize_image(photograph, 64))).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = with_their_eps(network)(to_float(pixels)).logits
    for size in (pixels.shape[2:], (128, 250)):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        found.seg_logits.data, logits[0], rtol=1e-4, atol=1e-5 * logits.abs().max().item()
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-7)):
        for shape in SIZES:
            assert difference(network, theirs.to(dtype), shape, dtype) < tolerance
