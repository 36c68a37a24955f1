"""The report page: what it says, that it needs no other file, and what it does without files."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets import open_split
from demo.scenes import write_dataset
from errors import UserError
from eval.rendering import colorize
from eval.report import Options, main, write_report
from models import create_model, save_model


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())


def write_run(folder: Path, method: str, mious: list[float], **options: Any) -> Path:
    """A run's folder, with a validation every other step."""
    folder.mkdir()
    options |= {"method": method, "parameters": 3719284}
    (folder / "options.json").write_text(json.dumps(options))
    records: list[dict[str, Any]] = [{"event": "start", "step": 0, "revision": 40 * "a"}]
    records += [{"event": "val", "step": 2, "mean_iou": 0.99}]  # and then it was killed and resumed
    for index, miou in enumerate(mious, 1):
        per_class = {"road": miou, "<wall>": None}
        scores = {"protocol": "paper", "mean_iou": miou, "per_class": per_class, "loss": 1.5}
        records += [{"event": "train", "step": 2 * index, "losses": {"total": 4, "<ce>": 1}}]
        records += [{"event": "val", "step": 2 * index} | scores]
    lines = "\n".join(map(json.dumps, records))
    (folder / "metrics.jsonl").write_text(lines + '\n{"event": "val", "st')  # killed while writing
    return folder


def test_page(tmp_path: Path) -> None:
    runs = {
        "alone": write_run(tmp_path / "1", "student", [0.2, 0.4, 0.35], lr=1, seed=0),
        "with & more": write_run(tmp_path / "2", "TransKDBase", [0.5], lr=1, seed=1, embed=5),
    }
    scores = {"protocol": "full", "mean_iou": 0.6, "per_class": {"road": 0.9}}
    scores |= {"confusion": [[3, 1]], "conditions": {"night": {"mean_iou": 0.123}}}
    shown: dict[str, Any] = {"title": "A < B", "introduction": "One.\n\nTwo.", "runs": runs}
    path = tmp_path / "new" / "page.html"
    write_report(path, evaluations={"teacher": scores}, plots=tmp_path / "plots", **shown)
    page = path.read_text("utf-8")
    text = text_of(page)
    headings = ["A < B One. Two. Results", "Training", "IoU per class", "mIoU by"]
    headings += ["Confusion matrices", "Options that differ", "Made with", "Not shown"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "alone student – 40.00 35.00 6 3,719,284" in text
    assert "with & more TransKDBase – 50.00 50.00 +15.00 2 3,719,284" in text
    assert "teacher 60.00 labels’ own size" in text
    assert "night 12.3" in text and "road 75 25 road ignore" in text
    assert "option alone with & more seed 0 1 Made" in text  # a student has no embed
    assert 10 * "a" in text and 11 * "a" not in text
    assert "Evaluation of alone: none of its last weights" in text

    pictures = dict(re.findall(r'<img[^>]* alt="([^"]*)"\s+src="([^"]*)"', page))
    charts = ["validation mIoU", "total loss", "&lt;ce&gt; loss", "validation loss"]
    assert list(pictures) == charts
    assert all(address.startswith("data:image/") for address in pictures.values())
    assert "<link" not in page and "<script" not in page and "http" not in page
    assert Image.open(tmp_path / "plots" / "validation_mIoU.png").width > 1000


def test_evaluated_runs(tmp_path: Path) -> None:
    """Images, and notes on what has changed since."""
    data, output = tmp_path / "city", tmp_path / "page.html"
    write_dataset(data, train=1, val=4, height=64, width=96)
    for path in data.rglob("hafen_000002*"):  # its name is no UTF-8
        path.rename(path.with_name(path.name.replace("hafen", "\udce9")))
    trained = {"dataset": "cityscapes", "datadir": str(data)}
    runs = tuple(write_run(tmp_path / name, "student", [0.2], **trained) for name in ("one", "two"))
    for run in runs:
        save_model(create_model("segformer_b0"), run / "student.safetensors", step=2, height=64)

    def text(evaluate: bool = False) -> str:
        main(Options(runs, output=output, device="cpu", evaluate=evaluate))
        return text_of(output.read_text("utf-8"))

    shown = text(evaluate=True)
    assert len(json.loads((runs[0] / "eval.json").read_text())["per_image"]) == 4
    assert shown.count("photograph truth one, ") == 4 and "/?_000002_000019" in shown
    assert shown.index("Worst leftImg8bit") < shown.index("Best leftImg8bit")
    assert "Not shown" not in shown
    write_report(output, runs={"one": runs[0]}, spaced=2)
    page = output.read_text("utf-8")
    shown = text_of(page)
    assert shown.count("photograph truth one, ") == 2 + 4
    chosen = shown[shown.index("Evenly spaced") : shown.index("Worst leftImg8bit")]
    assert chosen.index("hafen_000000") < chosen.index("?_000002")  # the first and the last
    (truth, *_) = re.findall('alt="truth"\\s+src="data:image/png;base64,([^"]*)"', page)
    dataset = open_split("cityscapes", data, "val")
    expected = colorize(dataset.full_label(0), dataset.classes)
    assert Image.open(io.BytesIO(base64.b64decode(truth))).tobytes() == expected.tobytes()
    save_model(create_model("segformer_b0"), runs[1] / "student.safetensors", step=4, height=64)
    data.rename(tmp_path / "moved")
    shown = text()
    assert "Evaluation of two: none of its last weights" in shown
    assert "Images: " in shown
    with pytest.raises(UserError, match=r"a file that ends in \.html"):
        main(Options(runs, output=runs[0] / "options.json"))
