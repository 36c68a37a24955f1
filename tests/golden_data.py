"""The numbers measured with the published code, and the rule that gives both sides the same weights."""

import json
import math
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets.classes import CITYSCAPES
from models import create_model
from models.distillation import (
    CrossSelectiveFusion,
    Distiller,
    EmbeddingAssistant,
    GLMixer,
    PatchEmbeddingAlignment,
)
from models.distillation.review import ReviewFusion

FOLDER = Path(__file__).parent / "golden"
INPUTS = {"A": (2, 3, 64, 128), "B": (1, 3, 96, 160), "C": (1, 3, 65, 131)}
PLAIN = {  # the published name of a model and ours
    **{f"mit_b{i}": f"segformer_b{i}" for i in range(6)},
    **{name: name for name in ("pvt_v2_b0", "pvt_v2_b2", "lvt")},
}
Modules = Callable[
    [tuple[int, ...], tuple[int, ...]], nn.Module
]  # from the student's and the teacher's channels


class Method(NamedTuple):
    """What a published distiller combines."""

    alignment: Modules | None = PatchEmbeddingAlignment
    embed_weights: tuple[float, ...] = (0.1, 0.1, 0.5, 1.0)
    fusion: Modules = CrossSelectiveFusion
    student: str = "segformer_b0"
    teacher: str = "segformer_b2"


METHODS = {
    "transkd_base_b0": Method(),
    "transkd_gl_b0": Method(GLMixer),
    "transkd_gl_add_b0": Method(partial(GLMixer, add=True)),
    "transkd_ea_b0": Method(EmbeddingAssistant),
    "skf_embed0_b0": Method(None),
    **{
        f"skf_embed{k}_b0": Method(partial(PatchEmbeddingAlignment, stages=(k,)), (1.0,))
        for k in range(1, 5)
    },
    "transkd_base_pvt_v2_b0": Method(student="pvt_v2_b0", teacher="pvt_v2_b2"),
    "transkd_base_lvt": Method(student="lvt"),
    "reviewkd_b0": Method(None, fusion=ReviewFusion),
}


@cache
def load(name: str) -> dict:
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
    state = module.state_dict()
    module.load_state_dict(
        {
            k: torch.from_numpy(seeded_value(published_key(k), tuple(v.shape)))
            for k, v in state.items()
        }
    )
    return module


def golden_input(name: str) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(INPUTS[name]).astype(np.float32))


def golden_labels() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 20, (2, 16, 32)))


def build(name: str, **options: object) -> Distiller:
    """The seeded distiller of a golden row; a plain model comes in a distiller without a teacher."""
    if name in PLAIN:
        return Distiller(seed(create_model(PLAIN[name])), CITYSCAPES.weights)
    method = METHODS[name]
    student, teacher = create_model(method.student), seed(create_model(method.teacher))
    channels = student.channels, teacher.channels
    distiller = Distiller(
        student,
        CITYSCAPES.weights,
        teacher=teacher,
        fusion=method.fusion(*channels),
        alignment=method.alignment and method.alignment(*channels),
        embed_weights=method.embed_weights,
        **options,
    )
    return seed(distiller)
