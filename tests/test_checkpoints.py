"""Weights in and out: every layout gives the same network, with the input that its file tells.

Everything else is refused in one line that names it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from datasets.classes import CITYSCAPES
from errors import UserError
from models import MODELS, create_model, load_model, read_checkpoint, save_model, start_from
from models.factory import recognise
from models.info import build
from models.layouts import IMAGENET
from models.layouts.huggingface import architecture, to_huggingface
from tests.golden_data import published_key, seed

State = dict[str, Tensor]
Log = pytest.LogCaptureFixture
NETWORK = seed(create_model("segformer_b0")).eval()
PLAIN = NETWORK.state_dict()
OTHER = create_model("segformer_b0").state_dict()
IMAGES = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, images: Tensor = IMAGES) -> Tensor:
    return model(images).logits


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# As our training writes a distilled network: the student, and the modules beside it.
DISTILLED = build("TransKD_EA").state_dict() | prefixed("student.", PLAIN)
RELEASED = {f"module.{published_key(key)}": value for key, value in DISTILLED.items()}
BESIDE = {"epoch": 3, "arch": "SegFormer", "best": torch.tensor(0.5), "optimizer": {"state": {}}}
SCORES = {"best_acc": np.float64(0.5), "iou": np.float32(0.5), "step": np.int64(7)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "wrapped": prefixed("module.model._orig_mod.", PLAIN) | {"n_averaged": torch.tensor(3)},
    "numbers_of_numpy": BESIDE | SCORES | {"model": "segformer_b0", "state_dict": PLAIN},
    "averaged": {"model": OTHER, "averaged": DISTILLED},
    "released": BESIDE | {"state_dict": RELEASED},
}
HALF = to_huggingface(PLAIN)  # a key without its value: the two are one matrix here
del HALF["segformer.encoder.block.0.1.attention.self.value.weight"]
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
BYTES = {"mean": [25.5, 51.0, 76.5], "std": [127.5, 255.0, 510.0]}  # the same, of 0 to 255


def write(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def as_nvidia(config: Any) -> dict[str, Any]:
    """As the SegFormer repository saves it, with a classifier that nothing uses."""
    theirs = {"decode_head.conv_seg.weight": torch.zeros(20, 128, 1, 1)}
    for key, value in PLAIN.items():
        part = "decode_head" if key.startswith("linear_") else "backbone"
        theirs[f"{part}.{key}"] = value
    return {"meta": config, "state_dict": theirs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tmp_path: Path) -> None:
    model = load_model(write(LAYOUTS[layout], tmp_path / "w.pth"))
    assert (model.name, model.num_classes, model.training) == ("segformer_b0", 20, False)
    assert torch.equal(logits(model), logits(NETWORK))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recognised_by_its_keys(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
    lacking = {key: v for key, v in state.items() if not key.startswith(("norm1.", "neck."))}
    assert recognise(state) == recognise(lacking) == name


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The message of the UserError that a call raises: one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm2.bias": None, "head.bias": ZEROS(3)}, "1 missing: norm2.bias; 1 unknown: head"),
        ({"norm4.bias": ZEROS(7)}, "1 of another shape: norm4.bias (7,) instead of (256,)"),
        ({"norm1.weight": torch.full((32,), torch.nan)}, "NaN or infinity (norm1.weight)"),
        ({"norm1.weight": torch.full((32,), 1e300, dtype=torch.float64)}, "NaN or infinity"),
    ],
)
def test_what_does_not_fit_changes_nothing(changes: Any, says: str, tmp_path: Path) -> None:
    state = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    path = write(state, tmp_path / "w.pth")
    model = create_model("segformer_b0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for message in (refusal(load_model, path), refusal(start_from, model, path)):
        assert str(path) in message and says in message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("name", "prefix"), [("segformer_b0", ""), ("pvt_v2_b0", ""), ("lvt", "backbone.")]
)
def test_imagenet_encoders(name: str, prefix: str, tmp_path: Path) -> None:
    """As their authors publish them, with ImageNet's classifier, and LVT's last norm."""
    path, heads = tmp_path / "w.pth", ("linear_", "neck.", "head.")
    source, target = seed(create_model(name)).state_dict(), create_model(name)
    encoder = {key: value for key, value in source.items() if not key.startswith(heads)}
    bare = {prefix + key.removeprefix("backbone."): value for key, value in encoder.items()}
    others = {"head.weight": ZEROS(1000, 256), "head.bias": ZEROS(1000), "norm.weight": ZEROS(256)}
    torch.save({"model": bare | others}, path)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    assert start_from(target, path) is False
    for key, value in target.state_dict().items():
        assert torch.equal(value, encoder.get(key, before[key])), key
    assert f"{name}'s encoder without a decode head" in refusal(load_model, path)
    assert f"it looks like {name}" in refusal(start_from, create_model("segformer_b1"), path)


OWN = ("Traffic_Light", "pond", "road", "ignore")


@pytest.mark.parametrize(
    ("name", "names", "own", "taken", "anew"),
    [
        ("segformer_b0", CITYSCAPES.output_names, OWN, {0: 6, 2: 0, 3: 19}, "pond"),
        ("pvt_v2_b0", CITYSCAPES.names, OWN, {0: 6, 2: 0}, "pond, ignore"),
        ("segformer_b0", None, CITYSCAPES.output_names, {i: i for i in range(19)}, ""),
        ("segformer_b0", None, OWN, {}, "Traffic_Light, pond, road, ignore"),
    ],
)
def test_a_network_starts_one_of_other_classes(
    name: str, names: Any, own: tuple[str, ...], taken: dict, anew: str, tmp_path: Path, caplog: Log
) -> None:
    """Everything is taken over but the classifier's rows of classes that it didn't know."""
    outputs = len(names or CITYSCAPES.names)
    source, model = create_model(name, outputs), create_model(name, len(own))
    source.class_names, model.class_names = names, own
    save_model(source, tmp_path / "w.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = source.state_dict()
    assert start_from(model, tmp_path / "w.safetensors") is True
    assert model.class_names == own
    assert (f"lacks the classes {anew}; they start anew" in caplog.text) == bool(anew)
    for key, value in model.state_dict().items():
        if key.startswith(("linear_pred", "head.conv_seg")):
            for row, found in enumerate(value):
                expected = theirs[key][taken[row]] if row in taken else before[key][row]
                assert torch.equal(found, expected)
        else:
            assert torch.equal(value, theirs[key])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "not a state dict: list"),
        ({"epoch": 3, 1: ZEROS(3), "norm1.weight": ZEROS(3)}, "not a state dict: epoch, 1"),
        ({"fc.weight": ZEROS(3)}, "no known model (fc.weight)"),
        (HALF, "1 missing: block1.1.attn.kv.weight; 1 unknown: block1.1.attn.k.weight"),
        ({"model": PLAIN, "metadata": {"normalisation": "{"}}, "has damaged metadata"),
        ({"model": PLAIN, "metadata": {"normalisation": "[[0], [0]]"}}, "has damaged metadata"),
        (as_nvidia({"cfg": f"a, b = {BYTES}, dict(mean=0, std=255)"}), "several normalisations"),
    ],
)
def test_what_is_no_network_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    assert says in refusal(load_model, write(content, tmp_path / "w.pth"))


def test_our_weights_saved_by_others_lose_what_they_told(tmp_path: Path, caplog: Log) -> None:
    save_file(PLAIN, tmp_path / "w.safetensors")
    assert load_model(tmp_path / "w.safetensors").normalisation is None
    assert "doesn't say what input it wants; none is normalised" in caplog.text


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A file that is missing, truncated, or none of weights; a name that safetensors can't open."""
    path = tmp_path / "w.pth"
    assert "no weights at" in refusal(load_model, path)
    path.write_bytes(b"<html>Sign in")
    assert "(it is no PyTorch checkpoint; fetch" in refusal(load_model, path)
    for name in ("w.pth", "student.safetensors"):
        path = tmp_path / name
        (save_file if path.suffix == ".safetensors" else torch.save)(PLAIN, path)
        for kept in (-1, 1000, 0):
            path.write_bytes(path.read_bytes()[:kept])
            assert str(path) in refusal(load_model, path)
    save_file({}, path)
    assert "it is empty" in refusal(load_model, path)
    assert "name a file there (student.safetensors)" in refusal(load_model, tmp_path)
    path = path.rename(tmp_path / os.fsdecode(b"\xff.safetensors"))
    assert "is not valid UTF-8; rename the file or its folder" in refusal(load_model, path)


class Malice:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("victim",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused(zipped: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": PLAIN, "message_hub": Malice()}
    torch.save(content, "w.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(load_model, Path("w.pth"))
    assert "can't be read as weights (reading it would call posix.mkdir; if you trust" in message
    assert not Path("victim").exists()
    torch.load("w.pth", weights_only=False)
    assert Path("victim").exists()  # it would have worked


# What a file says about its input and its classes ------------------------------------------------


def normalised(images: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "RGB": lambda images: images,
    "RGB to 255": lambda images: 255 * images,
    "normalised": normalised,
    "by one number": lambda images: normalised(images, [0.2], [0.5]),
    "ImageNet's": lambda images: normalised(images, *IMAGENET),
    "BGR, normalised": lambda images: normalised(images.flip(1)),
    "normalised, BGR": lambda images: normalised(images).flip(1),
}
"""What a network was given in training, from RGB in [0, 1]."""


def assert_given(path: Path, given: str) -> None:
    """The loaded network computes what the original computes of the input that it was made for."""
    expected, found = logits(NETWORK, GIVEN[given](IMAGES)), logits(load_model(path))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Trainer's checkpoint in Hugging Face's layout, without a preprocessor."""
    folder = tmp_path / "run" / "checkpoint-500"
    folder.mkdir(parents=True)
    save_file(to_huggingface(PLAIN), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(architecture("segformer_b0")))
    return folder


def test_without_a_preprocessor_their_default_is_taken_and_said(folder: Path, caplog: Log) -> None:
    assert_given(folder, "ImageNet's")
    assert "has no preprocessor_config.json; ImageNet's normalisation is taken" in caplog.text
    # A Trainer leaves one in the folder above.
    content = {"do_normalize": False, "size": {"height": 192, "width": 96}}
    (folder.parent / "preprocessor_config.json").write_text(json.dumps(content))
    assert_given(folder, "RGB")
    assert read_checkpoint(folder).facts == {"height": 96}


OF_FLOATS = {"image_mean": MEAN, "image_std": STD}
OF_BYTES = {"image_mean": BYTES["mean"], "image_std": BYTES["std"]}
PREPROCESSOR = BYTES | {"type": "SegDataPreProcessor"}


@pytest.mark.parametrize(
    ("said", "given", "warning"),
    [
        # Hugging Face's preprocessor
        ({}, "ImageNet's", ""),
        (OF_FLOATS | {"do_flip_channel_order": True}, "normalised, BGR", ""),
        ({"image_processor": OF_FLOATS}, "normalised", ""),
        (OF_BYTES | {"do_rescale": False}, "normalised", ""),
        ({"image_mean": 0.2, "image_std": [0.5]}, "by one number", ""),
        ({"image_mean": 0.0, "image_std": 1.0}, "RGB", ""),
        ({"do_normalize": False, "rescale_factor": 1.0}, "RGB to 255", ""),
        ({"do_normalize": False, "do_pad": True, "resample": 3}, "RGB", "do_pad, another way"),
        # the configuration of mmsegmentation and of the SegFormer repository
        ("c = dict(mean=[0., 0., 0.], std=[255.0, 255.0, 255.0], to_rgb=True)", "RGB", ""),
        (f"c = {BYTES | {'to_rgb': False}}", "BGR, normalised", ""),
        ("c = dict(mean=None, std=None)", "RGB to 255", ""),
        (f"p = {PREPROCESSOR | {'bgr_to_rgb': True}}", "normalised", ""),
        (f"p = {PREPROCESSOR}", "BGR, normalised", ""),
        (f"start = dict(type='Normal', mean=0, std=0.01)\nc = {BYTES}", "normalised", ""),
        (f"c = {BYTES}\np = [dict(type='Normalize', **c)]", "normalised", ""),
        (f"c = {BYTES}\np = dict(bgr_to_rgb=False, **c)", "ImageNet's", "can't be read"),
        ("c = dict(mean=[1, 2", "ImageNet's", "can't be read"),
        (None, "ImageNet's", "says no mean and deviation"),
    ],
)
def test_the_input(said: Any, given: str, warning: str, folder: Path, caplog: Log) -> None:
    if isinstance(said, dict):
        path = folder / "model.safetensors"
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    else:
        path = write(as_nvidia({"config": said}), folder / "w.pth")
    assert_given(path, given)
    assert warning in caplog.text and bool(warning) == bool(caplog.text)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config", "\xff", "config.json is no JSON object"),
        ("config", '{"id2label": {"a": "road"}}', "config.json or "),
        ("config", '{"id2label": {"0": "road"}}', "names 1 classes and has 20 outputs"),
        ("config", '{"sr_ratios": [8, 4, 2, 2]}', "sr_ratios [8, 4, 2, 2], and segformer_b0 has"),
        ("preprocessor_config", '{"image_mean": [1, 2]}', "preprocessor_config.json"),
        ("preprocessor_config", '{"image_processor_type": "ViT"}', "the default of ViT is not"),
    ],
)
def test_configurations_that_do_not_fit(name: str, content: str, says: str, folder: Path) -> None:
    (folder / f"{name}.json").write_text(content, encoding="latin-1")
    assert says in refusal(load_model, folder)


THEIRS = ("void", *CITYSCAPES.names[::-1])


@pytest.mark.parametrize("meta", [None, {"CLASSES": THEIRS}, {"dataset_meta": {"classes": THEIRS}}])
def test_names_of_classes(meta: Any, folder: Path) -> None:
    """In Hugging Face's configuration and mmsegmentation's metadata."""
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(THEIRS))}))
    model = load_model(write(as_nvidia(meta), folder / "w.pth") if meta else folder)
    assert model.class_names == THEIRS
