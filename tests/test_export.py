"""Every export is read back by the library it is for, and tells what it was made from."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessorPil

from datasets import open_split
from datasets.classes import CITYSCAPES
from datasets.transforms import resize_image, to_float
from errors import UserError
from eval.commands import IoUOptions, score
from eval.inference import Views, evaluate
from eval.predictor import Predictor
from files import ROOT
from models import SegmentationModel, create_model, load_model, read_checkpoint, save_model
from models.export import ENDINGS, WRITERS, Options, main
from models.factory import BUILDERS
from models.layouts import IMAGENET
from models.layouts.huggingface import to_huggingface
from models.onnx_file import OnnxModel
from models.pvtv2 import FPNHead
from models.segformer import CONFIGS
from tests.golden_data import seed
from tests.peers import with_segformers_eps
from tests.trees import limited

FACTS = {"method": "TransKD_EA", "dataset": "ACDC", "height": 64, "step": 7, "mean_iou": 0.5891}
IMAGES = torch.rand((2, 3, 65, 130), generator=torch.Generator().manual_seed(3))


def network(name: str) -> SegmentationModel:
    model = seed(create_model(name)).eval()
    model.class_names, model.normalisation = CITYSCAPES.output_names, IMAGENET
    return model


NETWORK = network("segformer_b0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Its weights in the folder of the run that trained it."""
    folder = tmp_path_factory.mktemp("run")
    save_model(NETWORK, folder / "student.safetensors", **FACTS)
    options = {"method": "TransKD_EA", "lr": 6e-05, "height": 64, "datadir": "/home/someone/data"}
    (folder / "options.json").write_text(json.dumps(options))
    return folder / "student.safetensors"


@torch.no_grad()
def logits(model: Any, *images: Any, **inputs: Any) -> Tensor:
    return model(*images, **inputs).logits


def export(weights: Path, folder: Path, kind: Any, **flags: Any) -> Path:
    output = folder / "out" / f"new{ENDINGS[kind]}"
    main(Options(weights=weights, format=kind, output=output, **flags))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return output


def assert_tells(path: Path, facts: dict[str, Any]) -> None:
    """The network itself, its classes, its input, the height of training."""
    info = read_checkpoint(path)
    assert info.facts == facts
    assert (info.class_names, info.normalisation) == (NETWORK.class_names, NETWORK.normalisation)
    assert torch.equal(logits(load_model(path), IMAGES), logits(NETWORK, IMAGES))


def test_our_own_formats(weights, tmp_path, monkeypatch) -> None:
    """The published code reads the second as it is: a state dict under the published names."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_tells(export(weights, tmp_path, "safetensors"), FACTS)
    main(Options(weights=weights, format="torch", output=Path("~/new.pth")))
    path = tmp_path / "new.pth"
    assert_tells(path, FACTS)
    bare = torch.load(path, weights_only=True)
    assert bare.keys() == NETWORK.state_dict().keys()
    assert str(create_model("segformer_b0").load_state_dict(bare)).startswith("<All keys matched")


def test_huggingface_folder(weights, tmp_path) -> None:
    folder = export(weights, tmp_path, "hf")
    assert_tells(folder, {"height": 64})
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 171, 3), np.uint8))
    processor = SegformerImageProcessorPil.from_pretrained(folder)
    peer = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    theirs = logits(with_segformers_eps(peer), **processor(photograph, return_tensors="pt"))
    pixels = torch.from_numpy(np.array(resize_image(photograph, 64))).permute(2, 0, 1)[None]
    ours = logits(NETWORK, to_float(pixels))
    assert theirs.shape == (1, 20, 16, 31)  # 90×171 becomes 64×121
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "other"
    for fact in ("TransKD_EA", "58.91 % mIoU", "Steps**: 7", "side 64 pixels", "ACDC", "lr 6e-05"):
        assert fact in card.text, fact
    assert "/home" not in str(card)  # paths are not published


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[SegmentationModel, Path]:
    """A network of two blocks, for every block takes seconds, and its ONNX file."""
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        encoder = CONFIGS["segformer_b0"]
        patch.setitem(CONFIGS, "segformer_b0", replace(encoder, depths=(1, 0, 0, 1)))
        model = network("segformer_b0")
        save_model(model, folder / "w.safetensors", **FACTS)
        return model, export(folder / "w.safetensors", folder, "onnx")


def test_onnx(exported, scenes, tmp_path) -> None:
    model, path = exported
    onnx.checker.check_model(path, full_check=True)
    read = OnnxModel(path)
    assert (read.class_names, read.facts) == (CITYSCAPES.output_names, FACTS)
    for images in (IMAGES, torch.rand(1, 3, 70, 33), torch.rand(3, 3, 64, 64)):
        expected = logits(model, images)
        close = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(logits(read, images), expected, rtol=1e-3, atol=close)
    # It scores as its network does, at the height of its training.
    counts = score("cityscapes", IoUOptions(scenes, weights=path, num_workers=0)).counts
    data = open_split("cityscapes", scenes, "val", height=64)
    assert torch.equal(counts, evaluate(model, data).counts)

    other = tmp_path / "w.onnx"
    other.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"w\.onnx is no network that models\.export wrote"):
        Predictor(other)
    file = onnx.load(path)
    onnx.helper.set_model_props(file, {"classes": json.dumps(["ignore", *CITYSCAPES.names])})
    onnx.save(file, other)
    reordered = logits(Predictor(other).network, IMAGES)
    assert torch.equal(reordered, logits(read, IMAGES)[:, [*range(1, 20), 0]])


def test_onnx_with_the_argmax_inside(scenes, tmp_path, monkeypatch) -> None:
    """The reader's own network of docs/EXTENDING.md, here with PVTv2's head."""
    page = (ROOT / "docs" / "EXTENDING.md").read_text()
    names: dict[str, Any] = {}
    exec(page.partition("## Your own student")[2].split("```python\n")[1].split("```")[0], names)

    def build(num_classes: int, **others: float) -> SegmentationModel:
        model = names["ConvNet"](num_classes, **others)
        model.head = FPNHead(model.channels, num_classes, dropout=0.0)
        return model

    monkeypatch.setitem(BUILDERS, "convnet", build)
    model = network("convnet")
    # "Ignore" is the likeliest everywhere, and no answer.
    model.head.classifier.bias.data[-1] += 1e6
    save_model(model, tmp_path / "w.safetensors")
    path = export(tmp_path / "w.safetensors", tmp_path, "onnx", argmax=True)
    read = OnnxModel(path)
    found = logits(read, IMAGES)
    assert found.dtype == torch.uint8 and len(found.unique()) > 1
    assert torch.equal(found, logits(model, IMAGES)[:, :19].argmax(1))
    # Classes are scored, and have nothing to average.
    data = open_split("cityscapes", scenes, "val", height=64)
    quarter, full = (evaluate(read, data, protocol=x).counts for x in ("paper", "full"))
    assert int(quarter.sum()) == 4 * 16 * 32 and not quarter[:, :19, 19].any()
    assert torch.equal(full.sum(1), 16 * quarter.sum(1))  # enlarged by the nearest, to 64×128
    with pytest.raises(UserError, match=r"averages need logits; .*without --argmax"):
        evaluate(read, data, protocol="full", views=Views(flip=True))


def test_onnx_in_8_bits(exported, weights, tmp_path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((128, 96), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photos" / f"{i}.png")
    _, exact = exported

    def write(network: Any, checkpoint: Any, path: Path) -> Any:
        shutil.copy(exact, path)  # which took seconds to make
        return network

    monkeypatch.setitem(WRITERS, "onnx", write)
    rounded = export(weights, tmp_path, "onnx", int8=tmp_path / "photos")
    assert rounded.stat().st_size < exact.stat().st_size / 2
    images = to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    classes = [logits(OnnxModel(path), images).argmax(1) for path in (rounded, exact)]
    assert (classes[0] == classes[1]).float().mean() > 0.7


@pytest.mark.parametrize("factor", [-1, torch.nan])
def test_a_wrong_export_is_not_written(factor, weights, tmp_path, monkeypatch) -> None:
    def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = to_huggingface(state)
        last = "decode_head.classifier.weight"
        return state | {last: factor * state[last]}

    monkeypatch.setattr("models.export.to_huggingface", wrong)
    with pytest.raises(UserError, match="differs from ours"):
        export(weights, tmp_path, "hf")
    assert not list((tmp_path / "out").iterdir())


def test_mistakes(weights, tmp_path) -> None:
    pvt = tmp_path / "pvt.safetensors"
    save_model(create_model("pvt_v2_b0"), pvt)
    given = {"weights": weights, "format": "hf", "output": tmp_path / "new"}
    for flags, says in (
        ({"output": tmp_path}, "is there already; name a new folder"),
        ({"int8": tmp_path}, "--int8 and --argmax are for --format onnx"),
        ({"weights": pvt}, "no such network; choose onnx, safetensors or"),
    ):
        with pytest.raises(UserError, match=says):
            main(Options(**given | flags))
    assert list(tmp_path.iterdir()) == [pvt]


@pytest.mark.parametrize("kind", ["hf", "safetensors", "torch"])
def test_a_full_disk(kind, weights, tmp_path) -> None:
    with (
        limited(resource.RLIMIT_FSIZE, 2**20),
        pytest.raises(UserError, match=r"can't write .*File too large") as error,
    ):
        export(weights, tmp_path, kind)
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())
