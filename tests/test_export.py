"""Weights out: every export is read back by the library it is for, and tells what it was made
from."""

import json
import resource
import shutil
from collections.abc import Callable
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

from datasets.classes import CITYSCAPES
from datasets.transforms import resize_image, to_float
from errors import UserError
from files import ROOT
from models import (
    SegmentationModel,
    create_model,
    load_model,
    read_checkpoint,
    save_model,
    segformer,
)
from models.export import ENDINGS, SIZES, WRITERS, Options, difference, main
from models.factory import BUILDERS
from models.layouts import IMAGENET
from models.layouts.huggingface import to_huggingface
from models.onnx_file import OnnxModel
from models.pvtv2 import FPNHead
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
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    """Write `out/new` in that format."""
    output = folder / "out" / f"new{ENDINGS[kind]}"
    main(Options(weights=weights, format=kind, output=output, **flags))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return output


def assert_tells(path: Path, facts: dict[str, Any]) -> None:
    """The network itself, its classes, its input, the height of training."""
    info = read_checkpoint(path).info
    assert info.facts == facts
    assert (info.class_names, info.normalisation) == (NETWORK.class_names, NETWORK.normalisation)
    assert torch.equal(logits(load_model(path), IMAGES), logits(NETWORK, IMAGES))


def test_safetensors(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_tells(export(weights, tmp_path, "safetensors"), FACTS)
    assert "segformer_b0, 3.72 M parameters" in capsys.readouterr().out


def test_torch(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code reads it as it is: a state dict under the published names."""
    monkeypatch.setenv("HOME", str(tmp_path))
    main(Options(weights=weights, format="torch", output=Path("~/new.pth")))
    path = tmp_path / "new.pth"
    assert_tells(path, FACTS)
    bare = torch.load(path, weights_only=True)
    assert bare.keys() == NETWORK.state_dict().keys()
    assert str(create_model("segformer_b0").load_state_dict(bare)).startswith("<All keys matched")


def test_huggingface_folder(weights: Path, tmp_path: Path) -> None:
    """A photograph's logits, by transformers alone as the model card says, are ours."""
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
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SegformerForSemanticSegmentation"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "other"
    for fact in ("TransKD_EA", "58.91 % mIoU", "Steps**: 7", "side 64 pixels", "ACDC", "lr 6e-05"):
        assert fact in card.text, fact
    assert "/home" not in str(card)  # paths are not published


Exported = tuple[SegmentationModel, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A network of two blocks, for every block takes seconds, and its ONNX file."""
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        encoder, width = segformer.CONFIGS["segformer_b0"]
        shallow = replace(encoder, depths=(1, 0, 0, 1))
        patch.setitem(segformer.CONFIGS, "segformer_b0", (shallow, width))
        model = network("segformer_b0")
        save_model(model, folder / "w.safetensors", **FACTS)
        return model, export(folder / "w.safetensors", folder, "onnx")


def test_onnx(exported: Exported) -> None:
    """Of any batch and size, with the normalisation and the weights inside."""
    model, path = exported
    onnx.checker.check_model(path, full_check=True)
    read = OnnxModel(path)
    assert (read.class_names, read.facts) == (CITYSCAPES.output_names, FACTS)
    for images in (IMAGES, torch.rand(1, 3, 70, 33), torch.rand(3, 3, 64, 64)):
        expected = logits(model, images)
        close = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(logits(read, images), expected, rtol=1e-3, atol=close)


def test_onnx_with_the_argmax_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    found = logits(OnnxModel(path), IMAGES)
    assert found.dtype == torch.uint8 and len(found.unique()) > 1
    assert torch.equal(found, logits(model, IMAGES)[:, :19].argmax(1))


def test_onnx_in_8_bits(
    exported: Exported, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By photographs of a folder; the file is smaller, and most pixels keep their class."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((128, 96), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photos" / f"{i}.png")
    _, exact = exported

    def write(network: Any, checkpoint: Any, path: Path) -> Callable[[Tensor], Tensor]:
        shutil.copy(exact, path)  # which took seconds to make
        return network

    monkeypatch.setitem(WRITERS, "onnx", write)
    rounded = export(weights, tmp_path, "onnx", int8=tmp_path / "photos")
    assert rounded.stat().st_size < exact.stat().st_size / 2
    images = to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    classes = [logits(OnnxModel(path), images).argmax(1) for path in (rounded, exact)]
    assert (classes[0] == classes[1]).float().mean() > 0.7
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no photograph in"):
        export(weights, tmp_path, "onnx", int8=tmp_path / "empty")


def test_a_wrong_export_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = to_huggingface(state)
        query = "segformer.encoder.block.0.0.attention.self.query.weight"
        return state | {query: -state[query]}

    monkeypatch.setattr("models.export.to_huggingface", swapped)
    with pytest.raises(UserError, match="differs from ours"):
        export(weights, tmp_path, "hf")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_number_is_a_difference(size: tuple[int, ...]) -> None:
    def theirs(images: Tensor) -> Tensor:
        return images * (float("nan") if images.shape == size else 1)

    assert not difference(lambda images: images, theirs) < 1e-3


def test_mistakes(weights: Path, tmp_path: Path) -> None:
    def refused(says: str, **flags: Any) -> None:
        with pytest.raises(UserError, match=says):
            main(Options(**{"weights": weights, "format": "hf"} | flags))

    output, other = tmp_path / "new.txt", tmp_path / "w.safetensors"
    save_model(create_model("pvt_v2_b0"), other)
    refused(r"must end in \.onnx", format="onnx", output=output)
    refused("--int8 is for --format onnx", int8=Path(), output=output)
    refused("is there already; name a new folder", output=tmp_path)
    refused("no weights at nowhere", weights=Path("nowhere"), output=output)
    refused("no such network; choose onnx, safetensors or", weights=other, output=output)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    (tmp_path / "w.onnx").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"w\.onnx is no network that models\.export wrote"):
        OnnxModel(tmp_path / "w.onnx")


@pytest.mark.parametrize("kind", ["hf", "safetensors", "torch"])
def test_a_full_disk(kind: str, weights: Path, tmp_path: Path) -> None:
    """Its message is one line, and nothing is left."""
    with (
        limited(resource.RLIMIT_FSIZE, 2**20),
        pytest.raises(UserError, match=r"can't write .*File too large") as error,
    ):
        export(weights, tmp_path, kind)
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())
