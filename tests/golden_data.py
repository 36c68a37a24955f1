"""The numbers measured with the published code, and the rule that gives both sides the same weights."""

import json
import math
import zlib
from functools import cache
from pathlib import Path

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

FOLDER = Path(__file__).parent / "golden"
INPUTS = {"A": (2, 3, 64, 128), "B": (1, 3, 96, 160), "C": (1, 3, 65, 131)}
SEGFORMERS = {f"mit_b{i}": f"segformer_b{i}" for i in range(6)}
ALIGNMENTS = {
    "transkd_base_b0": PatchEmbeddingAlignment,
    "transkd_gl_b0": GLMixer,
    "transkd_gl_add_b0": lambda s, t: GLMixer(s, t, add=True),
    "transkd_ea_b0": EmbeddingAssistant,
    "skf_embed0_b0": None,
    **{f"skf_embed{k}_b0": lambda s, t, k=k: PatchEmbeddingAlignment(s, t, (k,)) for k in range(1, 5)},
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
        {k: torch.from_numpy(seeded_value(published_key(k), tuple(v.shape))) for k, v in state.items()}
    )
    return module


def golden_input(name: str) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(INPUTS[name]).astype(np.float32))


def golden_labels() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 20, (2, 16, 32)))


def build(name: str, **options: object) -> Distiller:
    """The seeded distiller of a golden row; a plain model comes in a distiller without a teacher."""
    if name in SEGFORMERS:
        return Distiller(seed(create_model(SEGFORMERS[name])), CITYSCAPES.weights)
    student, teacher = create_model("segformer_b0"), seed(create_model("segformer_b2"))
    channels = student.channels, teacher.channels
    make = ALIGNMENTS[name]
    single = name.startswith("skf_embed")
    distiller = Distiller(
        student,
        CITYSCAPES.weights,
        teacher=teacher,
        fusion=CrossSelectiveFusion(*channels),
        alignment=make and make(*channels),
        embed_weights=(1.0,) if single else (0.1, 0.1, 0.5, 1.0),
        **options,
    )
    return seed(distiller)
