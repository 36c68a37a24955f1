"""ONNX files that `models.export` writes: run by onnxruntime on the CPU, and rounded to 8 bits."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError, require
from models.base import SegmentationOutput
from models.checkpoints import find_file


class OnnxModel(nn.Module):
    """An ONNX file in the place of a model: its output has logits alone.

    If it was exported with `--argmax`, these are classes (B, h, w) instead.

    Raises UserError if there is no such file, it is no network of ours, or onnxruntime is not
    installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path = find_file(path.expanduser())
        require("onnxruntime", "-r requirements/export.txt")
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.class_names = tuple(json.loads(metadata["classes"]))  # one for each output
            self.facts: dict[str, Any] = json.loads(metadata.get("facts", "{}"))
        except Exception as error:  # onnxruntime's own exceptions derive from nothing else
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} is no network that models.export wrote ({reason})") from error
        self.num_classes = len(self.class_names)
        self.order: list[int] | None = None
        self.predicts_classes = self.session.get_outputs()[0].name == "classes"

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Images (B, 3, H, W), RGB in [0, 1] -> logits (B, classes, h, w), or classes (B, h, w)."""
        inputs = {"images": images.cpu().numpy().astype(np.float32, copy=False)}
        (output,) = self.session.run(None, inputs)
        if self.order is not None:
            if self.predicts_classes:
                output = np.argsort(self.order).astype(output.dtype)[output]
            else:
                output = output[:, self.order]
        return SegmentationOutput(torch.from_numpy(output), (), ())

    def reorder(self, order: list[int]) -> None:
        """Put the outputs into another order, as `SegmentationModel.reorder` does."""
        self.order = None if order == sorted(order) else order


def quantise(path: Path, photographs: Iterator[np.ndarray]) -> None:
    """Round an ONNX file to 8 bits, in place; activations' ranges are those on photographs.

    Args:
        photographs: RGB in [0, 255], (H, W, 3); a hundred are enough.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = (np.asarray(pixels, np.float32).transpose(2, 0, 1) / 255 for pixels in photographs)
    inputs = ({"images": image[None]} for image in images)  # (1, 3, H, W)

    class Photographs(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(inputs, None)

    quant_pre_process(path, path, skip_symbolic_shape=True)
    logging.disable(logging.WARNING)  # it warns that a LayerNorm's weight has no channels
    quantize_static(
        path,
        path,
        Photographs(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)
