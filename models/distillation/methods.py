"""Every method by name: the paper's, its ablations, its baselines.

All have cross entropy. `--logits-weight` adds a loss between class probabilities, but to the two
methods whose own loss is one between logits. What else a method has is in its row of METHODS. A new
one is a file here and a row there.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from errors import UserError
from models.base import SegmentationModel
from models.distillation.csf import CrossSelectiveFusion
from models.distillation.cwd import ChannelWiseFeatures
from models.distillation.distiller import Distiller, LogitsLoss, TransKD
from models.distillation.embedding_assistant import EmbeddingAssistant
from models.distillation.gl_mixer import GLMixer
from models.distillation.losses import (
    FEATURE_LOSSES,
    channel_wise_divergence,
    pixel_wise_divergence,
)
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.distillation.review import ReviewFusion
from models.distillation.skd import PairwiseDistiller

POSITIVE = {"least": 1e-6}


@dataclass(kw_only=True)
class LossOptions:
    """Which losses there are and how they are weighted; the defaults are the published ones."""

    embed: Literal[0, 1, 2, 3, 4, 5] = 5
    """Patch embeddings that are distilled: 0 none, 1–4 that stage alone, 5 all four."""
    embed_weights: tuple[float, float, float, float] = (0.1, 0.1, 0.5, 1.0)
    """Weights of the four stages' embedding losses (with --embed 5; a single stage has 1)."""
    knowledge_distillation_loss: Literal["hcl", "CWloss", "KL"] = "hcl"
    """Loss between fused features and the teacher's: hierarchical context, softmax over space, over
    channels."""
    review_kd_loss_weight: float = 1.0
    """Weight of the hierarchical context loss."""
    lambda_cwd: float = 1.0
    """Weight of CWloss and KL."""
    temperature: float = field(default=1.0, metadata=POSITIVE)
    """Temperature of CWloss and KL."""
    logits_weight: float = 0.0
    """Weight of one more loss, between class probabilities: KL(teacher‖student). 0: none, as
    published. No effect with response and cwd_logits, whose loss is such a one."""
    logits_temperature: float = field(default=1.0, metadata=POSITIVE)
    """Temperature of that loss."""
    kd_weight: float | None = None
    """Weight of the loss of response, cwd, cwd_logits, skd. Default: the method's own."""
    kd_temperature: float | None = field(default=None, metadata=POSITIVE)
    """Temperature of response, cwd, cwd_logits. Default: the method's own."""

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages whose embeddings are aligned."""
        return {0: (), 5: ALL_STAGES}.get(self.embed, (self.embed,))


@dataclass(frozen=True)
class Method:
    """What a method has beside cross entropy: one of three kinds."""

    # TransKD: of feature maps, by `--knowledge-distillation-loss`; of patch embeddings, by MSE.
    fusion: Callable[..., nn.Module] | None = None
    alignment: Callable[..., nn.Module] | None = None
    # A loss between logits alone.
    logits: LogitsLoss | None = None
    # A class with losses of its own.
    distiller: Callable[..., Distiller] | None = None

    @property
    def compares_logits(self) -> bool:
        """Whether the teacher's logits count: then it must have the student's classes."""
        own = getattr(self.distiller, "needs_teacher_logits", False)
        return self.logits is not None or own is True

    def build(
        self,
        student: SegmentationModel,
        teacher_channels: Sequence[int],
        class_weights: Sequence[float] | None = None,
        options: LossOptions | None = None,
    ) -> Distiller:
        """The distiller of a student, for a teacher of these widths.

        Raises UserError if the method is about embeddings, and no stage's is aligned.
        """
        options = options or LossOptions()
        given = {"weight": options.kd_weight, "temperature": options.kd_temperature}
        own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.logits is not None:
            return Distiller(student, class_weights, logits_loss=replace(self.logits, **own))
        logits_loss = None
        if options.logits_weight:  # Hinton et al., arXiv 1503.02531
            weighting = options.logits_weight, options.logits_temperature
            logits_loss = LogitsLoss("logits", pixel_wise_divergence, *weighting)
        if self.distiller is not None:
            # A weight or temperature that the method doesn't have has no effect.
            own["teacher_channels"] = teacher_channels
            known = inspect.signature(self.distiller).parameters
            own = {name: value for name, value in own.items() if name in known}
            return self.distiller(student, class_weights, logits_loss=logits_loss, **own)
        fusion = alignment = None
        if self.fusion is not None:
            fusion = self.fusion(student.channels, teacher_channels)
        if self.alignment is not None and options.stages:
            alignment = self.alignment(student.channels, teacher_channels, options.stages)
        elif self.alignment is not None and self != METHODS["transkd_base"]:
            # --embed 0 leaves CSF of TransKD-Base, and nothing that is special about the others.
            raise UserError("this method is about patch embeddings; align one stage at least")
        name = options.knowledge_distillation_loss
        feature_loss = FEATURE_LOSSES[name]
        feature_weight = options.review_kd_loss_weight
        if name != "hcl":
            feature_loss = partial(feature_loss, temperature=options.temperature)
            feature_weight = options.lambda_cwd
        return TransKD(
            student,
            class_weights,
            fusion=fusion,
            alignment=alignment,
            feature_loss=feature_loss,
            feature_loss_name=name,
            feature_weight=feature_weight,
            embed_weights=options.embed_weights if options.embed == 5 else (1.0,),
            logits_loss=logits_loss,
        )


METHODS: dict[str, Method] = {
    "transkd_base": Method(CrossSelectiveFusion, PatchEmbeddingAlignment),
    "transkd_gl": Method(CrossSelectiveFusion, GLMixer),
    "transkd_gl_add": Method(CrossSelectiveFusion, partial(GLMixer, add=True)),
    "transkd_ea": Method(CrossSelectiveFusion, EmbeddingAssistant),
    "gl_ea": Method(CrossSelectiveFusion, partial(EmbeddingAssistant, mix=True)),
    "csf": Method(fusion=CrossSelectiveFusion),
    "pea": Method(alignment=PatchEmbeddingAlignment),
    "ea": Method(alignment=EmbeddingAssistant),
    "reviewkd": Method(fusion=ReviewFusion),
    "cwd": Method(distiller=ChannelWiseFeatures),
    "skd": Method(distiller=PairwiseDistiller),
    # Weights and temperatures are this project's. The authors of SKD and CWD weigh class
    # probabilities by 10 (T = 1); CWD's code leaves its own two to the caller.
    "response": Method(logits=LogitsLoss("response", pixel_wise_divergence)),
    "cwd_logits": Method(logits=LogitsLoss("cwd_logits", channel_wise_divergence, 3.0, 4.0)),
}
PUBLISHED = {"TransKDBase": "transkd_base", "TransKD_GL": "transkd_gl", "TransKD_EA": "transkd_ea"}
"""The paper's methods: what their scripts are called, and their names here."""
