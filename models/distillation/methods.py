"""Every method by name: the paper's, its ablations, its baselines. A new one is a file here and a line in METHODS."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from errors import UserError
from models.base import SegmentationModel
from models.distillation.csf import CrossSelectiveFusion
from models.distillation.cwd import ChannelWiseFeatures
from models.distillation.distiller import Distiller, LogitLoss
from models.distillation.embedding_assistant import EmbeddingAssistant
from models.distillation.gl_ea import MixerWithAssistant
from models.distillation.gl_mixer import GLMixer
from models.distillation.losses import channel_wise_divergence, pixel_wise_divergence
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
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

    def refuse_others(
        self, *, fusion: object = None, alignment: object = None, baseline: Collection[str] = ()
    ) -> None:
        """Raise UserError for a setting of what a method with these parts alone doesn't have."""
        defaults = inspect.signature(Distiller).parameters
        changed = {name for name, value in self.losses.items() if value != defaults[name].default}
        unused = [f"--kd-{name}" for name in sorted(self.baseline.keys() - set(baseline))]
        if fusion is None and changed - {"embed_weights"}:
            unused.append("--knowledge-distillation-loss or weight of it")
        if (
            alignment is None
            and self.stages
            and (tuple(self.stages) != ALL_STAGES or "embed_weights" in changed)
        ):
            unused.append("--embed or --embed-weights")
        if unused:
            raise UserError(f"this method has no {', no '.join(unused)}; leave it out")


Method = Callable[
    [SegmentationModel, SegmentationModel, Sequence[float] | None, Settings], Distiller
]


def transkd(
    fusion: Callable[..., nn.Module] | None, alignment: Callable[..., Any] | None
) -> Method:
    """Feature maps through `fusion`, patch embeddings through `alignment`; both made from the two models' widths.

    `--embed 0` leaves CSF alone of TransKD-Base; of other methods it would leave out what they are about.
    """

    def build(
        student: SegmentationModel,
        teacher: SegmentationModel,
        class_weights: Sequence[float] | None,
        settings: Settings,
    ) -> Distiller:
        settings.refuse_others(fusion=fusion, alignment=alignment)
        if (
            alignment
            and not settings.stages
            and (fusion is None or alignment is not PatchEmbeddingAlignment)
        ):
            raise UserError(
                "--embed 0 leaves out what this method is about; align a stage, or take --method csf"
            )
        channels = student.channels, teacher.channels
        return Distiller(
            student,
            class_weights,
            teacher=teacher,
            fusion=fusion and fusion(*channels),
            alignment=alignment(*channels, settings.stages)
            if alignment and settings.stages
            else None,
            **settings.losses,
        )

    return build


def logits(name: str, loss: LogitLoss, **defaults: float) -> Method:
    """A loss between the logits alone."""

    def build(
        student: SegmentationModel,
        teacher: SegmentationModel,
        class_weights: Sequence[float] | None,
        settings: Settings,
    ) -> Distiller:
        settings.refuse_others(baseline=("weight", "temperature"))
        distiller = Distiller(student, class_weights, teacher=teacher)
        distiller.distil_logits(**defaults | dict(settings.baseline), loss=loss, name=name)
        return distiller

    return build


def baseline(distiller: type[Distiller]) -> Method:
    """A distiller with losses of its own."""

    def build(
        student: SegmentationModel,
        teacher: SegmentationModel,
        class_weights: Sequence[float] | None,
        settings: Settings,
    ) -> Distiller:
        settings.refuse_others(baseline=inspect.signature(distiller).parameters)
        return distiller(student, class_weights, teacher=teacher, **settings.baseline)  # type: ignore[arg-type]

    return build


# Weights and temperatures are this project's; the authors of SKD and CWD weigh class probabilities by 10 (T = 1), and
# leave CWD's two to the caller of their code.
LOGITS: dict[str, Method] = {
    "response": logits("response", pixel_wise_divergence, weight=1.0, temperature=1.0),
    "cwd_logits": logits("cwd_logits", channel_wise_divergence, weight=3.0, temperature=4.0),
}
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
    "cwd": baseline(ChannelWiseFeatures),
    "skd": baseline(PairwiseDistiller),
    **LOGITS,
}
PUBLISHED = {"TransKDBase": "transkd_base", "TransKD_GL": "transkd_gl", "TransKD_EA": "transkd_ea"}
"""The paper's methods: how their scripts call themselves, and their names here."""
