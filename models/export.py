"""A trained network for other programs: the bare student, compared with ours before it is called done.

    python -m models.export --weights FILE --format onnx        --output student.onnx [--argmax]
    python -m models.export --weights FILE --format hf          --output FOLDER
    python -m models.export --weights FILE --format mmseg       --output FOLDER
    python -m models.export --weights FILE --format safetensors --output student.safetensors
    python -m models.export --weights FILE --format torch       --output student.pth

FILE is any checkpoint that is recognised, distilled or not.
    onnx          one file: `images` (batch, 3, height, width), RGB in [0, 1], any batch and size, to `logits`
                  (batch, classes, ceil(height/4), ceil(width/4)), or with --argmax to `classes` (batch, …) of uint8,
                  "ignore" never among them
    hf            a folder for SegformerForSemanticSegmentation.from_pretrained, with image processor and model card
    mmseg         a folder with checkpoint and configuration for mmsegmentation 1.x: for prediction, with a decode head
                  twice as wide, because mmsegmentation's has a ReLU on every stage
    safetensors   the weights alone, as our training writes them
    torch         a state dict under the published names

hf and mmseg are for SegFormers, the others for every network; onnx and hf need
`pip install -r requirements-export.txt`.
"""

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import cli
from datasets import find_layout
from datasets.classes import Classes
from errors import UserError
from models.base import SegmentationModel
from models.checkpoints import NO_NORMALISATION, load_model, read_facts, recognise, save_model
from models.layouts.huggingface import huggingface_shape, to_huggingface
from models.layouts.mmsegmentation import to_mmseg
from models.model_card import model_card, read_run
from models.pyramid import MIN_HEIGHT
from models.segformer import CONFIGS, SegFormer

Network = Callable[
    [Tensor], Tensor
]  # images (B, 3, H, W) -> logits (B, C, h, w), or classes (B, h, w)

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
    """The file, or for hf and mmseg the folder, to write."""
    argmax: bool = False
    """onnx: predict classes (uint8) instead of logits."""
    height: int | None = None
    """hf, mmseg: the shorter side to which images are resized. Default: the run's in whose folder FILE lies, or 512."""


@dataclass
class Export:
    """What an export is about: the network, what its metadata tell, the options, the run in whose folder it lies."""

    model: SegmentationModel
    facts: dict[str, Any]
    options: Options
    recipe: dict[str, Any]
    """The run's options; empty where there is no run."""
    record: list[dict[str, Any]]
    """What the run measured."""

    @property
    def height(self) -> int:
        return self.options.height or self.recipe.get("height") or 512

    @property
    def classes(self) -> Classes | None:
        """The data set's, if it is known and these are the network's."""
        with suppress(UserError):
            classes = find_layout(self.facts.get("dataset", "cityscapes")).classes
            classes.require(self.options.weights, self.model.num_classes, self.model.class_names)
            return classes
        return None

    @property
    def class_names(self) -> list[str]:
        """Of every output; `ignore` last where the network has it, as all do that were trained here."""
        outputs = self.model.num_classes
        if self.classes:
            return list(self.classes.output_names[:outputs])
        if self.model.class_names:
            return list(self.model.class_names)
        names = [f"class {i}" for i in range(outputs)]
        return [*names[:-1], "ignore"] if "dataset" in self.facts else names

    @property
    def network(self) -> "Logits":
        """What is exported, as a function."""
        if not self.options.argmax:
            return Logits(self.model)
        names = self.class_names
        return ClassMap(self.model, len(names) - (names[-1] == "ignore"))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def main(options: Options) -> None:
    if options.argmax and options.format != "onnx":
        raise UserError(f"--argmax is for onnx; {options.format} holds weights, not a graph")
    if (endings := ENDINGS.get(options.format)) and options.output.suffix not in endings:
        raise UserError(
            f"--output {options.output} must end in {' or '.join(endings)} for --format {options.format}"
        )
    if options.height is not None and options.format not in FOLDERS:
        raise UserError(f"--height is for hf and mmseg; {options.format} takes images of any size")
    if options.height is not None and options.height < MIN_HEIGHT:
        raise UserError(
            f"--height is {options.height}; the network's four stages need at least {MIN_HEIGHT}"
        )
    if (
        options.output.exists()
        and options.weights.exists()
        and options.output.samefile(options.weights)
    ):
        raise UserError(
            f"--output {options.output} is --weights, of which an export keeps the network alone; name another"
        )
    model = load_model(options.weights)
    if options.format in FOLDERS and model.name not in CONFIGS:
        raise UserError(
            f"--format {options.format} is for SegFormers, and {model.name} is none; choose onnx, safetensors or torch"
        )
    if options.format == "hf" and not isinstance(model, SegFormer):
        raise UserError(
            f"transformers can't hold mmsegmentation's decode head of {options.weights}; choose mmseg or onnx"
        )
    facts = read_facts(options.weights)
    export = Export(model, facts, options, *read_run(options.weights, facts))
    write, reload = FORMATS[options.format]
    with placing(options.output, folder=options.format in FOLDERS) as aside:
        try:
            write(export, aside)
            found = difference(export.network, reload(aside))
        except ImportError as error:
            raise UserError(f"--format {options.format} needs {error.name}; {EXTRA}") from error
        if not found < TOLERANCE[options.format]:
            raise UserError(
                f"the exported network differs from ours by {found:.1e}; nothing was written, report this"
            )
    size = sum(
        file.stat().st_size
        for file in (options.output, *options.output.rglob("*"))
        if file.is_file()
    )
    what = (
        "share of pixels that differ"
        if options.argmax
        else "largest difference of the logits, relative"
    )
    print(
        f"{options.output}: {model.name}, {export.parameters / 1e6:.2f} M parameters, {size / 1e6:.1f} MB"
    )
    print(f"compared with ours: {what}: {found:.1e}")


class Logits(nn.Module):
    """A model of ours as a function from images to logits."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


class ClassMap(Logits):
    """A model of ours as a function from images to the likeliest of its first `num_classes` classes."""

    def __init__(self, model: SegmentationModel, num_classes: int) -> None:
        super().__init__(model)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, : self.num_classes].argmax(1).to(torch.uint8)


@torch.no_grad()
def difference(ours: Network, theirs: Network) -> float:
    """Largest difference of the logits relative to the largest logit, or share of the pixels whose classes differ."""
    generator, found = torch.Generator().manual_seed(0), []
    for size in SIZES:
        images = torch.rand(size, generator=generator)
        expected, actual = ours(images), theirs(images)
        if actual.shape != expected.shape:
            return float("inf")
        if expected.is_floating_point():
            found.append((actual - expected).abs().max() / expected.abs().max())
        else:
            found.append((actual != expected).float().mean())
    return torch.stack(found).max().item()  # nan, which Python's max would lose, is a difference


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
        raise UserError(
            f"can't write {path} ({error.strerror or error}); choose another --output"
        ) from error


# safetensors, torch ---------------------------------------------------------------------------------------------------


def write_safetensors(export: Export, path: Path) -> None:
    save_model(export.model, path, **export.facts)


def write_torch(export: Export, path: Path) -> None:
    if export.model.normalisation is not None:
        raise UserError(
            "these weights expect normalised images, and a bare state dict can't say so; use safetensors"
        )
    if recognise(export.model.state_dict()) != export.model.name:
        raise UserError(
            f"a bare state dict can't say that it is {export.model.name}; use safetensors"
        )
    path.write_bytes(packed(export.model.state_dict()))


def packed(content: dict[str, Any]) -> bytes:
    """As torch.save writes it, which to a disk that is full ends in a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def reload_weights(path: Path) -> Network:
    return Logits(load_model(path))


# ONNX -----------------------------------------------------------------------------------------------------------------


def write_onnx(export: Export, path: Path) -> None:
    """One file with dynamic batch, height and width; class names in its metadata."""
    for chatter in (
        "torch.onnx",
        "onnxscript",
    ):  # the one misses torchvision, the other tells what it leaves as it is
        logging.getLogger(chatter).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            export.network.eval(),
            (
                torch.rand(2, 3, 96, 160),
            ),  # sizes that differ, and no 1: it would be taken for a constant
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["classes" if export.options.argmax else "logits"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
        )
    assert program is not None  # for dynamo=True it is an ONNXProgram
    program.model.metadata_props.update(
        model=export.model.name,
        classes=json.dumps(export.class_names),
        images="float32 RGB in [0, 1]",
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
        if not path.is_file():
            raise UserError(f"no weights at {path}; check the path")
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.class_names: list[str] = json.loads(metadata["classes"])
        except Exception as error:  # onnxruntime's own kinds derive from nothing else
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} is no network that models.export wrote ({reason})") from error

    def __call__(self, images: Tensor) -> Tensor:
        (output,) = self.session.run(
            None, {"images": images.numpy().astype(np.float32, copy=False)}
        )
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
        "size": {"shortest_edge": export.height},
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
        raise UserError(
            f"transformers does not find all weights in the export ({report}); report this"
        )
    theirs.eval()
    normalise = load_model(folder).normalisation
    return lambda images: theirs(normalise(images) if normalise else images).logits


# mmsegmentation -------------------------------------------------------------------------------------------------------


def write_mmseg(export: Export, folder: Path) -> None:
    """`checkpoint.pth` and the `config.py` that it goes with, as `mmseg.apis.init_model` takes them."""
    folder.mkdir()
    state = to_mmseg(export.model.state_dict())
    config = mmseg_config(export, width=len(state["decode_head.fusion_conv.conv.weight"]))
    text = f'"""{export.model.name} from TransKD for mmsegmentation 1.x."""\n\n'
    text += "".join(
        f"{name} = {pformat(value, width=100, sort_dicts=False)}\n"
        for name, value in config.items()
    )
    (folder / "config.py").write_text(text)
    meta: dict[str, Any] = {
        "cfg": text,
        "facts": export.facts,
        "dataset_meta": {"classes": export.class_names},
    }
    if export.classes:
        meta["dataset_meta"]["palette"] = export.classes.palette[
            : export.model.num_classes
        ].tolist()
    (folder / "checkpoint.pth").write_bytes(packed({"meta": meta, "state_dict": state}))


def mmseg_config(export: Export, width: int) -> dict[str, Any]:
    encoder, _ = CONFIGS[export.model.name]
    normalise = export.model.normalisation or NO_NORMALISATION
    return {
        "default_scope": "mmseg",
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [255 * value for value in normalise.mean],
                "std": [255 * value for value in normalise.std],
                "bgr_to_rgb": True,  # mmcv reads BGR
                "pad_val": 0,
                "seg_pad_val": 255,
            },
            "pretrained": None,
            "backbone": {
                "type": "MixVisionTransformer",
                "embed_dims": encoder.channels[0],
                "num_stages": 4,
                "num_layers": list(encoder.depths),
                "num_heads": list(encoder.heads),
                "patch_sizes": [7, 3, 3, 3],
                "sr_ratios": list(encoder.sr_ratios),
                "out_indices": (0, 1, 2, 3),
                "mlp_ratio": encoder.mlp_ratios[0],
                "qkv_bias": True,
                "drop_path_rate": 0.1,
            },
            "decode_head": {
                "type": "SegformerHead",
                "in_channels": list(encoder.channels),
                "in_index": [0, 1, 2, 3],
                "channels": width,
                "dropout_ratio": 0.1,
                "num_classes": export.model.num_classes,
                "norm_cfg": {"type": "BN", "requires_grad": True},
                "align_corners": False,
                "loss_decode": {
                    "type": "CrossEntropyLoss",
                    "use_sigmoid": False,
                    "loss_weight": 1.0,
                },
            },
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        },
        "test_pipeline": [
            {"type": "LoadImageFromFile"},
            {
                "type": "Resize",
                "scale": (16 * export.height, export.height),
                "keep_ratio": True,
                "backend": "pillow",
            },
            {"type": "PackSegInputs"},
        ],
    }


def reload_onnx(path: Path) -> Network:
    return OnnxNetwork(path)


FORMATS: dict[str, tuple[Callable[[Export, Path], None], Callable[[Path], Network]]] = {
    "hf": (write_huggingface, reload_huggingface),
    "mmseg": (write_mmseg, reload_weights),
    "onnx": (write_onnx, reload_onnx),
    "safetensors": (write_safetensors, reload_weights),
    "torch": (write_torch, reload_weights),
}
ENDINGS = {"onnx": (".onnx",), "safetensors": (".safetensors",), "torch": (".pth", ".pt")}
FOLDERS = ("hf", "mmseg")
# transformers' LayerNorm has another eps; onnxruntime and mmsegmentation's head add in another order; the others hold
# the very same numbers
TOLERANCE = {"hf": 1e-3, "mmseg": 1e-4, "onnx": 1e-4, "safetensors": 1e-12, "torch": 1e-12}


if __name__ == "__main__":
    cli.run(main, Options)
