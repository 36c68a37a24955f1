"""What TransKD adds to a student while it learns: fusion of features, alignment of patch
embeddings, losses."""

from models.distillation.csf import CrossSelectiveFusion
from models.distillation.distiller import Distiller, LogitsLoss, TransKD
from models.distillation.embedding_assistant import EmbeddingAssistant
from models.distillation.gl_mixer import GLMixer
from models.distillation.pea import PatchEmbeddingAlignment

__all__ = [
    "CrossSelectiveFusion",
    "Distiller",
    "EmbeddingAssistant",
    "GLMixer",
    "LogitsLoss",
    "PatchEmbeddingAlignment",
    "TransKD",
]
