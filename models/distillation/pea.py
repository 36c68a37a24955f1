"""Patch Embedding Alignment (PEA): Liu et al., arXiv 2202.13393, section III-C."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.base import SegmentationOutput
from models.linear import Linear

ALL_STAGES = (1, 2, 3, 4)


class PatchEmbeddingAlignment(nn.Module):
    """Projects the student's patch embeddings to the teacher's width, one Linear a stage.

    `stages` names the stages that are aligned. As published the projections are numbered from 1 in the order of
    `stages`, so that a single one is `embed1_linearproject` whichever stage it serves.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        for n, i in enumerate(self.stages, start=1):
            projection = Linear(student_channels[i - 1], teacher_channels[i - 1])
            setattr(self, f"embed{n}_linearproject", projection)

    def forward(self, images: Tensor, student: SegmentationOutput) -> dict[int, Tensor]:
        """Stage i -> aligned embedding P_i (B, h_i·w_i, C_T), for every stage in `stages`."""
        return {
            i: getattr(self, f"embed{n}_linearproject")(self.embedding(i, student))
            for n, i in enumerate(self.stages, start=1)
        }

    def embedding(self, stage: int, student: SegmentationOutput) -> Tensor:
        """What is projected for a stage: E_i (B, h_i·w_i, C_S). Other alignments refine it."""
        return student.embeddings[stage - 1]
