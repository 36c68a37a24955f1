"""Channel-wise distillation (CWD): Shu et al., ICCV 2021, on logits and on features.

Each channel's map becomes a distribution over space, so that the student learns where a channel is strong and not how
strong it is. Weights and temperature are those of that paper.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.distiller import Distiller
from models.distillation.losses import channel_wise_divergence
from models.distillation.response import LogitDistiller


class ChannelWiseLogits(LogitDistiller):
    """CWD on the logits: a channel is a class."""

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel,
        weight: float = 3.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student, class_weights, teacher=teacher, weight=weight, temperature=temperature)

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        s, t = self.logits(student, teacher)
        return {"cwd_logits": self.weight * channel_wise_divergence([s], [t], self.temperature)}


class ChannelWiseFeatures(Distiller):
    """CWD on the last feature map F4, which a 1×1 convolution brings to the teacher's width."""

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel,
        weight: float = 50.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student, class_weights, teacher=teacher)
        self.weight, self.temperature = weight, temperature
        self.projection = nn.Conv2d(student.channels[-1], teacher.channels[-1], 1)

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        projected = self.projection(student.features[-1])
        return {"cwd": self.weight * channel_wise_divergence([projected], [teacher.features[-1]], self.temperature)}
