"""A trained network for other programs: the bare student, compared with ours before it is done.

    python -m models.export --weights FILE --format onnx        --output student.onnx [--argmax]
    python -m models.export --weights FILE --format hf          --output FOLDER
    python -m models.export --weights FILE --format safetensors --output student.safetensors
    python -m models.export --weights FILE --format torch       --output student.pth

    onnx          `images` (batch, 3, height, width), RGB in [0, 1], any batch and size, to `logits`
                  (batch, classes, ceil(height/4), ceil(width/4)), or with --argmax to `classes`
                  (batch, …) of uint8, "ignore" never among them
    hf            a folder for SegformerForSemanticSegmentation.from_pretrained, with image
                  processor and model card; for SegFormers with SegFormer's own head
    safetensors   the weights alone, as our training writes them
    torch         a state dict under the published names

onnx and hf need `pip install -r requirements/export.txt`. Every format carries the height of
training.
"""

import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import cli
from datasets import LAYOUTS
from datasets.images import read_photograph
from datasets.samples import images_below
from datasets.transforms import resize_image
from errors import UserError
from files import atomic_write
from models import hub
from models.base import SegmentationModel
from models.checkpoints import Checkpoint, read_checkpoint
from models.layouts.huggingface import architecture, to_huggingface
from models.loading import load_model, metadata_of, pickled, save_model
from models.model_card import model_card
from models.onnx_file import OnnxModel, quantise
from models.segformer import SegFormer

# Images (B, 3, H, W) -> logits (B, C, h, w), or classes (B, h, w).
Network = Callable[[Tensor], Tensor]
# Sizes of the images on which an export must agree with ours.
SIZES = ((2, 3, 64, 96), (1, 3, 97, 131))
# Relative to the largest logit. transformers' LayerNorm has another eps, and onnxruntime adds in
# another order; the others hold the very same numbers.
TOLERANCE = {"hf": 1e-3, "onnx": 1e-4, "safetensors": 1e-12, "torch": 1e-12}
ENDINGS = {"hf": "", "onnx": ".onnx", "safetensors": ".safetensors", "torch": ".pth"}


@dataclass(kw_only=True)
class Options:
    """Write a trained network in a format that other programs read."""

    weights: Path
    """A checkpoint: ours, a released one, or a Hugging Face folder or name."""
    format: Literal["hf", "onnx", "safetensors", "torch"]
    """What to write."""
    output: Path
    """The file, or for hf the folder, to write."""
    argmax: bool = False
    """For onnx: predict classes (uint8) instead of logits."""
    int8: Path | None = None
    """For onnx: quantise to 8 bits, by activations on the photographs of this folder."""
    push: str | None = None
    """For hf: upload the folder to this repository of the hub, user/name."""


class ImagesToLogits(nn.Module):
    """A model of ours whose output is one tensor: logits or, with `argmax`, classes."""

    def __init__(self, model: SegmentationModel, argmax: bool = False) -> None:
        super().__init__()
        self.model = model
        self.argmax = argmax

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w), or (B, h, w) uint8, "ignore" never among them."""
        logits = self.model(images).logits
        if not self.argmax:
            return logits
        # Released weights tell no names, and have an output for "ignore" as ours have.
        names, outputs = self.model.class_names, self.model.num_classes
        known = [layout.classes.num_outputs for layout in LAYOUTS.values()]
        has_ignore = outputs in known if names is None else names[-1] == "ignore"
        return logits[:, : outputs - has_ignore].argmax(1).to(torch.uint8)


def main(options: Options) -> None:
    output = options.output.expanduser()
    if ENDINGS[options.format] not in ("", output.suffix):
        raise UserError(f"--output {output} must end in {ENDINGS[options.format]}")
    for_onnx = options.int8 or options.argmax
    if (for_onnx and options.format != "onnx") or (options.push and options.format != "hf"):
        raise UserError("--int8 and --argmax are for --format onnx, --push for hf")
    if options.format == "hf" and output.exists():
        raise UserError(f"{output} is there already; name a new folder, or remove it")
    photographs = sorted(images_below(options.int8.expanduser())) if options.int8 else []
    if options.int8 and not photographs:
        raise UserError(f"no photograph in {options.int8}; name a folder of some for --int8")
    checkpoint = read_checkpoint(options.weights)
    model = load_model(checkpoint)
    if options.format == "hf" and not isinstance(model, SegFormer):
        raise UserError("transformers has no such network; choose onnx, safetensors or torch")
    network = ImagesToLogits(model, options.argmax)
    with atomic_write(output) as temporary:
        try:
            exported = WRITERS[options.format](network, checkpoint, temporary)
        except ImportError as error:
            raise UserError(
                f"this format needs {error.name}; pip install -r requirements/export.txt"
            ) from error
        deviation = difference(network, exported)
        if not deviation < TOLERANCE[options.format]:
            raise UserError(
                f"the exported network differs from ours by {deviation:.1e}; nothing was written"
            )
        if options.int8 is not None:
            height = checkpoint.facts.get("height", 512)
            resized = (np.asarray(resize_image(read_photograph(f), height)) for f in photographs)
            quantise(temporary, resized)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{output}: {model.name}, {millions:.2f} M parameters")
    of = "pixels" if network.argmax else "the largest logit"
    when = ", before it was rounded to 8 bits" if options.int8 else ""
    print(f"largest difference from ours: {deviation:.1e} of {of}{when}")
    if options.push is not None:
        print(hub.upload(output, options.push))


def class_names(model: SegmentationModel) -> list[str]:
    """One for each output; numbers where the weights tell no names."""
    return list(model.class_names or (f"class {i}" for i in range(model.num_classes)))


@torch.no_grad()
def difference(ours: Network, theirs: Network) -> float:
    """Largest difference relative to the largest logit, or share of pixels whose classes differ."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for size in SIZES:
        images = torch.rand(size, generator=generator)
        expected, actual = ours(images), theirs(images)
        if expected.is_floating_point():
            differences.append((actual - expected).abs().max() / expected.abs().max())
        else:
            differences.append((actual != expected).float().mean())
    # NaN, which Python's max would lose, is a difference.
    return torch.stack(differences).max().item()


def write_safetensors(network: ImagesToLogits, checkpoint: Checkpoint, path: Path) -> Network:
    save_model(network.model, path, **checkpoint.facts)
    return ImagesToLogits(load_model(path))


def write_torch(network: ImagesToLogits, checkpoint: Checkpoint, path: Path) -> Network:
    """A plain state dict. Its attribute `_metadata` says what safetensors' header says.

    torch writes that along and ignores what it doesn't know there, so the published code loads the
    file as it is.
    """
    state: Any = OrderedDict(network.model.state_dict())
    metadata = metadata_of(network.model, **checkpoint.facts)
    state._metadata = {"": {"version": 1, "transkd": metadata}}
    path.write_bytes(pickled(state))
    return ImagesToLogits(load_model(path))


def write_onnx(network: ImagesToLogits, checkpoint: Checkpoint, path: Path) -> Network:
    """One file with dynamic batch, height and width; class names and facts in its metadata."""
    for chatter in ("torch.onnx", "onnxscript"):  # they tell of torchvision, and of what they skip
        logging.getLogger(chatter).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            network.eval(),
            (torch.rand(2, 3, 96, 160),),  # sizes that differ, and no 1, which would be a constant
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["classes" if network.argmax else "logits"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
        )
    assert program is not None  # with dynamo=True it is an ONNXProgram
    program.model.metadata_props.update(
        model=network.model.name,
        classes=json.dumps(class_names(network.model)),
        facts=json.dumps(checkpoint.facts),
        images="float32 RGB in [0, 1]",
    )
    program.save(path, external_data=False)
    loaded = OnnxModel(path)
    return lambda images: loaded(images).logits


def write_huggingface(network: ImagesToLogits, checkpoint: Checkpoint, folder: Path) -> Network:
    """Weights, `config.json`, `preprocessor_config.json` and model card, read by transformers."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.utils import logging as chatter

    model = network.model
    names = class_names(model)
    SegformerConfig(
        architectures=["SegformerForSemanticSegmentation"],
        **architecture(model.name),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    ).save_pretrained(folder)
    state = {key: value.contiguous() for key, value in to_huggingface(model.state_dict()).items()}
    (folder / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    normalise = model.normalisation
    processor: dict[str, Any] = {  # what is not said here it does as we do
        "image_processor_type": "SegformerImageProcessor",
        "size": {"shortest_edge": checkpoint.facts.get("height", 512)},
        "do_normalize": normalise is not None,
    }
    if normalise is not None:
        processor |= {"image_mean": list(normalise.mean), "image_std": list(normalise.std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(model, checkpoint), encoding="utf-8")

    chatter.disable_progress_bar()
    theirs = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    return lambda images: theirs(normalise(images) if normalise else images).logits


WRITERS = {
    "hf": write_huggingface,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
    "torch": write_torch,
}
"""Each writes a file or folder, and returns the network that it reads back from there."""


if __name__ == "__main__":
    cli.run(main, Options)
