"""Embedding Assistant (EA) of TransKD-EA: Liu et al., arXiv 2202.13393, section III-C."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.base import SegmentationOutput
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.pyramid import init_weights, patch_embeddings


class EmbeddingAssistant(PatchEmbeddingAlignment):
    """PEA beside a second patch embedding at the teacher's width: P_i = u_i·PEA_i(E_i) + v_i·EA_i(F_{i-1}).

    EA_1 sees the image. The learnable scalars u_1..u_4, v_1..v_4 start at 0.1, 0.2, … 0.8.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
    ) -> None:
        super().__init__(student_channels, teacher_channels, stages)
        embeds = patch_embeddings((3, *student_channels[:3]), tuple(teacher_channels))
        for i in self.stages:
            setattr(self, f"patch_embed{i}", embeds[i - 1].apply(init_weights))
        self.fuse_weights = nn.ParameterList(torch.full((1,), 0.1 * (k + 1)) for k in range(8))

    def forward(self, images: Tensor, student: SegmentationOutput) -> dict[int, Tensor]:
        inputs = (images, *student.features[:3])
        aligned = {}
        for i, projected in super().forward(images, student).items():
            assistant, _, _ = getattr(self, f"patch_embed{i}")(inputs[i - 1])
            u, v = self.fuse_weights[i - 1], self.fuse_weights[i + 3]
            aligned[i] = u * projected + v * assistant
        return aligned
