"""Segmentation models: create one by name, or load one from any checkpoint that is recognised."""

from models.base import SegmentationModel, SegmentationOutput
from models.checkpoints import Checkpoint, read_checkpoint
from models.factory import MODELS, create_model
from models.loading import load_model, load_state, save_model, start_from

__all__ = [
    "MODELS",
    "Checkpoint",
    "SegmentationModel",
    "SegmentationOutput",
    "create_model",
    "load_model",
    "load_state",
    "read_checkpoint",
    "save_model",
    "start_from",
]
