"""Segmentation models: create one by name, or load one from any checkpoint that is recognised."""

from models.checkpoints import load_backbone, load_model, load_weights, save_model
from models.factory import MODELS, create_model
from models.segformer import SegFormer, SegmentationOutput

__all__ = [
    "MODELS",
    "SegFormer",
    "SegmentationOutput",
    "create_model",
    "load_backbone",
    "load_model",
    "load_weights",
    "save_model",
]
