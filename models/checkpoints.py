"""Weights in and out: every foreign layout is recognised by its keys, stripped, renamed and loaded in full or refused.

Nothing is ever unpickled but tensors and numbers: `.safetensors`, or `torch.load(..., weights_only=True)`.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datasets import LAYOUTS
from datasets.classes import named, plain
from errors import UserError
from files import atomic_write
from models import lvt, pvtv2, segformer
from models.base import Normalisation, SegmentationModel
from models.factory import BUILDERS, MODELS, create_model
from models.layouts import State, huggingface, mmsegmentation, timm
from models.segformer import ReLUHeadSegFormer

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NO_NORMALISATION = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# Under these a training framework nests the weights in its checkpoint; ours, with --ema, those that it validates.
CONTAINERS = ("averaged", "model", "state_dict", "model_state_dict", "state_dict_ema")
# What a pickle may call beside torch's own: numpy's numbers, as which many checkpoints keep their best score. numpy 1
# and 2 have two names for it.
NUMBERS: list[Any] = [
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
    *(
        np.dtype,
        *(
            type(np.dtype(code))
            for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"
        ),
    ),
]
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's, torch.compile's
# The modules that the published scripts save beside `student.`: CSF, Knowledge Review, PEA, GL-Mixer, EA; ours, CWD's.
DISTILLATION_KEYS = re.compile(
    r"(fusion\.|alignment\.)?(skfs|abfs|embed\d_linearproject|attn4|conv[12]|fuse_weights|patch_embed\d|projection)\."
    r"|(alignment\.)?(atten|conv)_weight$"
)
RELU_HEAD = "decode_head."  # mmsegmentation's
HEAD_KEYS = ("linear_c", "linear_fuse.", "linear_pred.", "neck.", "head.", RELU_HEAD)
CLASSIFIERS = (
    "linear_pred.weight",
    "head.conv_seg.weight",
    "decode_head.conv_seg.weight",
)  # (classes, …)
# The encoders, and how they name stage i's blocks and its patch embedding. PVTv2's ImageNet files are bare encoders;
# its B5 is the very network of MiT's and goes by SegFormer's name.
ENCODERS: tuple[tuple[Mapping[str, Any], str, str], ...] = (
    (
        {name: config for name, (config, _) in segformer.CONFIGS.items()},
        "block{i}",
        "patch_embed{i}",
    ),
    (pvtv2.CONFIGS, "block{i}", "patch_embed{i}"),
    (pvtv2.CONFIGS, "backbone.block{i}", "backbone.patch_embed{i}"),
    (lvt.CONFIGS, "backbone.{from_0}.1", "backbone.{from_0}.0"),
)
# What training tells `save_model`, and exports rely on.
FACTS: dict[str, Any] = {
    "method": str,
    "dataset": str,
    "height": int,
    "step": int,
    "mean_iou": int | float,
}
FOLDER_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoint.pth",
)  # the weights of a folder


def read_weights(path: Path | str) -> tuple[State, dict[str, str]]:
    """A checkpoint's tensors, and what it tells about them.

    The metadata are those of `metadata_of`, from our safetensors files and our training's checkpoints. Of
    mmsegmentation's files they have `class_names`, in the same form, and `config`, a text.

    A folder is taken for one that Hugging Face's `save_pretrained` wrote, or `models.export` for mmsegmentation.

    Raises:
        UserError: no such file, unreadable, or something in it is not a tensor.
    """
    given, path = Path(path), weights_file(path)
    if not path.is_file():
        inside = ", ".join(sorted(file.name for file in given.glob("*.safetensors")))
        hint = (
            f"name a file there ({inside})"
            if inside
            else "check the path, or see the model zoo in README.md"
        )
        raise UserError(f"no weights at {given if inside else path}; {hint}")
    if path.suffix == ".onnx":
        raise UserError(
            f"{path} is for eval/predict.py alone; name the weights that it was exported from"
        )
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    try:
        with torch.serialization.safe_globals(NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong comes as an exception too
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if called := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} does not hold tensors alone (reading it would call {called[1]}); "
                "if you trust it, save its state dict alone with the library that wrote it"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        if "TorchScript" in reason:
            reason = "it is a TorchScript program"
        elif not isinstance(
            error, RuntimeError | OSError | EOFError
        ):  # torch's own text is a page on its flags
            reason = "it is no PyTorch checkpoint"
        raise UserError(
            f"{path} can't be read as weights ({reason}); fetch or save it again"
        ) from error
    metadata = _told(content)
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    strangers = [str(k) for k, v in content.items() if not (isinstance(k, str) and _is_plain(v))]
    if strangers or not content:
        raise UserError(f"{path} is not a state dict: {_some(strangers) or 'it is empty'}")
    return dict(content), metadata


def _is_plain(value: object) -> bool:
    """Whether it is a tensor as networks have them: real numbers, in place."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_complex())


def weights_file(path: Path | str) -> Path:
    """The file that holds the weights of a file or folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next(
        (path / name for name in FOLDER_FILES if (path / name).is_file()), path / FOLDER_FILES[0]
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); fetch or save it again"
        ) from error


def read_facts(path: Path | str) -> dict[str, Any]:
    """What training told beside a network; empty for files from elsewhere.

    Raises:
        UserError: as `read_weights`.
    """
    metadata = {} if Path(path).suffix == ".onnx" else read_weights(path)[1]
    text = metadata.get("facts", "{}")
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        print(
            f"warning: the facts in {path} can't be understood and are left out ({text[:60]!r})",
            file=sys.stderr,
        )
        return {}
    return {key: value for key, value in facts.items() if isinstance(value, FACTS.get(key, object))}


def _told(content: object) -> dict[str, str]:
    """What a checkpoint has to say beside its weights, as strings."""
    told = content if isinstance(content, Mapping) else {}
    ours, meta = (
        part if isinstance(part := told.get(key), Mapping) else {} for key in ("metadata", "meta")
    )
    config, dataset = (
        meta.get("cfg", meta.get("config")),
        meta.get("dataset_meta"),
    )  # mmsegmentation 1.x, 0.x
    names = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    found = {**ours, "config": config}
    if isinstance(names, list | tuple):
        found["class_names"] = json.dumps([str(name) for name in names])
    return {key: value for key, value in found.items() if isinstance(value, str)}


def strip_wrappers(state: State) -> State:
    """The bare network of a checkpoint: without `WRAPPERS`, `student.` and the distillation modules beside it."""
    while wrapper := next(
        (w for w in WRAPPERS if state and all(key.startswith(w) for key in state)), None
    ):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    student = {
        key.removeprefix("student."): v for key, v in state.items() if key.startswith("student.")
    }
    if not student:
        return state
    # A key that is neither the student's nor a known module's stays, so that loading refuses it by name.
    others = {
        k: v
        for k, v in state.items()
        if not k.startswith("student.") and not DISTILLATION_KEYS.match(k)
    }
    return student | others


class Told(NamedTuple):
    """What a checkpoint tells about its network."""

    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    model: str | None = None
    """The model's name, in our own files."""

    def to(self, model: SegmentationModel) -> None:
        model.normalisation, model.class_names = self.normalisation, self.class_names


def read_network(path: Path | str) -> tuple[State, Told]:
    """The bare network of any recognised checkpoint, under our names and with our order of classes; what it tells.

    The normalisation is in our own files under that name, as JSON; in the `preprocessor_config.json` beside Hugging
    Face's; in the configuration inside mmsegmentation's; and ImageNet's for those of its files that have none, and for
    the releases of the SegFormer repository. Class names are in our own files' `class_names`, as JSON; in the
    `config.json` beside Hugging Face's; and in the metadata of mmsegmentation's.

    Raises:
        UserError: as `read_weights`, or what is told can't be understood.
    """
    state, metadata = read_weights(path)
    state, normalisation, names = strip_wrappers(state), None, _told_names(path, metadata)
    if metadata.get("model") in BUILDERS:  # ours, whatever its keys are like
        normalisation = told_normalisation(path, metadata)
    elif huggingface.matches(state):
        state, normalisation = (
            huggingface.from_huggingface(state),
            _huggingface_normalisation(Path(path)),
        )
        names = _huggingface_names(Path(path))
    elif mmsegmentation.matches(state):
        state, normalisation = (
            mmsegmentation.from_mmseg(state),
            _mmseg_normalisation(metadata.get("config", "")),
        )
    elif timm.matches(state):
        state = timm.from_timm(state)
    elif any(
        key.startswith("decode_head.linear_pred.") for key in state
    ):  # NVIDIA's SegFormer repository
        bare = {
            key.removeprefix("backbone.").removeprefix("decode_head."): value
            for key, value in state.items()
        }
        state = {key: value for key, value in bare.items() if not key.startswith("conv_seg.")}
        normalisation = IMAGENET
    else:
        normalisation = told_normalisation(path, metadata)
    if empty := [
        key for key in CLASSIFIERS if key in state and (not state[key].dim() or not len(state[key]))
    ]:
        raise UserError(f"{path} has no class in {empty[0]}; fetch or save it again")
    state, class_names = in_our_order(state, names)
    return state, Told(normalisation, class_names, metadata.get("model"))


def in_our_order(state: State, names: Sequence[str]) -> tuple[State, tuple[str, ...] | None]:
    """The classifier's rows by the train ids of the data set that has these classes, and their names there.

    Where no data set has them all stays as it is; None for names that say nothing or are not one for each output.
    """
    weight = next((key for key in CLASSIFIERS if key in state), None)
    if weight is None or not named(names) or state[weight].shape[:1] != (len(names),):
        return state, None
    known = [
        (order, layout.classes)
        for layout in LAYOUTS.values()
        if (order := layout.classes.order(names))
    ]
    if not known:
        return state, tuple(names)
    # data sets with the same classes in orders of their own: these names may already be in one of them
    order, classes = min(known, key=lambda found: found[0] != sorted(found[0]))
    return reordered(state, order), classes.output_names[: len(names)]


def reordered(state: State, order: list[int]) -> State:
    """With the classifier's rows in this order."""
    keys = (key.replace("weight", what) for key in CLASSIFIERS for what in ("weight", "bias"))
    return state | {
        key: state[key][order] for key in keys if key in state and len(state[key]) == len(order)
    }


def told_normalisation(path: Path | str, metadata: Mapping[str, str]) -> Normalisation | None:
    """What the metadata of `path` say about the input, if anything. Raises UserError for what is no normalisation."""
    told = metadata.get("normalisation")
    try:
        return _normalisation(*json.loads(told)) if told else None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} tells a normalisation that is none ({told and told[:120]}); save it again"
        ) from error


def _told_names(path: Path | str, metadata: Mapping[str, str]) -> list[str]:
    try:
        return [name.strip() for name in json.loads(metadata.get("class_names", "[]"))]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} tells class names that are none ({error}); save it again"
        ) from error


def _huggingface_names(path: Path) -> list[str]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        labels = json.loads(file.read_text()).get("id2label", {}) if file.is_file() else {}
        return [str(labels[i]) for i in sorted(labels, key=int)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no configuration that can be understood ({error}); mend or remove it"
        ) from error


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> Normalisation | None:
    (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
    found = Normalisation((red, green, blue), (red_std, green_std, blue_std))
    if not all(map(math.isfinite, (*found.mean, *found.std))) or min(found.std) <= 0:
        raise ValueError("means must be finite, deviations above 0")
    return None if found == NO_NORMALISATION else found


def _mmseg_normalisation(config: str) -> Normalisation | None:
    """From the text of a configuration, whose means and deviations are of 0 to 255, e.g. `mean=[123.675, …]`."""
    values = []
    for name in ("mean", "std"):
        found = re.search(rf"\b{name}\W*[=:]\s*[\[(]([\d.,\s]+)[\])]", config)
        values.append(
            [float(number) / 255 for number in re.findall(r"[\d.]+", found[1])] if found else []
        )
    mean, std = values
    return _normalisation(mean, std) if len(mean) == len(std) == 3 else IMAGENET


def _huggingface_normalisation(path: Path) -> Normalisation | None:
    """What the image processor beside these weights does; theirs scales by 1/255 and normalises unless told not to."""
    file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
    if not file.is_file():
        return None
    try:
        processor = json.loads(file.read_text())
        scale = 255 * (
            processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
        )
        mean, std = NO_NORMALISATION
        if processor.get("do_normalize", True):
            mean, std = (
                processor.get("image_mean", IMAGENET.mean),
                processor.get("image_std", IMAGENET.std),
            )
        return _normalisation([x / scale for x in mean], [x / scale for x in std])
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file} is no image processor that can be understood ({error}); mend or remove it"
        ) from error


def recognise(state: State) -> str | None:
    """The name of the model whose encoder these keys and shapes are, or None."""
    for configs, block, embed in ENCODERS:
        depths, widths, ratios = [], [], []
        for i in range(1, 5):
            blocks, patches = (name.format(i=i, from_0=i - 1) for name in (block, embed))
            numbers = {
                int(m[1]) for key in state if (m := re.match(rf"{re.escape(blocks)}\.(\d+)\.", key))
            }
            proj, hidden = (
                state.get(f"{patches}.proj.weight"),
                state.get(f"{blocks}.0.mlp.fc1.weight"),
            )
            if not numbers or proj is None or not proj.dim() or not len(proj):
                break
            depths.append(max(numbers) + 1)
            widths.append(len(proj))
            ratios.append(None if hidden is None or not hidden.dim() else len(hidden) // len(proj))
        for name, config in configs.items():
            like = all(
                found in (None, ratio)
                for found, ratio in zip(ratios, config.mlp_ratios, strict=False)
            )
            if like and (list(config.depths), list(config.channels)) == (depths, widths):
                return name
    return None


def load_model(path: Path | str) -> SegmentationModel:
    """The bare network from any recognised checkpoint, distilled or not, in eval mode.

    Where the weights name their classes, `class_names` does, and those of a data set of ours are in its order.

    Raises:
        UserError: unreadable, no model we know, without a decode head, or keys that do not fit (listed).
    """
    state, told = read_network(path)
    name = told.model if told.model in BUILDERS else recognise(state)
    if name is None:
        what = (
            f"{told.model}, which models/factory.py lacks"
            if told.model
            else "no model that is known here"
        )
        raise UserError(f"{path} holds {what} ({_some(list(state))}); known: {', '.join(MODELS)}")
    classifier = next((key for key in CLASSIFIERS if key in state), None)
    if classifier is None:
        raise UserError(
            f"{path} holds {name}'s encoder without a decode head, as ImageNet checkpoints do; "
            "it can start a training, not predict"
        )
    num_classes, fusion = len(state[classifier]), state.get(f"{RELU_HEAD}fusion_conv.conv.weight")
    model: SegmentationModel
    if fusion is None:
        model = create_model(name, num_classes)
    else:
        model = ReLUHeadSegFormer(name, num_classes, width=len(fusion))
    _load(model, state, path)
    told.to(model)
    return model.eval()


def load_weights(model: SegmentationModel, path: Path | str) -> None:
    """Load a whole network, decode head included, into `model`.

    Raises:
        UserError: as `load_model`, or the file holds another model.
    """
    state, told = read_network(path)
    _load(model, state, path)
    told.to(model)


def load_backbone(model: SegmentationModel, path: Path | str) -> bool:
    """Start `model` from a checkpoint: an ImageNet encoder (its classifier is dropped) or a whole network.

    Of an mmsegmentation network the encoder is taken, and a line on stderr says so: its head is of another kind.
    Of a network of other classes, those that `model` has too are taken, by name; a line on stderr names the rest.

    Returns:
        Whether the decode head was loaded too.

    Raises:
        UserError: the encoder's keys do not fit.
    """
    state, (normalisation, names, _) = read_network(path)
    whole = any(key in state for key in CLASSIFIERS)
    wanted = model.state_dict()
    if any(key.startswith(RELU_HEAD) and key not in wanted for key in state):
        print(
            f"warning: the decode head in {path} is mmsegmentation's; the encoder alone is taken",
            file=sys.stderr,
        )
        state = {key: value for key, value in state.items() if not key.startswith(RELU_HEAD)}
    elif whole:
        _load(model, _with_classes_of(model, state, names, path), path)
        model.normalisation = normalisation
        return True
    state = {key: value for key, value in state.items() if key not in ("head.weight", "head.bias")}
    if (
        "backbone.patch_embed1.proj.weight" in wanted and "patch_embed1.proj.weight" in state
    ):  # PVTv2's bare encoder
        state = {f"backbone.{key}": value for key, value in state.items()}
    head = {key: value for key, value in wanted.items() if key.startswith(HEAD_KEYS)}
    _load(model, state | head, path)
    if whole:  # ImageNet's encoders start without, as published
        model.normalisation = normalisation
    return False


def _with_classes_of(
    model: SegmentationModel, state: State, names: Sequence[str] | None, path: Path | str
) -> State:
    """A whole network with `model`'s classes: its classifier's rows by their names, `model`'s own where it has none."""
    wanted, outputs = model.state_dict(), model.num_classes
    weight = next(key for key in CLASSIFIERS if key in state)
    count = len(state[weight])
    rows: list[int | None] = [None] * outputs
    if names and model.class_names:
        places = {plain(name): row for row, name in enumerate(names)}
        rows = [places.get(plain(name)) for name in model.class_names]
    elif count in (outputs, outputs - 1):  # nameless, but as many, with or without "ignore"
        rows[:count] = range(count)
    anew = [i for i, row in enumerate(rows) if row is None]
    if set(anew) - {outputs - 1}:
        lacking = _some([str((model.class_names or range(outputs))[i]) for i in anew])
        print(f"warning: {path} lacks the classes {lacking}; they start anew", file=sys.stderr)
    for key in (weight, weight.replace("weight", "bias")):
        theirs, ours = state.get(key), wanted.get(key)
        if (
            theirs is not None
            and ours is not None
            and theirs.shape[1:] == ours.shape[1:]
            and len(theirs) == count
        ):
            state = state | {
                key: torch.stack(
                    [ours[i] if row is None else theirs[row] for i, row in enumerate(rows)]
                )
            }
    return state


def metadata_of(model: SegmentationModel, **facts: Any) -> dict[str, str]:
    """What goes with a network's weights wherever they are written: `facts`, as JSON, and what it needs to be used."""
    metadata = {
        "facts": json.dumps(facts),
        "model": model.name,
        "num_classes": str(model.num_classes),
    }
    if model.normalisation is not None:
        metadata["normalisation"] = json.dumps(model.normalisation)
    if model.class_names is not None:
        metadata["class_names"] = json.dumps(model.class_names)
    return metadata


def save_model(model: SegmentationModel, path: Path, **facts: Any) -> None:
    """Write the bare network as safetensors, whole or not at all; `facts` go into its metadata."""
    metadata = {"format": "pt"} | metadata_of(model, **facts)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as aside:
        aside.write_bytes(save(state, metadata))


def _load(model: SegmentationModel, state: State, path: Path | str) -> None:
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    misfits = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unknown or misfits:
        found = recognise(state)
        looks = f"; it looks like {found}" if found and found != model.name else ""
        if any(key.startswith(RELU_HEAD) for key in unknown) and not any(
            key.startswith(RELU_HEAD) for key in wanted
        ):
            looks += "; its decode head is mmsegmentation's"
        parts = [("missing", missing), ("unknown", unknown), ("of another shape", misfits)]
        detail = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys)
        raise UserError(
            f"{path} does not fit {model.name} with {model.num_classes} classes{looks} ({detail})"
        )
    if lost := [
        key for key, value in wanted.items() if not state[key].to(value.dtype).isfinite().all()
    ]:
        raise UserError(
            f"{path} holds NaN or infinity ({_some(lost)}); its training failed: take an earlier one"
        )
    model.load_state_dict(state)


def _some(items: list[str], most: int = 8) -> str:
    """The first few items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
