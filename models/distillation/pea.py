"""Patch Embedding Alignment (PEA): Liu et al., arXiv 2202.13393, section III-C."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.base import SegmentationOutput
from models.linear import Linear

ALL_STAGES = (1, 2, 3, 4)


class PatchEmbeddingAlignment(nn.Module):
    """P_i = Linear_i(E_i): brings the student's patch embeddings to the teacher's width.

    `stages` are those that are aligned, counted from 1. As published, the projections are numbered
    in the order of `stages`, so a single one is `embed1_linearproject` whichever stage it serves.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        for number, stage in enumerate(self.stages, start=1):
            # Neither norm nor activation: the paper aligns by a linear map alone.
            projection = Linear(student_channels[stage - 1], teacher_channels[stage - 1])
            setattr(self, f"embed{number}_linearproject", projection)

    def forward(self, images: Tensor, student: SegmentationOutput) -> dict[int, Tensor]:
        """The student's output -> P_i (B, h_i·w_i, C_T) by stage i, for every aligned stage."""
        aligned = {}
        for number, stage in enumerate(self.stages, start=1):
            projection = getattr(self, f"embed{number}_linearproject")
            # E_i (B, h_i·w_i, C_S) -> (B, h_i·w_i, C_T)
            aligned[stage] = projection(student.embeddings[stage - 1])
        return aligned
