"""Facts about the models: parameters, multiply-accumulates and, on demand, latency and memory on this machine.

    python -m models.info segformer_b0 segformer_b2 TransKD_EA --height 512 --width 1024 --measure

Three counts of multiply-accumulates (MACs) are given, because literature and profilers disagree:
    published   as in the paper's tables: the layers that the published code calls as modules. Attention's matrix
                products, GELU, sigmoid, softmax and resizes are functions there and count nothing.
    full        the same, and attention's two products.
    run here    the matrix products and convolutions that torch really executes for this project's modules, whose
                decode head works at each stage's own resolution.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cli
from cli import find_device
from errors import UserError
from models.distillation import (
    CrossSelectiveFusion,
    Distiller,
    EmbeddingAssistant,
    GLMixer,
    PatchEmbeddingAlignment,
)
from models.distillation.csf import SelectiveKernelFusion
from models.distillation.gl_mixer import SelfAttention
from models.factory import MODELS, create_model
from models.linear import Linear
from models.lvt import ConvolutionalSelfAttention, RecursiveAtrousSelfAttention
from models.pyramid import Attention
from models.segformer import CONFIGS, AllMLPHead

# The paper's methods: what aligns the embeddings beside CSF, between a SegFormer-B0 and a SegFormer-B2.
METHODS: dict[str, type[PatchEmbeddingAlignment]] = {
    "TransKDBase": PatchEmbeddingAlignment,
    "TransKD_GL": GLMixer,
    "TransKD_EA": EmbeddingAssistant,
}
MAX_SIDE = 2**16  # pixels; the counts of far more overflow
ATTENTION = "attention"  # kind of a count that the published convention leaves out


class Count(NamedTuple):
    """The multiply-accumulates of one call of a layer."""

    module: str  # its name in the network, "block1.0.attn.q"
    kind: str  # its type, "Linear"
    macs: int


def _convolution(layer: Any, x: Tensor, y: Tensor) -> int:
    return y.numel() * (layer.weight[0].numel() + (layer.bias is not None))


def _norm(layer: Any, x: Tensor, y: Tensor) -> int:
    return 2 * x.numel()


LAYERS: dict[
    type[nn.Module], Callable[[Any, Tensor, Tensor], int]
] = {  # layer, input, output -> MACs
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    **dict.fromkeys((nn.Linear, Linear), lambda layer, x, y: x.numel() * layer.out_features),
    nn.LayerNorm: _norm,
    nn.BatchNorm2d: _norm,
    nn.ReLU: lambda layer, x, y: y.numel(),
    nn.AvgPool2d: lambda layer, x, y: x.numel(),
    nn.Upsample: lambda layer, x, y: y.numel(),
}


def _all_mlp_head(model: AllMLPHead, features: tuple[Tensor, ...]) -> Iterator[Count]:
    """The head as the published code calls it: all stages resized to stride 4 and concatenated before they are fused.

    Ours computes the same from products of these weights and calls none of these layers, so no hook sees them.
    """
    for i, feature in enumerate(features, start=1):
        linear: nn.Linear = getattr(model, f"linear_c{i}").proj
        yield Count(f"linear_c{i}.proj", "Linear", LAYERS[Linear](linear, feature, feature))
    conv, bn = model.linear_fuse.conv, model.linear_fuse.bn
    batch, _, h, w = features[0].shape
    fused = torch.empty(batch, conv.out_channels, h, w, device="meta")
    for name, kind, layer in (
        ("conv", nn.Conv2d, conv),
        ("bn", nn.BatchNorm2d, bn),
        ("activate", nn.ReLU, None),
    ):
        yield Count(f"linear_fuse.{name}", kind.__name__, LAYERS[kind](layer, fused, fused))
    logits = torch.empty(batch, model.num_classes, h, w, device="meta")
    yield Count("linear_pred", "Conv2d", _convolution(model.linear_pred, fused, logits))


def _counts(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Iterator[Count]:
    """What one call of a module costs by itself; the modules inside it count for themselves."""
    if rule := LAYERS.get(type(module)):
        yield Count("", type(module).__name__, rule(module, inputs[0], output))
    elif isinstance(module, AllMLPHead) and output.logits is not None:
        yield from _all_mlp_head(module, output.features)
    elif isinstance(module, SelectiveKernelFusion) and inputs[1] is not None:
        yield Count("pool", "AdaptiveAvgPool2d", output[1].numel())
    elif isinstance(module, Attention | RecursiveAtrousSelfAttention):
        x, h, w = inputs
        reduced = (h // module.sr_ratio) * (
            w // module.sr_ratio
        )  # tokens that give keys and values
        times = getattr(module, "RECURSIONS", 1)
        yield Count(
            "", ATTENTION, times * 2 * x.numel() * reduced
        )  # query · key, then weights · value
    elif isinstance(module, ConvolutionalSelfAttention):
        x, h, w = inputs
        windows = len(x) * math.ceil(h / module.STRIDE) * math.ceil(w / module.STRIDE)
        yield Count("", ATTENTION, windows * module.KERNEL**4 * x.shape[2])  # weights · value
    elif isinstance(module, SelfAttention):
        yield Count("", ATTENTION, 2 * inputs[0].numel() * inputs[0].shape[1])


def count_macs(module: nn.Module, images: Tensor) -> list[Count]:
    """Every counted layer call of one forward pass, attention's products among them as kind "attention".

    A distiller's pass is its student's and that of its distillation modules, without the teacher.

    Args:
        module: a model or a distiller in eval mode; on the meta device nothing is computed or allocated.
        images: (B, 3, H, W), on the module's device.
    """
    counts: list[Count] = []

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for count in _counts(module, inputs, output):
            counts.append(count._replace(module=".".join(filter(None, (name, count.module)))))

    handles = [m.register_forward_hook(partial(hook, name)) for name, m in module.named_modules()]
    try:
        forward(module, images)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def published_macs(counts: Iterable[Count]) -> int:
    """Their sum as the paper's tables have it."""
    return sum(count.macs for count in counts if count.kind != ATTENTION)


def full_macs(counts: Iterable[Count]) -> int:
    """Their sum, attention's matrix products included."""
    return sum(count.macs for count in counts)


def executed_macs(module: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of the matrix products and convolutions of one forward pass, on the meta device."""
    with FlopCounterMode(display=False) as counter:
        forward(module, images)
    return counter.get_total_flops() // 2


@torch.no_grad()
def forward(module: nn.Module, images: Tensor) -> None:
    """One pass; for a distiller the student's and its distillation modules'."""
    if not isinstance(module, Distiller):
        module(images)
        return
    student = module.student(images)
    if module.fusion is not None:
        module.fusion(student.features)
    if module.alignment is not None:
        module.alignment(images, student)


def build(name: str) -> nn.Module:
    """A model by its name, or a method's SegFormer-B0 student with its distillation modules; eval mode.

    Raises:
        UserError: no such name.
    """
    if name not in METHODS and name not in MODELS:
        raise UserError(
            f"no model or published method is called {name!r}; choose from {', '.join((*MODELS, *METHODS))}"
        )
    if name in MODELS:
        return create_model(name).eval()
    student = create_model("segformer_b0")
    channels = student.channels, CONFIGS["segformer_b2"][0].channels
    distiller = Distiller(
        student, None, fusion=CrossSelectiveFusion(*channels), alignment=METHODS[name](*channels)
    )
    return distiller.eval()


def measure(
    name: str, height: int, width: int, device: torch.device, repeats: int = 5
) -> tuple[float, float | None]:
    """Median seconds of a forward pass of one image, and the most bytes that weights and passes took together.

    Bytes are torch's on a GPU and the growth of the resident memory on a CPU, there right only in a process that
    has computed nothing yet; None where the system does not tell.
    """
    before = _peak_memory(device)
    module = build(name).to(device)
    images = torch.rand(1, 3, height, width, device=device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        forward(module, images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    after = _peak_memory(device)
    growth = None if before is None or after is None else after - before
    return statistics.median(times[1:]), growth  # the first pass warms up


def _peak_memory(device: torch.device) -> int | None:
    """Bytes, the highest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM")


def resident_memory(key: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Bytes of this process: VmRSS now, VmHWM the highest so far; None but on Linux."""
    # Not getrusage: on Linux its peak is inherited from the process that started this one.
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


@dataclass
class Options:
    """Parameters and multiply-accumulates of models and of the methods' training-time students."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (*MODELS, *METHODS)
    """Models (segformer_b0 …), or TransKDBase, TransKD_GL, TransKD_EA: a B0 student with its distillation modules."""
    height: int = 512
    """Height of the image."""
    width: int = 1024
    """Width of the image."""
    measure: bool = False
    """Also run each on this machine: median latency and peak memory of a forward pass of one image."""
    device: str = "auto"
    """Where --measure runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""


def table(options: Options) -> Table:
    """One row a name.

    Raises:
        UserError: an unknown name, an image too small or too large, no such device, or one that is not needed.
    """
    if min(options.height, options.width) < 32:
        raise UserError(
            f"{options.height}×{options.width} is too small: the networks go down to a 32nd; 32 is the least"
        )
    if max(options.height, options.width) > MAX_SIDE:
        raise UserError(
            f"{options.height}×{options.width} is too large; {MAX_SIDE} a side is the most"
        )
    if options.device != "auto" and not options.measure:
        raise UserError(
            f"--device {options.device} says where --measure runs; add that, or leave it out"
        )
    device = find_device(options.device)
    size = options.height, options.width
    result = Table(title=f"one image of {size[0]}×{size[1]}")
    result.add_column("model", no_wrap=True)
    columns = ["parameters", "GMACs\npublished", "GMACs\nfull", "GMACs\nrun here"]
    for column in columns + ([f"ms\n{device}", "MiB\npeak"] if options.measure else []):
        result.add_column(column, justify="right", no_wrap=True)
    for name in options.names:
        with torch.device("meta"):
            module, images = build(name), torch.empty(1, 3, *size)
        counts = count_macs(module, images)
        macs = published_macs(counts), full_macs(counts), executed_macs(module, images)
        row = [
            name,
            f"{sum(p.numel() for p in module.parameters()):,}",
            *(f"{m / 1e9:.2f}" for m in macs),
        ]
        if options.measure:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                seconds, memory = fresh.submit(measure, name, *size, device).result()
            row += [f"{1000 * seconds:.1f}", "–" if memory is None else f"{memory / 2**20:.0f}"]
        result.add_row(*row)
    return result


def main(options: Options) -> None:
    Console().print(table(options))
    if any(name in METHODS for name in options.names):
        print(
            "A method's row counts its distillation modules; what is deployed is the bare student, segformer_b0."
        )


if __name__ == "__main__":
    cli.run(main, Options)
