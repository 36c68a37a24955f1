"""Response distillation: the student learns the teacher's class probabilities (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Sequence

from torch import Tensor

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.distiller import Distiller
from models.distillation.losses import pixel_wise_divergence


class LogitDistiller(Distiller):
    """What the methods that compare logits share: the teacher's head runs, and "ignore" is no class to learn.

    Args:
        student, class_weights, teacher: as `Distiller`.
        weight: of the loss.
        temperature: T of the softmax; the loss is multiplied by T².

    Raises:
        UserError: the teacher tells other classes apart than the student.
    """

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student, class_weights, teacher=teacher)
        self.require_teacher_logits()
        self.weight, self.temperature = weight, temperature


class ResponseDistiller(LogitDistiller):
    """KL(teacher‖student) of each pixel's softmax over the classes."""

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        s, t = self.logits(student, teacher)
        return {"response": self.weight * pixel_wise_divergence([s], [t], self.temperature)}
