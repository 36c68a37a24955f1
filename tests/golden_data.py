"""The numbers measured with the published code, and the rule that gives both sides the same
weights."""

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets.classes import CITYSCAPES
from models import SegmentationModel, SegmentationOutput, create_model
from models.distillation import Distiller
from models.distillation.methods import METHODS as BUILDERS
from models.distillation.methods import LossOptions
from models.factory import ENCODERS
from models.pyramid import DropPath

FOLDER = Path(__file__).parent / "golden"
INPUTS = {"A": (2, 3, 64, 128), "B": (1, 3, 96, 160), "C": (1, 3, 65, 131)}
PLAIN = {  # the published name of a model and ours
    **{f"mit_b{i}": f"segformer_b{i}" for i in range(6)},
    **{name: name for name in ("pvt_v2_b0", "pvt_v2_b2", "lvt")},
}


class Method(NamedTuple):
    """What a published distiller is called here, and its two networks."""

    name: str
    embed: Any = 5
    student: str = "segformer_b0"
    teacher: str = "segformer_b2"


METHODS = {
    "transkd_base_b0": Method("transkd_base"),
    "transkd_gl_b0": Method("transkd_gl"),
    "transkd_gl_add_b0": Method("transkd_gl_add"),
    "transkd_ea_b0": Method("transkd_ea"),
    **{f"skf_embed{k}_b0": Method("transkd_base", embed=k) for k in range(5)},
    "transkd_base_pvt_v2_b0": Method("transkd_base", student="pvt_v2_b0", teacher="pvt_v2_b2"),
    "transkd_base_lvt": Method("transkd_base", student="lvt"),
    "reviewkd_b0": Method("reviewkd"),
}


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text())


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


def seeded_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        v = 0.5 + rng.random(shape)
    elif leaf == "running_mean":
        v = 0.1 * rng.standard_normal(shape)
    elif "fuse_weights." in key or leaf in ("atten_weight", "conv_weight"):
        v = 0.5 + 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1 and leaf == "weight":
        v = 1 + 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1 and leaf == "bias":
        v = 0.02 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        v = rng.standard_normal(shape) * math.sqrt(1.0 / np.prod(shape[1:]))
    else:
        raise KeyError(key)
    return v.astype(np.float32)


def published_key(key: str) -> str:
    """Our distillers keep fusion and alignment apart; the published ones had both at the top."""
    return key.removeprefix("fusion.").removeprefix("alignment.")


def seed(module: nn.Module) -> nn.Module:
    """Give a module the weights that follow from its parameters' published names."""
    seeded = {}
    for key, value in module.state_dict().items():
        seeded[key] = torch.from_numpy(seeded_value(published_key(key), tuple(value.shape)))
    module.load_state_dict(seeded)
    return module


def golden_input(name: str) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(INPUTS[name]).astype(np.float32))


def golden_labels() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 20, (2, 16, 32)))


def build(name: str) -> tuple[Distiller, SegmentationModel | None]:
    """A golden row's distiller and its teacher; a plain model comes in a distiller without one."""
    return seeded(name), seeded_teacher(METHODS[name].teacher) if name in METHODS else None


def seeded(name: str) -> Distiller:
    distiller = unseeded(name)
    seed(distiller.student if name in PLAIN else distiller)
    return distiller


def unseeded(name: str) -> Distiller:
    if name in PLAIN:
        return Distiller(create_model(PLAIN[name]), CITYSCAPES.weights)
    row = METHODS[name]
    channels, options = ENCODERS[row.teacher].channels, LossOptions(embed=row.embed)
    student = create_model(row.student)
    return BUILDERS[row.name].build(student, channels, CITYSCAPES.weights, options)


def seeded_teacher(model: str) -> SegmentationModel:
    return seed(create_model(model)).eval().requires_grad_(False)


def without_chance(module: nn.Module) -> Any:
    """Stochastic depth and dropout are off, in training too."""
    for part in module.modules():
        if isinstance(part, nn.Dropout2d | DropPath):
            part.eval()
    return module


@cache
def teacher_output(model: str, dtype: torch.dtype) -> SegmentationOutput:
    return seeded_teacher(model).to(dtype)(golden_input("A").to(dtype), logits=False)
