"""The pages' code for one's own data, loop, loss, network and method runs as it stands, on drawn scenes."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from datasets import LAYOUTS
from datasets.classes import UNEXPECTED
from errors import UserError
from models import create_model, load_backbone, load_model, save_model
from models.checkpoints import IMAGENET, metadata_of
from models.distillation.methods import METHODS, Settings, baseline
from models.factory import BUILDERS
from models.info import count_macs
from tests.conftest import ROOT


def blocks_of(page: str, begin: str = "") -> list[str]:
    """The Python blocks of a page from a heading on."""
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(begin) :], re.S)


def test_extending(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for image in (scenes / "leftImg8bit" / "train").rglob("*.png"):
        stem = image.name.removesuffix("_leftImg8bit.png")
        label = scenes / "gtFine" / "train" / image.parent.name / f"{stem}_gtFine_labelTrainIds.png"
        for source, target in (
            (image, f"photos/train/{stem}.png"),
            (label, f"masks/train/{stem}_labelTrainIds.png"),
        ):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / target)
    monkeypatch.chdir(tmp_path)
    names: dict = {"DATADIR": str(tmp_path)}
    data, method = blocks_of("README.md", "## Your own data")
    assert data.count("\n") - data.count("\n\n") <= 12 and method.count("\n") <= 30
    classes, loop, loss, network, elsewhere = blocks_of("docs/EXTENDING.md")
    exec(data, names)
    monkeypatch.setitem(LAYOUTS, "mine", names["LAYOUT"])
    for block in (classes, loop, loss, network, method):
        exec(block, names)
    ids = names["MINE"].table("label_ids")
    assert (ids[7], ids[23], ids[11], ids[9]) == (0, 1, 2, UNEXPECTED)
    assert set(names["losses"]) >= {"ce", "hcl", "embed4"}
    monkeypatch.setitem(METHODS, "attention", baseline(names["AttentionTransfer"]))
    distiller = METHODS["attention"](names["student"], names["teacher"], None, Settings())
    losses = distiller(names["to_float"](names["images"]), names["labels"])
    assert set(losses) == {"ce", "attention"} and losses["attention"] > 0
    monkeypatch.setitem(BUILDERS, "convnet", names["ConvNet"])
    own_network_is_a_model_like_the_others(names)
    exec(elsewhere, names | {"teacher": None})
    loaded = load_model("teacher.safetensors")
    assert (loaded.name, loaded.num_classes, loaded.normalisation) == ("convnet", 19, IMAGENET)
    monkeypatch.delitem(BUILDERS, "convnet")
    with pytest.raises(UserError, match=r"holds convnet, which models/factory\.py lacks"):
        load_model("teacher.safetensors")
    assert len(names["scenes"]) == 10
    assert load_model(tmp_path / "student.pth").name == "segformer_b0"


def own_network_is_a_model_like_the_others(names: dict) -> None:
    """Distilled by the method that needs most of it, counted, saved, and loaded from a training's files."""
    student = create_model("convnet", 12, drop_path_rate=0.2)
    distiller = METHODS["transkd_ea"](student, names["teacher"], None, Settings())
    labels = names["labels"].clamp(max=11)
    losses = distiller.train()(names["to_float"](names["images"]), labels)
    sum(losses.values()).backward()
    assert set(losses) >= {"ce", "hcl", "embed4"} and all(
        p.grad is not None for p in student.parameters()
    )
    METHODS["transkd_base"](
        create_model("segformer_b0"), create_model("convnet"), None, Settings()
    )  # wide enough
    counts = count_macs(student.eval(), torch.rand(1, 3, 64, 64))
    assert {count.module for count in counts} >= {
        "stages.0.embed",
        "stages.3.blocks.2",
        "linear_pred",
    }
    save_model(student, Path("own.safetensors"))
    torch.save({"model": distiller.state_dict(), "metadata": metadata_of(student)}, "last.pt")
    for file in ("own.safetensors", "last.pt"):
        loaded = load_model(file)
        assert (loaded.name, loaded.num_classes) == ("convnet", 12)
        with torch.no_grad():
            images = torch.rand(1, 3, 33, 65)
            assert torch.equal(loaded(images).logits, student(images).logits)
    started = create_model("convnet", 12)
    assert load_backbone(started, "own.safetensors")
    torch.testing.assert_close(started.state_dict(), student.state_dict())
