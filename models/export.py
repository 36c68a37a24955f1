"""A trained network for other programs: the bare student, compared with ours before it is called done.

    python -m models.export --weights FILE --format onnx        --output student.onnx [--argmax]
    python -m models.export --weights FILE --format hf          --output FOLDER
    python -m models.export --weights FILE --format safetensors --output student.safetensors
    python -m models.export --weights FILE --format torch       --output student.pth

FILE is any checkpoint that is recognised, distilled or not.
    onnx          one file: `images` (batch, 3, height, width), RGB in [0, 1], any batch and size, to `logits`
                  (batch, classes, ceil(height/4), ceil(width/4)), or with --argmax to `classes` (batch, …) of uint8
    hf            a folder for SegformerForSemanticSegmentation.from_pretrained, with image processor and model card
    safetensors   the weights alone, as our training writes them
    torch         a state dict under the published names
mmsegmentation's SegFormer has a head of its own (BatchNorm and ReLU on every stage), which these weights don't fit.
onnx and hf need `pip install -r requirements-export.txt`.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import cli
from cli import UserError
from datasets import find_layout
from models.base import SegmentationModel
from models.checkpoints import huggingface_shape, load_model, read_weights, save_model, to_huggingface
from models.segformer import CONFIGS

Network = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, C, h, w), or classes (B, h, w)

SIZES = ((2, 3, 64, 96), (1, 3, 97, 131))  # on which an export must agree with ours
EXTRA = "pip install -r requirements-export.txt"


@dataclass(kw_only=True)
class Options:
    """Write a trained network in a format that other programs read."""

    weights: Path
    """A checkpoint: ours, a released one, or a Hugging Face folder; only the network itself is used."""
    format: Literal["hf", "onnx", "safetensors", "torch", "mmseg"]
    """What to write."""
    output: Path
    """The file, or for hf the folder, to write."""
    argmax: bool = False
    """onnx: predict classes (uint8) instead of logits."""
    height: int = 512
    """hf: the shorter side to which the image processor resizes, as in training."""


@dataclass
class Export:
    """What an export is about: the network, what its metadata tell, and the options."""

    model: SegmentationModel
    facts: dict[str, Any]
    options: Options

    @property
    def class_names(self) -> list[str]:
        """Of every output; `ignore` last where the network has it."""
        outputs, classes = self.model.num_classes, find_layout(self.facts.get("dataset", "cityscapes")).classes
        if outputs in (classes.num_classes, classes.num_outputs):
            return [*classes.names, "ignore"][:outputs]
        return [f"class {i}" for i in range(outputs)]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def main(options: Options) -> None:
    if options.format == "mmseg":
        raise UserError(
            "mmsegmentation's SegFormer head has BatchNorm and ReLU on every stage and can't hold these weights; "
            "choose hf, onnx, safetensors or torch"
        )
    if options.argmax and options.format != "onnx":
        raise UserError(f"--argmax is for onnx; {options.format} holds weights, not a graph")
    if (endings := ENDINGS.get(options.format)) and options.output.suffix not in endings:
        raise UserError(f"--output {options.output} must end in {' or '.join(endings)} for --format {options.format}")
    model = load_model(options.weights)
    if options.format in ("hf", "onnx") and model.name not in CONFIGS:
        raise UserError(f"--format {options.format} is for SegFormers, and {model.name} is none; choose safetensors")
    _, metadata = read_weights(options.weights)
    export = Export(model, json.loads(metadata.get("facts", "{}")), options)
    write, reload = FORMATS[options.format]
    with placing(options.output, folder=options.format == "hf") as aside:
        try:
            write(export, aside)
            found = difference(ClassMap(model) if options.argmax else Logits(model), reload(aside))
        except ImportError as error:
            raise UserError(f"--format {options.format} needs {error.name}; {EXTRA}") from error
        if not found < TOLERANCE[options.format]:
            raise UserError(f"the exported network differs from ours by {found:.1e}; nothing was written, report this")
    size = sum(file.stat().st_size for file in (options.output, *options.output.rglob("*")) if file.is_file())
    what = "share of pixels that differ" if options.argmax else "largest difference of the logits, relative"
    print(f"{options.output}: {model.name}, {export.parameters / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")
    print(f"compared with ours: {what}: {found:.1e}")


class Logits(nn.Module):
    """A model of ours as a function from images to logits."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


class ClassMap(Logits):
    """A model of ours as a function from images to the likeliest classes."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).argmax(1).to(torch.uint8)


@torch.no_grad()
def difference(ours: Network, theirs: Network) -> float:
    """Largest difference of the logits relative to the largest logit, or share of the pixels whose classes differ."""
    generator, found = torch.Generator().manual_seed(0), 0.0
    for size in SIZES:
        images = torch.rand(size, generator=generator)
        expected, actual = ours(images), theirs(images)
        if actual.shape != expected.shape:
            return float("inf")
        if expected.is_floating_point():
            found = max(found, ((actual - expected).abs().max() / expected.abs().max()).item())
        else:
            found = max(found, (actual != expected).float().mean().item())
    return found


@contextmanager
def placing(path: Path, *, folder: bool) -> Iterator[Path]:
    """A path of the same name beside `path`, which takes its place when the block ends well.

    Raises:
        UserError: there is something that would be lost, or it can't be written.
    """
    if path.is_dir() and not folder:
        raise UserError(f"{path} is a folder; give --output a file")
    if folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; give --output a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as beside:
            aside = Path(beside) / path.name
            yield aside
            aside.replace(path)
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror or error}); choose another --output") from error


# safetensors, torch ---------------------------------------------------------------------------------------------------


def write_safetensors(export: Export, path: Path) -> None:
    save_model(export.model, path, **export.facts)


def write_torch(export: Export, path: Path) -> None:
    if export.model.normalisation is not None:
        raise UserError("these weights expect normalised images, and a bare state dict can't say so; use safetensors")
    torch.save(export.model.state_dict(), path)


def reload_weights(path: Path) -> Network:
    return Logits(load_model(path))


# ONNX -----------------------------------------------------------------------------------------------------------------


def write_onnx(export: Export, path: Path) -> None:
    """One file with dynamic batch, height and width; class names in its metadata."""
    argmax = export.options.argmax
    network = (ClassMap if argmax else Logits)(export.model).eval()
    for chatter in ("torch.onnx", "onnxscript"):  # the one misses torchvision, the other tells what it leaves as it is
        logging.getLogger(chatter).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            network,
            (torch.rand(2, 3, 96, 160),),  # sizes that differ, and no 1: it would be taken for a constant
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["classes" if argmax else "logits"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
        )
    assert program is not None  # for dynamo=True it is an ONNXProgram
    program.model.metadata_props.update(
        model=export.model.name, classes=json.dumps(export.class_names), images="float32 RGB in [0, 1]"
    )
    program.save(path, external_data=False)


class OnnxNetwork:
    """An ONNX file of ours in onnxruntime, on the CPU: images to logits, or to classes where it was exported so.

    Raises:
        UserError: no onnxruntime, or no network of ours.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path} needs onnxruntime; {EXTRA}") from error
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.class_names: list[str] = json.loads(metadata["classes"])
        except Exception as error:  # onnxruntime's own kinds derive from nothing else
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} is no network that models.export wrote ({reason})") from error

    def __call__(self, images: Tensor) -> Tensor:
        (output,) = self.session.run(None, {"images": images.numpy().astype(np.float32, copy=False)})
        return torch.from_numpy(output)


# Hugging Face ---------------------------------------------------------------------------------------------------------


def write_huggingface(export: Export, folder: Path) -> None:
    """`model.safetensors`, `config.json`, `preprocessor_config.json` and the model card."""
    model = export.model
    from transformers import SegformerConfig

    names = export.class_names
    SegformerConfig(
        architectures=["SegformerForSemanticSegmentation"],
        **huggingface_shape(model.name),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    ).save_pretrained(folder)
    state = {key: value.contiguous() for key, value in to_huggingface(model.state_dict()).items()}
    (folder / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    normalise = model.normalisation
    processor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": export.options.height},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": normalise is not None,
        "do_reduce_labels": False,
    }
    if normalise is not None:
        processor |= {"image_mean": list(normalise.mean), "image_std": list(normalise.std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(export))


def reload_huggingface(folder: Path) -> Network:
    """Through transformers, as its users load it; the normalisation of the image processor included."""
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    loaded: Any = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    theirs, report = loaded
    if any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise UserError(f"transformers does not find all weights in the export ({report}); report this")
    theirs.eval()
    normalise = load_model(folder).normalisation
    return lambda images: theirs(normalise(images) if normalise else images).logits


CARD = """\
---
library_name: transformers
pipeline_tag: image-segmentation
license: other
tags: [segformer, semantic-segmentation, knowledge-distillation, transkd]
---

# {title}

{model} with {classes} outputs, {parameters:.2f} M parameters, for semantic segmentation{training}.
{method}

```python
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = SegformerForSemanticSegmentation.from_pretrained(FOLDER)
image = Image.open("street.jpg").convert("RGB")
outputs = model(**processor(image, return_tensors="pt"))
(labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])
```

- **Input**: RGB, shorter side {height} pixels, {input}. transformers from version 5 resizes by the shorter side.
- **Output**: logits at a quarter of the input's size; {labels}.
- **Result**: {result}
- **Exactness**: transformers adds 1e-5 in every LayerNorm where SegFormer was trained with 1e-6 in most; the logits
  differ from the original's by about 1e-5 of the largest.
- **Licence**: weights keep the terms of what they were trained from. NVIDIA's MiT ImageNet weights are for research,
  not commercial use; Cityscapes and ACDC have licences of their own for non-commercial use. Set `license` above
  accordingly before you publish this.
"""


def model_card(export: Export) -> str:
    facts, model = export.facts, export.model
    method = facts.get("method")
    distilled = method is not None and method.startswith("TransKD")
    score = facts.get("mean_iou")
    return CARD.format(
        title=f"{model.name}, {method or 'TransKD'}",
        model=model.name,
        classes=model.num_classes,
        parameters=export.parameters / 1e6,
        training=f", trained on {facts['dataset']}" if "dataset" in facts else "",
        method=f"Trained by {method} of TransKD (Liu et al., arXiv 2202.13393); only the student is here."
        if distilled
        else "Exported from a PyTorch implementation of TransKD (Liu et al., arXiv 2202.13393).",
        height=export.options.height,
        input="scaled to [0, 1]" + (", then normalised" if model.normalisation else ", not normalised"),
        labels="the last one is `ignore`" if export.class_names[-1] == "ignore" else "one for each class",
        result="none is recorded in these weights."
        if score is None
        else f"{100 * score:.2f} % mIoU on the validation split after step {facts.get('step', '?')}, on maps of a "
        "quarter of the input's size.",
    )


def reload_onnx(path: Path) -> Network:
    return OnnxNetwork(path)


FORMATS: dict[str, tuple[Callable[[Export, Path], None], Callable[[Path], Network]]] = {
    "hf": (write_huggingface, reload_huggingface),
    "onnx": (write_onnx, reload_onnx),
    "safetensors": (write_safetensors, reload_weights),
    "torch": (write_torch, reload_weights),
}
ENDINGS = {"onnx": (".onnx",), "safetensors": (".safetensors",), "torch": (".pth", ".pt")}  # hf writes a folder
# transformers' LayerNorm has another eps; onnxruntime adds in another order; the others hold the very same numbers
TOLERANCE = {"hf": 1e-3, "onnx": 1e-4, "safetensors": 1e-12, "torch": 1e-12}


if __name__ == "__main__":
    cli.run(main, Options)
