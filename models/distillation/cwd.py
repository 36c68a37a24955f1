"""Channel-wise distillation (CWD) on features: Shu et al., ICCV 2021 (arXiv 2011.13256). On logits: see `methods`.

Each channel's map becomes a distribution over space, so that the student learns where a channel is strong and not how
strong it is.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.distiller import Distiller, require_wider
from models.distillation.losses import channel_wise_divergence


class ChannelWiseFeatures(Distiller):
    """CWD on the last feature map F4, which a 1×1 convolution brings to the teacher's width.

    The authors' code compares the maps behind PSPNet's pooling module, which SegFormer has not, and follows the
    convolution by BatchNorm and ReLU. Weight and temperature are this project's defaults; their code leaves both to its
    caller.

    Raises:
        UserError: the teacher is narrower than the student.
    """

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
        require_wider(teacher, student)
        self.weight, self.temperature = weight, temperature
        self.projection = nn.Conv2d(student.channels[-1], teacher.channels[-1], 1)

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        projected = self.projection(student.features[-1])
        return {
            "cwd": self.weight
            * channel_wise_divergence([projected], [teacher.features[-1]], self.temperature)
        }
