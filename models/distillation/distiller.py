"""The distiller: a student, a frozen teacher, and the modules between them that are thrown away afterwards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.base import SegmentationModel, SegmentationOutput
from models.distillation.losses import (
    cross_entropy,
    embedding_loss,
    hierarchical_context_loss,
    pixel_wise_divergence,
)
from models.distillation.pea import PatchEmbeddingAlignment

FeatureLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
LogitLoss = Callable[[Sequence[Tensor], Sequence[Tensor], float], Tensor]


class Distiller(nn.Module):
    """Holds a student that doesn't know it is being distilled, and owns what is learned beside it.

    total = CE + feature_weight · feature_loss(CSF(F^S), F^T) + Σ_i w_i · MSE(P_i, E_i^T)

    and the losses between logits that `distil_logits` adds.

    `distiller.student.state_dict()` is the deployable model. Without a teacher it is plain supervised training:
    teachers and students alone are trained by the same loop.

    Args:
        student: the network that learns.
        class_weights: one per output, 0 for the ignore index, which is the last; None weighs all classes alike.
        teacher: frozen here, in eval mode, moved with the distiller but neither saved nor trained with it.
        fusion: CSF (or Knowledge Review's), or None for no feature-map loss.
        alignment: PEA, GL-Mixer or EA, or None for no embedding loss.
        feature_loss: between the fused features and the teacher's; `feature_loss_name` is its name in the logs.
        feature_weight: its weight.
        embed_weights: w_i of the aligned stages, in their order.

    Raises:
        UserError: the teacher is narrower than the student, and there is a fusion or an alignment.
    """

    needs_teacher_logits = (
        False  # TransKD's losses don't; without them the teacher's decode head does not run
    )
    class_weights: Tensor
    teacher: SegmentationModel | None

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel | None = None,
        fusion: nn.Module | None = None,
        alignment: PatchEmbeddingAlignment | None = None,
        feature_loss: FeatureLoss = hierarchical_context_loss,
        feature_loss_name: str = "hcl",
        feature_weight: float = 1.0,
        embed_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0),
    ) -> None:
        super().__init__()
        if teacher is not None and (fusion is not None or alignment is not None):
            require_wider(teacher, student)
        self.student, self.fusion, self.alignment = student, fusion, alignment
        self.feature_loss, self.feature_loss_name = feature_loss, feature_loss_name
        self.feature_weight, self.embed_weights = feature_weight, tuple(embed_weights)
        self.logit_losses: dict[str, tuple[LogitLoss, float, float]] = {}
        weights = class_weights or (1.0,) * (student.num_classes - 1) + (0.0,)
        self.register_buffer("class_weights", torch.tensor(weights), persistent=False)
        # Not a submodule: it is neither trained nor saved nor counted.
        object.__setattr__(self, "teacher", teacher and teacher.eval().requires_grad_(False))

    def distil_logits(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        *,
        loss: LogitLoss = pixel_wise_divergence,
        name: str = "logits",
    ) -> None:
        """Add a loss between the logits of the classes that count, softened by `temperature`, to what else there is.

        By default it is KL(teacher‖student) of each pixel's class probabilities (Hinton et al., arXiv 1503.02531).

        Raises:
            UserError: there is no teacher, or it tells other classes apart than the student.
        """
        if self.teacher is None:
            raise UserError(
                "a student alone has no teacher whose logits it could learn; name one, or distil no logits"
            )
        s, t = self.student.num_classes, self.teacher.num_classes
        if t not in (s - 1, s):  # some networks have no output for "ignore"
            raise UserError(
                f"the teacher has {t} outputs and the student {s}, and logits can only be distilled between networks "
                "of the same classes; name another teacher, or distil no logits"
            )
        self.needs_teacher_logits = True
        self.logit_losses[name] = loss, weight, temperature

    def compare_logits(
        self, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        """The losses that `distil_logits` added, between the classes that count: "ignore" is no class to learn."""
        if not self.logit_losses:
            return {}
        assert student.logits is not None and teacher.logits is not None
        classes = self.student.num_classes - 1
        s, t = student.logits[:, :classes], teacher.logits[:, :classes]
        return {
            name: weight * loss([s], [t], T)
            for name, (loss, weight, T) in self.logit_losses.items()
        }

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One training step's losses by name, weighted: their sum is the total.

        Args:
            images: (B, 3, H, W), RGB in [0, 1].
            labels: (B, ceil(H/4), ceil(W/4)) or (B, H, W), train ids, the last index for ignore. Cross entropy is
                computed at their size.
        """
        images = images.contiguous(
            memory_format=torch.channels_last
        )  # once, for all that look at them
        student = self.student(images)
        losses = {"ce": cross_entropy(student.logits, labels, self.class_weights)}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(images, logits=self.needs_teacher_logits)
            losses |= self.distillation_losses(images, student, teacher)
            losses |= self.compare_logits(student, teacher)
        return losses

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        """The teacher's share of the losses; a new method overrides this."""
        losses = {}
        if self.fusion is not None:
            loss = self.feature_loss(self.fusion(student.features), teacher.features)
            losses[self.feature_loss_name] = self.feature_weight * loss
        if self.alignment is not None:
            aligned = self.alignment(images, student)
            for (i, projected), weight in zip(aligned.items(), self.embed_weights, strict=True):
                losses[f"embed{i}"] = weight * embedding_loss(projected, teacher.embeddings[i - 1])
        return losses

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "Distiller":
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # .to(device) and the like take the teacher along
        return super()._apply(fn, recurse)


def require_wider(teacher: SegmentationModel, student: SegmentationModel) -> None:
    """Raise UserError if a stage of the teacher is narrower than the student's, which is then projected down."""
    for stage, (s, t) in enumerate(zip(student.channels, teacher.channels, strict=True), start=1):
        if t < s:
            raise UserError(
                f"the teacher {teacher.name} is narrower than the student {student.name} "
                f"({t} instead of {s} channels in stage {stage}); choose a wider one"
            )
