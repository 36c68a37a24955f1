"""Segmentation models: create one by name, or load one from any checkpoint that is recognised."""

from models.base import SegmentationModel, SegmentationOutput
from models.checkpoints import load_backbone, load_model, load_weights, save_model
from models.factory import MODELS, create_model
from models.segformer import SegFormer

__all__ = [
    "MODELS",
    "SegFormer",
    "SegmentationModel",
    "SegmentationOutput",
    "create_model",
    "load_backbone",
    "load_model",
    "load_weights",
    "save_model",
]
