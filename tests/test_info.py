"""Parameters and multiply-accumulates against the published ones, and the command that prints them."""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import cli
from models import create_model
from models.distillation import Distiller
from models.info import (
    ATTENTION,
    METHODS,
    Count,
    Options,
    build,
    count_macs,
    executed_macs,
    forward,
    full_macs,
    main,
    published_macs,
)
from tests.conftest import Command
from tests.golden_data import METHODS as GOLDEN_METHODS
from tests.golden_data import PLAIN, Method, load, published_key

PAPER = {  # parameters, GFLOPs as the paper's tables round them
    "segformer_b2": (27_362_004, "113.84"),
    "segformer_b0": (3_719_284, "13.67"),
    "TransKDBase": (4_563_124, "16.47"),
    "TransKD_GL": (5_219_254, "16.80"),
    "TransKD_EA": (5_534_076, "17.84"),
}


def cityscapes() -> torch.Tensor:
    return torch.empty(1, 3, 512, 1024, device="meta")


def summed(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for key, macs in counts:
        total[key] += macs
    return dict(total)


def distiller(method: Method) -> Distiller:
    student, teacher = create_model(method.student), create_model(method.teacher)
    channels = student.channels, teacher.channels
    alignment = method.alignment and method.alignment(*channels)
    return Distiller(student, None, fusion=method.fusion(*channels), alignment=alignment).eval()


def top_module(count: Count, method: bool) -> str:
    """The golden names: the student's modules in a distiller count one by one, like the distillation modules."""
    parts = published_key(count.module).split(".")
    return ".".join(parts[:2]) if method and parts[0] == "student" else parts[0]


@pytest.mark.parametrize("name", [*PLAIN, *GOLDEN_METHODS])
def test_macs_are_the_published_ones_layer_by_layer(name: str) -> None:
    golden = load("gflops.json")[name]
    method = name in GOLDEN_METHODS
    with torch.device("meta"):
        module = distiller(GOLDEN_METHODS[name]) if method else build(PLAIN[name])
    counts = [count for count in count_macs(module, cityscapes()) if count.kind != ATTENTION]
    assert published_macs(counts) == golden["macs_total"]
    assert summed((c.kind, c.macs) for c in counts) == golden["by_type"]
    assert summed((top_module(c, method), c.macs) for c in counts) == golden["by_top_module"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name: str) -> None:
    with torch.device("meta"):
        module = build(name)
    parameters, gflops = PAPER[name]
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert f"{published_macs(count_macs(module, cityscapes())) / 1e9:.2f}" == gflops


class AttentionProducts(TorchFunctionMode):
    """Counts the two products of every attention that runs, from the tensors it is given."""

    macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args
            self.macs += query.numel() * key.shape[-2] + query[..., 0].numel() * value[0, 0].numel()
        elif func is torch.Tensor.matmul and args[0].dim() == 5:  # LVT's scores · values
            self.macs += args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2", "pvt_v2_b0", "lvt", *METHODS])
@pytest.mark.parametrize("size", [(512, 1024), (65, 131)])
def test_full_macs_add_the_attention_products(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        module, images = build(name), torch.empty(1, 3, *size)
    counts = count_macs(module, images)
    with AttentionProducts() as products:
        forward(module, images)
    assert products.macs > 0
    assert full_macs(counts) - published_macs(counts) == products.macs


def test_counts_agree_with_what_torch_executes() -> None:
    """Every product and convolution, biases aside, and without the head, which we compute another way."""
    with torch.device("meta"):
        model, images = build("segformer_b2"), torch.empty(2, 3, 96, 160)
    model.decode = lambda features: None
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = None
    counted = sum(
        c.macs for c in count_macs(model, images) if c.kind in ("Conv2d", "Linear", ATTENTION)
    )
    assert counted == executed_macs(model, images)


def test_hooks_are_removed_and_weights_left_alone() -> None:
    model = build("segformer_b0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, torch.rand(1, 3, 64, 64))
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_command_prints_and_measures(command: Command) -> None:
    done = command(
        "-m", "models.info", "TransKD_EA", "--height", "64", "--width", "128", "--measure"
    )
    assert done.returncode == 0, done.stderr
    (row,) = (
        line.strip("│").split("│") for line in done.stdout.splitlines() if line.startswith("│")
    )
    name, parameters, published, full, here, milliseconds, mebibytes = (
        cell.strip() for cell in row
    )
    assert (name, parameters) == ("TransKD_EA", "5,534,076")
    assert 0 < float(here) < float(published) <= float(full)
    assert float(milliseconds) > 0
    assert mebibytes == "–" or float(mebibytes) > 4 * 5_534_076 / 2**20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["segformer_b9"], "segformer_b9"),
        (["segformer_b0", "--height", "16"], "too small"),
        (["segformer_b0", "--width", "65537"], "too large"),
        (["segformer_b0", "--device", "cpu"], "where --measure runs"),
        (["segformer_b0", "--measure", "--device", "abacus"], "--device abacus"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["info.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, Options)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
