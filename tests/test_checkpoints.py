"""Weights in and out: every layout gives the same network, with the input that its file tells.

Everything else is refused in one line that names it.
"""

import json
import os
import resource
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
from models import create_model, load_model, load_state, read_checkpoint, save_model, start_from
from models.info import build
from models.layouts import IMAGENET
from models.layouts.huggingface import architecture, to_huggingface
from tests.golden_data import published_key, seed
from tests.trees import limited

State = dict[str, Tensor]
Log = pytest.LogCaptureFixture
NETWORK = seed(create_model("segformer_b0")).eval()
PLAIN = NETWORK.state_dict()
IMAGES = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, images: Tensor = IMAGES) -> Tensor:
    return model(images).logits


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def ours(method: str, student: State) -> State:
    """A distilled checkpoint as our training writes it: the student, and the modules beside it."""
    return build(method).state_dict() | prefixed("student.", student)


def released(method: str, student: State) -> State:
    """The same as published."""
    return {published_key(key): value for key, value in ours(method, student).items()}


BESIDE = {"epoch": 3, "arch": "SegFormer", "best": torch.tensor(0.5), "optimizer": {"state": {}}}
SCORES = {"best_acc": np.float64(0.5), "iou": np.float32(0.5), "step": np.int64(7)}
LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda s: s,
    "base": lambda s: released("TransKDBase", s),
    "ea": lambda s: released("TransKD_EA", s),
    "ours": lambda s: ours("TransKD_GL", s),
    "module_ea": lambda s: prefixed("module.", released("TransKD_EA", s)),
    "module_twice": lambda s: prefixed("module.module.", s),
    "compiled": lambda s: prefixed("module._orig_mod.", s),
    "model": lambda s: BESIDE | {"model": s},
    "numbers_of_numpy": lambda s: BESIDE | SCORES | {"model": "segformer_b0", "state_dict": s},
    "averaged": lambda s: {"model": prefixed("student.", s), "averaged": s},
    "state_dict_module_gl": lambda s: (
        BESIDE | {"state_dict": prefixed("module.", released("TransKD_GL", s))}
    ),
}


def write(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tmp_path: Path) -> None:
    model = load_model(write(LAYOUTS[layout](PLAIN), tmp_path / "w.pth"))
    assert (model.name, model.num_classes, model.training) == ("segformer_b0", 20, False)
    assert torch.equal(logits(model), logits(NETWORK))


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
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    changes: dict[str, Tensor | None], says: str, tmp_path: Path
) -> None:
    state = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    path = write(state, tmp_path / "w.pth")
    model = create_model("segformer_b0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for message in (
        refusal(load_model, path),
        refusal(load_state, model, read_checkpoint(path)),
        refusal(start_from, model, path),
    ):
        assert str(path) in message and says in message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


OWN = ("Traffic_Light", "pond", "road", "ignore")
SAME = {i: i for i in range(19)}


@pytest.mark.parametrize(
    ("names", "own", "taken", "anew"),
    [
        (CITYSCAPES.output_names, OWN, {0: 6, 2: 0, 3: 19}, "pond"),
        (CITYSCAPES.names, OWN, {0: 6, 2: 0}, "pond, ignore"),
        (CITYSCAPES.names, CITYSCAPES.output_names, SAME, ""),
        (None, CITYSCAPES.output_names, SAME, ""),
        (None, OWN, {}, "Traffic_Light, pond, road, ignore"),
    ],
    ids=["ours", "without ignore", "same", "nameless", "nameless and others"],
)
@pytest.mark.parametrize("name", ["segformer_b0", "pvt_v2_b0"])
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


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    assert "no weights at" in refusal(load_model, path)
    for content, says in (
        ([1, 2], "not a state dict: list"),
        ({"epoch": 3, 1: ZEROS(3), "norm1.weight": ZEROS(3)}, "not a state dict: epoch, 1"),
        ({"state_dict": 3}, "not a state dict: state_dict"),
        ({"fc.weight": ZEROS(3)}, "no known model (fc.weight)"),
    ):
        assert says in refusal(load_model, write(content, path))
    path.write_bytes(b"<html>Sign in")
    assert "(it is no PyTorch checkpoint; fetch" in refusal(load_model, path)
    save_file({}, tmp_path / "student.safetensors")
    assert "name a file there (student.safetensors)" in refusal(load_model, tmp_path)
    assert "it is empty" in refusal(load_model, tmp_path / "student.safetensors")
    path = (tmp_path / "student.safetensors").rename(tmp_path / os.fsdecode(b"\xff.safetensors"))
    assert "is not valid UTF-8; rename the file or its folder" in refusal(load_model, path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_truncated_files_are_refused(kept: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(PLAIN, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(load_model, path)


class Malice:
    """Unpickled without care, it makes a folder."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    """The advice keeps what the file tells of its input, and following it gives the network."""
    path, victim = tmp_path / "weights.pth", tmp_path / "victim"
    config = "img_norm_cfg = dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], to_rgb=True)"
    meta = {"cfg": config, "dataset_meta": {"classes": CITYSCAPES.output_names}}
    content = {"meta": meta, "state_dict": as_nvidia(PLAIN), "message_hub": Malice(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(load_model, path)
    assert "can't be read as weights (reading it would call posix.mkdir; if you trust" in message
    assert "save its state_dict, together with the cfg and dataset_meta of its meta" in message
    assert not victim.exists()
    loaded = torch.load(path, weights_only=False)
    assert victim.exists()  # it would have worked
    torch.save({key: loaded[key] for key in ("meta", "state_dict")}, path)
    model = load_model(path)
    assert torch.equal(logits(model), logits(NETWORK))
    assert model.class_names == CITYSCAPES.output_names


def test_a_failure_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_model(NETWORK, path)
    with limited(resource.RLIMIT_FSIZE, 2**20):  # as on a full disk it ends in the middle
        message = refusal(save_model, create_model("segformer_b0"), path)
    assert str(path) in message
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(logits(load_model(path)), logits(NETWORK))


# What a file says about its input and its classes ------------------------------------------------

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
BYTES = {"mean": [25.5, 51.0, 76.5], "std": [127.5, 255.0, 510.0]}  # the same, of 0 to 255


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


def test_our_checkpoints_tell_their_normalisation(tmp_path: Path) -> None:
    """Training's own keep it as the weights' metadata do."""
    path = tmp_path / "best.pt"
    content: dict[str, Any] = {"model": prefixed("student.", PLAIN), "optimizer": {}}
    content["metadata"] = {"normalisation": json.dumps([MEAN, STD])}
    assert_given(write(content, path), "normalised")
    for damaged in ("{", "3", "[[0, 0], [1, 1]]", "[[0, 0, 0], [0, 1, 1]]"):
        content["metadata"] = {"normalisation": damaged}
        assert "has damaged metadata" in refusal(load_model, write(content, path))


def as_nvidia(state: State) -> State:
    """As the SegFormer repository names it, with a classifier that nothing uses."""
    theirs = {}
    for key, value in state.items():
        part = "decode_head" if key.startswith("linear_") else "backbone"
        theirs[f"{part}.{key}"] = value
    return theirs | {"decode_head.conv_seg.weight": ZEROS(20, 128, 1, 1)}


PREPROCESSOR = BYTES | {"type": "SegDataPreProcessor"}
OF_FLOATS = {"image_mean": MEAN, "image_std": STD}
OF_BYTES = {"image_mean": BYTES["mean"], "image_std": BYTES["std"]}


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        ("c = dict(mean=[0., 0., 0.], std=[255.0, 255.0, 255.0], to_rgb=True)", "RGB", ""),
        (f"c = {BYTES | {'to_rgb': False}}", "BGR, normalised", ""),
        ("c = dict(mean=51, std=127.5)", "by one number", ""),
        ("c = dict(mean=None, std=None)", "RGB to 255", ""),
        (f"p = {PREPROCESSOR | {'bgr_to_rgb': True}}", "normalised", ""),
        (f"p = {PREPROCESSOR}", "BGR, normalised", ""),
        (f"# mean=[0], std=[1]\nloss = dict(reduction='mean')\nc = {BYTES}", "normalised", ""),
        (f"start = dict(type='Normal', mean=0, std=0.01)\nc = {BYTES}", "normalised", ""),
        (f"train, test = {BYTES}, dict(mean=0, std=255)", "", "several normalisations"),
        ("m = 1\nc = dict(mean=[m, m, m], std=[1, 1, 1])", "ImageNet's", "can't be read"),
        (f"c = {BYTES}\np = [dict(type='Normalize', **c)]", "normalised", ""),
        (f"c = {BYTES}\np = dict(bgr_to_rgb=False, **c)", "ImageNet's", "can't be read"),
        ("c = dict(mean=[1, 2", "ImageNet's", "can't be read"),
        (None, "ImageNet's", "says no mean and deviation"),
    ],
)
@pytest.mark.parametrize("key", ["config", "cfg"])
def test_what_a_configuration_says_of_the_input_is_done(
    key: str, text: str | None, given: str, says: str, tmp_path: Path, caplog: Log
) -> None:
    """Of the SegFormer repository and mmsegmentation. What can't be read is said."""
    path = write({"meta": {key: text}, "state_dict": as_nvidia(PLAIN)}, tmp_path / "w.pth")
    if not given:
        assert says in refusal(load_model, path)
        return
    assert_given(path, given)
    assert says in caplog.text and bool(says) == bool(caplog.text)


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


@pytest.mark.parametrize(
    ("processor", "given", "says"),
    [
        ({}, "ImageNet's", ""),
        ({"do_normalize": False}, "RGB", ""),
        (OF_FLOATS, "normalised", ""),
        (OF_FLOATS | {"do_flip_channel_order": True}, "normalised, BGR", ""),
        ({"image_processor": OF_FLOATS}, "normalised", ""),
        (OF_BYTES | {"do_rescale": False}, "normalised", ""),
        ({"image_mean": 0.2, "image_std": [0.5]}, "by one number", ""),
        ({"do_normalize": False, "do_rescale": False}, "RGB to 255", ""),
        ({"do_normalize": False, "rescale_factor": 1.0}, "RGB to 255", ""),
        ({"do_normalize": False, "do_center_crop": True}, "RGB", "do_center_crop"),
        ({"do_normalize": False, "resample": 3}, "RGB", "another way of resizing"),
    ],
)
@pytest.mark.parametrize("place", [".", ".."])
def test_what_a_preprocessor_says_of_the_input_is_done(
    place: str, processor: dict, given: str, says: str, folder: Path, caplog: Log
) -> None:
    """Also of one in the folder above, where a Trainer leaves it."""
    (folder / place / "preprocessor_config.json").write_text(json.dumps(processor))
    assert_given(folder, given)
    assert_given(folder / "model.safetensors", given)
    assert says in caplog.text and bool(says) == bool(caplog.text)


@pytest.mark.parametrize("size", [{"shortest_edge": 96}, {"height": 96, "width": 192}, 96])
def test_a_preprocessor_tells_the_height(size: object, folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    assert read_checkpoint(folder).info.facts == {"height": 96}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config", "\xff", "config.json is no JSON object"),
        ("config", "[]", "config.json"),
        ("config", '{"id2label": {"a": "road"}}', "config.json or "),
        ("config", '{"id2label": {"0": "road"}}', "names 1 classes and has 20 outputs"),
        ("config", '{"sr_ratios": [8, 4, 2, 2]}', "sr_ratios [8, 4, 2, 2], and segformer_b0 has"),
        ("config", '{"hidden_act": "relu"}', "hidden_act relu, and segformer_b0 has gelu"),
        ("preprocessor_config", '{"image_mean": [1, 2]}', "preprocessor_config.json"),
        ("preprocessor_config", '{"image_std": [0, 1, 1]}', "deviations above 0"),
        ("preprocessor_config", '{"image_processor_type": "ViT"}', "the default of ViT is not"),
    ],
)
def test_configurations_that_are_none_or_of_another_network(
    name: str, content: str, says: str, folder: Path
) -> None:
    (folder / f"{name}.json").write_text(content, encoding="latin-1")
    assert says in refusal(load_model, folder)


@pytest.mark.parametrize("where", ["hf", "1.x", "0.x"])
def test_classes_are_brought_into_a_data_sets_order(where: str, folder: Path) -> None:
    """By their names, in Hugging Face's configuration and mmsegmentation's metadata."""
    theirs, order = ["void", *CITYSCAPES.names[::-1]], [*range(19, 0, -1), 0]
    if where == "hf":
        path = folder
        (path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(theirs))}))
    else:
        meta = {"CLASSES": (*theirs,)} if where == "0.x" else {"dataset_meta": {"classes": theirs}}
        path = write({"meta": meta, "state_dict": as_nvidia(PLAIN)}, folder / "w.pth")
    model = load_model(path)
    assert model.class_names == tuple(theirs)
    model.reorder(CITYSCAPES.order("w.pth", model.num_classes, model.class_names))
    torch.testing.assert_close(logits(model), logits(NETWORK, IMAGENET(IMAGES))[:, order])
    save_model(model, folder / "ours.safetensors")
    again = load_model(folder / "ours.safetensors")
    assert again.class_names == model.class_names == tuple(theirs[i] for i in order)
    assert torch.equal(logits(again), logits(model))
