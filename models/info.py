"""Facts about models: parameters, multiply-accumulates (MACs), and on demand latency and memory.

    python -m models.info segformer_b0 segformer_b2 TransKD_EA --height 512 --width 1024
    python -m models.info segformer_b0 outputs/student.onnx --measure --batch-size 8

Two counts of MACs are given, because literature and profilers disagree:
    published   as in the paper's tables: the layers that the published code calls as modules.
                Attention's matrix products, GELU, sigmoid, softmax and resizes are functions
                there and count nothing.
    executed    the matrix products and convolutions that torch really runs for this project's
                modules, whose decode head works at each stage's own resolution.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import cli
from datasets.transforms import require_height
from errors import UserError
from models.distillation import Distiller, TransKD
from models.distillation.methods import METHODS, PUBLISHED
from models.factory import MODELS, create_model
from models.onnx_file import OnnxModel
from models.segformer import CONFIGS, AllMLPHead


def macs_of(layer: Any, x: Tensor, y: Tensor) -> int:
    """MACs of a layer's call with input x and output y, as the paper counts them."""
    match layer:
        case nn.Conv1d() | nn.Conv2d():  # the bias counts one
            return y.numel() * (layer.weight[0].numel() + (layer.bias is not None))
        case nn.Linear():  # here it doesn't
            return x.numel() * layer.out_features
        case nn.LayerNorm() | nn.BatchNorm2d():
            return 2 * x.numel()
        case nn.AvgPool2d() | nn.AdaptiveAvgPool2d():
            return x.numel()
        case nn.ReLU() | nn.Upsample():
            return y.numel()
    return 0


def count_macs(module: nn.Module, images: Tensor) -> Counter[str]:
    """MACs of every layer by its name, in one pass whose head runs as in the published code.

    `module` is a model or a distiller in eval mode; on the meta device nothing is computed. A
    distiller's pass is its student's and that of its distillation modules.
    """
    counts: Counter[str] = Counter()

    def count(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts[name] += macs_of(layer, inputs[0], output)

    module = copy.deepcopy(module)  # which gets hooks, and the head as the paper has it
    for name, layer in module.named_modules():
        if isinstance(layer, AllMLPHead):
            layer.forward = layer.plain  # type: ignore[method-assign]
        elif not [*layer.children()]:
            layer.register_forward_hook(partial(count, name))
    forward(module, images)
    return counts


def executed_macs(module: nn.Module, images: Tensor, **arguments: Any) -> int:
    """MACs of the matrix products and convolutions of `forward(module, images, **arguments)`."""
    with FlopCounterMode(display=False) as counter:
        forward(module, images, **arguments)
    return counter.get_total_flops() // 2


@torch.no_grad()
def forward(module: nn.Module, images: Tensor, **arguments: Any) -> None:
    """One pass; for a distiller the student's and its distillation modules'."""
    if not isinstance(module, Distiller):
        module(images, **arguments)
        return
    student = module.student(images)
    if isinstance(module, TransKD) and module.fusion is not None:
        module.fusion(student.features)
    if isinstance(module, TransKD) and module.alignment is not None:
        module.alignment(images, student)


def build(name: str) -> nn.Module:
    """A model by its name, or one of the paper's methods with a SegFormer-B0 student; eval mode.

    Raises UserError if there is no such name.
    """
    if name not in PUBLISHED:
        return create_model(name).eval()
    teacher_channels = CONFIGS["segformer_b2"].channels
    return METHODS[PUBLISHED[name]].build(create_model("segformer_b0"), teacher_channels).eval()


def parameters(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


@dataclass
class Options:
    """Parameters and multiply-accumulates of models and of the methods' training-time students."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (*MODELS, *PUBLISHED)
    """Models (segformer_b0 …); TransKDBase, TransKD_GL, TransKD_EA: a B0 student with its
    distillation modules; with --measure also .onnx files."""
    height: int = 512
    """Of the images, in pixels."""
    width: int = 1024
    """Of the images, in pixels."""
    measure: bool = False
    """Also run each on this machine: median latency, images a second, peak memory."""
    batch_size: int = 1
    """Images at once for --measure."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What --measure computes in."""
    compile: bool = False
    """Compile for --measure."""
    device: str = "auto"
    """Where --measure runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""


def measure(name: str, options: Options) -> list[str]:
    """Cells: median milliseconds of a forward pass, images a second, peak MiB of a GPU's memory."""
    device = cli.find_device("cpu" if name.endswith(".onnx") else options.device)
    images = torch.rand(options.batch_size, 3, options.height, options.width, device=device)
    network = OnnxModel(Path(name)) if name.endswith(".onnx") else build(name).to(device)
    if options.compile:
        network.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        forward(network, images)  # compiles, and warms up
        run = {"run": partial(forward, network, images)}
        timer = Timer("run()", globals=run, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=1).median
    memory = "–"
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f}"
    return [f"{1000 * seconds:.1f}", f"{options.batch_size / seconds:.1f}", memory]


def main(options: Options) -> None:
    require_height(min(options.height, options.width))
    rows = [["model", "parameters", "GMACs published", "GMACs executed"]]
    if options.measure:
        rows[0] += ["ms", "images/s", "MiB peak"]
    for name in options.names:
        row = [name, "", "", ""]
        if name.endswith(".onnx"):
            if not options.measure:
                raise UserError(f"{name} can be measured, not counted; add --measure")
        else:
            with torch.device("meta"):
                module, images = build(name), torch.empty(1, 3, options.height, options.width)
            macs = count_macs(module, images).total(), executed_macs(module, images)
            row = [name, f"{parameters(module):,}", *(f"{count / 1e9:.2f}" for count in macs)]
        rows.append(row + (measure(name, options) if options.measure else []))
    print(f"{options.batch_size} × {options.height}×{options.width}")
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(name.ljust(widths[0]), *aligned, sep="  ")
    if any(name in PUBLISHED for name in options.names):
        print("A method's row counts its distillation modules; deployed is segformer_b0 alone.")


if __name__ == "__main__":
    cli.run(main, Options)
