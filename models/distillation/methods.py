"""Every method by name: the paper's, its ablations, its baselines. A new one is a file here and a line in METHODS."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from cli import UserError
from models.base import SegmentationModel
from models.distillation.csf import CrossSelectiveFusion
from models.distillation.cwd import ChannelWiseFeatures, ChannelWiseLogits
from models.distillation.distiller import Distiller
from models.distillation.embedding_assistant import EmbeddingAssistant
from models.distillation.gl_ea import MixerWithAssistant
from models.distillation.gl_mixer import GLMixer
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.distillation.response import ResponseDistiller
from models.distillation.review import ReviewFusion
from models.distillation.skd import PairwiseDistiller


@dataclass(frozen=True)
class Settings:
    """What a user decides about a method."""

    stages: Sequence[int] = ALL_STAGES
    """Whose patch embeddings are aligned."""
    losses: Mapping[str, Any] = field(default_factory=dict)
    """The loss arguments of `Distiller`, for methods with a fusion or an alignment."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """Arguments of a baseline that differ from its own defaults: weight, temperature."""


Method = Callable[[SegmentationModel, SegmentationModel, Sequence[float] | None, Settings], Distiller]


def transkd(fusion: Callable[..., nn.Module] | None, alignment: Callable[..., Any] | None) -> Method:
    """Feature maps through `fusion`, patch embeddings through `alignment`; both made from the two models' widths."""

    def build(
        student: SegmentationModel,
        teacher: SegmentationModel,
        class_weights: Sequence[float] | None,
        settings: Settings,
    ) -> Distiller:
        if settings.baseline:
            raise UserError(f"this method has no {_flags(settings.baseline)}; leave it out")
        channels = student.channels, teacher.channels
        return Distiller(
            student,
            class_weights,
            teacher=teacher,
            fusion=fusion and fusion(*channels),
            alignment=alignment(*channels, settings.stages) if alignment and settings.stages else None,
            **settings.losses,
        )

    return build


def baseline(distiller: type[Distiller]) -> Method:
    """A distiller with losses of its own."""

    def build(
        student: SegmentationModel,
        teacher: SegmentationModel,
        class_weights: Sequence[float] | None,
        settings: Settings,
    ) -> Distiller:
        if unknown := settings.baseline.keys() - inspect.signature(distiller).parameters:
            raise UserError(f"this method has no {_flags(unknown)}; leave it out")
        return distiller(student, class_weights, teacher=teacher, **settings.baseline)  # type: ignore[arg-type]

    return build


METHODS: dict[str, Method] = {
    # name: feature maps, patch embeddings
    "transkd_base": transkd(CrossSelectiveFusion, PatchEmbeddingAlignment),
    "transkd_gl": transkd(CrossSelectiveFusion, GLMixer),
    "transkd_gl_add": transkd(CrossSelectiveFusion, partial(GLMixer, add=True)),
    "transkd_ea": transkd(CrossSelectiveFusion, EmbeddingAssistant),
    "gl_ea": transkd(CrossSelectiveFusion, MixerWithAssistant),
    "csf": transkd(CrossSelectiveFusion, None),
    "pea": transkd(None, PatchEmbeddingAlignment),
    "ea": transkd(None, EmbeddingAssistant),
    "reviewkd": transkd(ReviewFusion, None),
    "response": baseline(ResponseDistiller),
    "cwd": baseline(ChannelWiseFeatures),
    "cwd_logits": baseline(ChannelWiseLogits),
    "skd": baseline(PairwiseDistiller),
}


def _flags(names: Any) -> str:
    return " or ".join(f"--kd-{name}" for name in sorted(names))
