"""Channel-wise distillation (CWD) on features: Shu et al., ICCV 2021 (arXiv 2011.13256).

Each channel's map becomes a distribution over space, so that the student learns where a channel is
strong, and not how strong it is. On logits: see `methods`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.distiller import Distiller
from models.distillation.losses import channel_wise_divergence


class ChannelWiseFeatures(Distiller):
    """total = CE + w · CWD(conv(F4^S), F4^T)

    The authors' code compares the maps behind PSPNet's pooling module, which SegFormer has not, and
    follows the convolution by BatchNorm and ReLU. Weight and temperature are this project's
    defaults; the authors' code leaves both to its caller.
    """

    def __init__(
        self,
        student: SegmentationModel,
        *arguments: Any,
        teacher_channels: Sequence[int],
        weight: float = 50.0,
        temperature: float = 4.0,
        **others: Any,
    ) -> None:
        super().__init__(student, *arguments, **others)
        self.weight = weight
        self.temperature = temperature
        # A 1×1 convolution gives the teacher's width.
        self.projection = nn.Conv2d(student.channels[-1], teacher_channels[-1], 1)

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        # A channel's distribution is a softmax over its h·w places.
        projected = self.projection(student.features[-1])
        loss = channel_wise_divergence(projected, teacher.features[-1], self.temperature)
        return {"cwd": self.weight * loss}
