"""The distiller: a student under training, and what is learned beside it and thrown away later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.losses import cross_entropy, embedding_loss, hierarchical_context_loss

FeatureLoss = Callable[[Tensor, Tensor], Tensor]  # maps (B, C, h, w) of student and teacher


@dataclass(frozen=True)
class LogitsLoss:
    """A weighted loss between the logits of student and teacher.

    "Ignore", the student's last output, is no class to learn and takes no part.
    """

    name: str  # what the logs call it
    loss: Callable[[Tensor, Tensor, float], Tensor]  # maps, temperature
    weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, student: SegmentationOutput, teacher: SegmentationOutput) -> Tensor:
        """The scalar loss."""
        assert student.logits is not None and teacher.logits is not None
        classes = student.logits.shape[1] - 1  # some teachers have no output for "ignore"
        s, t = student.logits[:, :classes], teacher.logits[:, :classes]
        return self.weight * self.loss(s, t, self.temperature)


class Distiller(nn.Module):
    """Supervised training: total = CE. Teachers and students alone are trained by this class.

    A method of distillation overrides `distillation_losses`, and owns what it learns beside the
    student; `distiller.student` is what is deployed. The teacher is not in here: its output for the
    same images comes as an argument.
    """

    class_weights: Tensor

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None = None,
        *,
        logits_loss: LogitsLoss | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.logits_loss = logits_loss  # one more loss; the teacher's head must run for it
        # One for each output. None weighs all classes alike but "ignore", which is the last.
        weights = class_weights or (1.0,) * (student.num_classes - 1) + (0.0,)
        self.register_buffer("class_weights", torch.tensor(weights), persistent=False)

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the teacher's head must run; TransKD's own losses don't look at its logits."""
        return self.logits_loss is not None

    def forward(
        self, images: Tensor, labels: Tensor, teacher: SegmentationOutput | None = None
    ) -> dict[str, Tensor]:
        """One training step's losses by name, weighted: their sum is the total.

        Images are (B, 3, H, W), RGB in [0, 1]. Labels are (B, ceil(H/4), ceil(W/4)) or (B, H, W),
        train ids, the last index for ignore; cross entropy is computed at their size. The teacher's
        output for the images comes without gradients.
        """
        # Channels last, once: the student and EA both take the images.
        images = images.contiguous(memory_format=torch.channels_last)
        student = self.student(images)
        losses = {"ce": cross_entropy(student.logits, labels, self.class_weights)}
        if teacher is not None:
            losses |= self.distillation_losses(images, student, teacher)
            if self.logits_loss is not None:
                losses[self.logits_loss.name] = self.logits_loss(student, teacher)
        return losses

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        """What the teacher adds to cross entropy: losses by name, weighted."""
        return {}


class TransKD(Distiller):
    """total = CE + w_f · Σ_i L(fusion(F^S)_i, F_i^T) + Σ_i w_i · MSE(P_i, E_i^T)

    `fusion` is CSF or Knowledge Review's, `alignment` is PEA, GL-Mixer or EA, which gives P_i; None
    leaves that part out. `feature_loss` is L, and `feature_loss_name` what the logs call it. There
    is one of `embed_weights` for each aligned stage.
    """

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None = None,
        *,
        fusion: nn.Module | None = None,
        alignment: nn.Module | None = None,
        feature_loss: FeatureLoss = hierarchical_context_loss,
        feature_loss_name: str = "hcl",
        feature_weight: float = 1.0,
        embed_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0),
        logits_loss: LogitsLoss | None = None,
    ) -> None:
        super().__init__(student, class_weights, logits_loss=logits_loss)
        self.fusion = fusion
        self.alignment = alignment
        self.feature_loss = feature_loss
        self.feature_loss_name = feature_loss_name
        self.feature_weight = feature_weight
        self.embed_weights = tuple(embed_weights)

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        """The losses between feature maps and between patch embeddings."""
        losses: dict[str, Any] = {}
        # Each fused map F_i (B, C_T, h_i, w_i) has the shape of the teacher's feature.
        if self.fusion is not None:
            pairs = zip(self.fusion(student.features), teacher.features, strict=True)
            loss = sum(self.feature_loss(s, t) for s, t in pairs)
            losses[self.feature_loss_name] = self.feature_weight * loss
        if self.alignment is not None:
            aligned = self.alignment(images, student)  # P_i (B, h_i·w_i, C_T) by stage i
            for (stage, projected), weight in zip(aligned.items(), self.embed_weights, strict=True):
                loss = embedding_loss(projected, teacher.embeddings[stage - 1])
                losses[f"embed{stage}"] = weight * loss
        return losses
