"""The code in docs/EXTENDING.md runs as it stands, on drawn scenes in a layout of its own."""

import re
import shutil
from pathlib import Path

import pytest

from datasets import LAYOUTS
from models import load_model
from tests.conftest import ROOT


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
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EXTENDING.md").read_text(), re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert set(names["losses"]) == {"ce", "attention"} and names["losses"]["attention"] > 0
    assert len(names["scenes"]) == 10
    assert load_model(tmp_path / "student.pth").name == "segformer_b0"
