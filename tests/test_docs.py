"""The pages' code for one's own data, loop, loss, network and method runs as it stands."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import LAYOUTS
from datasets.classes import UNEXPECTED
from errors import UserError
from models import create_model, load_model, save_model
from models.distillation.methods import METHODS, Method
from models.factory import BUILDERS
from models.layouts import IMAGENET
from tests.conftest import ROOT
from tests.trees import write


def blocks_of(page: str, begin: str = "") -> list[str]:
    """The Python blocks of a page from a heading on."""
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(begin) :], re.S)


def step(distiller: Any, names: dict[str, Any], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of the pages' loop, backwards too: every parameter learns."""
    with torch.no_grad():
        taught = names["teacher"](names["images"], logits=False)
    losses = distiller.train()(names["images"], labels, taught)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())
    return losses


def test_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for n in range(10):
        write(tmp_path / f"photos/train/{n}.png", rng.integers(0, 256, (64, 128, 3)))
        write(tmp_path / f"masks/train/{n}_labelTrainIds.png", rng.integers(0, 19, (64, 128)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"DATADIR": str(tmp_path)}
    data, method = blocks_of("README.md", "### Your own data")
    classes, loop, loss, network, elsewhere = blocks_of("docs/EXTENDING.md")
    exec(data, names)
    monkeypatch.setitem(LAYOUTS, "mine", names["LAYOUT"])
    for block in (classes, loop, loss, network, method):
        exec(block, names)
    assert len(names["scenes"]) == 10
    ids = names["MINE"].table("label_ids")
    assert (ids[7], ids[23], ids[11], ids[9]) == (0, 1, 2, UNEXPECTED)
    assert set(names["losses"]) >= {"ce", "hcl", "embed4"}
    assert load_model(tmp_path / "student.pth").name == "segformer_b0"

    channels = names["teacher"].channels
    monkeypatch.setitem(METHODS, "hints", Method(distiller=names["Hints"]))
    losses = step(METHODS["hints"].build(names["student"], channels), names, names["labels"])
    assert set(losses) == {"ce", "hints"} and losses["hints"] > 0.1  # beside a cross entropy of 3

    # The reader's own network is one like the others: taught by the method that needs most of it.
    monkeypatch.setitem(BUILDERS, "convnet", names["ConvNet"])
    student = create_model("convnet", 12, drop_path_rate=0.2)
    distiller = METHODS["transkd_ea"].build(student, channels)
    losses = step(distiller, names, names["labels"].clamp(max=11))
    assert set(losses) >= {"ce", "hcl", "embed4"}
    save_model(student.eval(), Path("own.safetensors"))
    loaded = load_model("own.safetensors")
    assert (loaded.name, loaded.num_classes) == ("convnet", 12)
    with torch.no_grad():
        images = torch.rand(1, 3, 33, 65)
        assert torch.equal(loaded(images).logits, student(images).logits)
    exec(elsewhere, dict(names))
    loaded = load_model("teacher.safetensors")
    assert (loaded.name, loaded.num_classes, loaded.normalisation) == ("convnet", 19, IMAGENET)
    monkeypatch.delitem(BUILDERS, "convnet")
    with pytest.raises(UserError, match=r"holds convnet, which models/factory\.py lacks"):
        load_model("teacher.safetensors")
