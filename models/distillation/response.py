"""Response distillation: the student learns the teacher's class probabilities (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Sequence

from torch import Tensor

from cli import UserError
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

    needs_teacher_logits = True

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
        self.weight, self.temperature = weight, temperature
        self.classes = student.num_classes - 1
        if teacher.num_classes not in (self.classes, student.num_classes):  # some networks have no output for "ignore"
            raise UserError(
                f"the teacher has {teacher.num_classes} outputs and the student {student.num_classes}; logits can only "
                "be distilled between networks of the same classes"
            )

    def logits(self, student: SegmentationOutput, teacher: SegmentationOutput) -> tuple[Tensor, Tensor]:
        """Both networks' logits of the classes that count, (B, classes, h, w)."""
        assert student.logits is not None and teacher.logits is not None
        return student.logits[:, : self.classes], teacher.logits[:, : self.classes]


class ResponseDistiller(LogitDistiller):
    """KL(teacher‖student) of each pixel's softmax over the classes."""

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        s, t = self.logits(student, teacher)
        return {"response": self.weight * pixel_wise_divergence([s], [t], self.temperature)}
