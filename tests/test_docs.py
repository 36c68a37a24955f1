"""The pages' code for one's own data, loop, loss and method runs as it stands, on drawn scenes."""

import re
import shutil
from pathlib import Path

import pytest

from datasets import LAYOUTS
from models import load_model
from models.distillation.methods import METHODS, Settings, baseline
from tests.conftest import ROOT


def blocks_of(page: str, begin: str = "") -> list[str]:
    """The Python blocks of a page from a heading on."""
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(begin) :], re.S)


def test_extending(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for image in (scenes / "leftImg8bit" / "train").rglob("*.png"):
        stem = image.name.removesuffix("_leftImg8bit.png")
        label = scenes / "gtFine" / "train" / image.parent.name / f"{stem}_gtFine_labelTrainIds.png"
        for source, target in ((image, f"photos/train/{stem}.png"), (label, f"masks/train/{stem}_labelTrainIds.png")):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LAYOUTS, "mine", LAYOUTS["cityscapes"])  # what the page sets is gone after the test
    names: dict = {"DATADIR": str(tmp_path)}
    data, method = blocks_of("README.md", "## Your own data")
    assert data.count("\n") - data.count("\n\n") <= 10 and method.count("\n") <= 30
    loop, loss = blocks_of("docs/EXTENDING.md")
    for block in (data, loop, loss, method):
        exec(block, names)
    assert set(names["losses"]) >= {"ce", "hcl", "embed4"}
    monkeypatch.setitem(METHODS, "attention", baseline(names["AttentionTransfer"]))
    distiller = METHODS["attention"](names["student"], names["teacher"], None, Settings(baseline={"weight": 2.0}))
    losses = distiller(names["to_float"](names["images"]), names["labels"])
    assert set(losses) == {"ce", "attention"} and losses["attention"] > 0
    assert len(names["scenes"]) == 10
    assert load_model(tmp_path / "student.pth").name == "segformer_b0"
