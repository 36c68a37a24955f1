"""The evaluation scripts on small trees: scores, pictures, and what they refuse."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datasets import SceneDataset, open_split, to_float
from datasets.classes import CITYSCAPES
from demo.scenes import write_dataset
from errors import UserError
from eval import commands, eval_ACDC_iou, eval_cityscapes_color, eval_cityscapes_iou
from eval.commands import ColorOptions, IoUOptions
from eval.inference import Views, evaluate
from eval.predictor import forward
from models import SegmentationModel, create_model, load_model
from tests.conftest import ROOT

SIZE = (96, 192)  # height, width of the files; evaluated at height 64


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory) -> Path:
    """Three labelled val images, one a .jpg; a test image without a label."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_dataset(root, train=1, val=3, height=96, width=192, label_ids=True)
    path = next((root / "leftImg8bit/val").rglob("*.png"))
    image = Image.open(path)
    (root / "leftImg8bit/test/berlin").mkdir(parents=True)
    image.save(root / "leftImg8bit/test/berlin/berlin_000000_000000_leftImg8bit.png")
    image.save(path.with_suffix(".jpg"))
    path.unlink()
    return root


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    """A B0 with random weights, balanced so that every class is predicted, ignore among them."""
    torch.manual_seed(0)
    model = create_model("segformer_b0").eval()
    classifier: Any = model.head.classifier
    with torch.no_grad():
        classifier.weight.normal_()
        logits = model(torch.rand(1, 3, 64, 128)).logits
        classifier.bias -= logits.mean(dim=(0, 2, 3))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> dict[str, Any]:
    """Weights laid out as the published distillation checkpoints are."""
    path = tmp_path_factory.mktemp("weights") / "released.pth"
    torch.save({f"module.student.{key}": x for key, x in model.state_dict().items()}, path)
    return {"weights": path, "height": 64, "num_workers": 0}


def open_val(root: Path, dataset: str = "cityscapes") -> SceneDataset:
    return open_split(dataset, root, "val", height=64)


def predict(model: SegmentationModel, data: SceneDataset, index: int) -> torch.Tensor:
    return model(to_float(data[index].image)[None]).logits[0]


def ious(counts: np.ndarray) -> np.ndarray:
    """Of pixel counts by true and predicted class; NaN for a class that does not occur."""
    both = counts.diagonal()
    with np.errstate(invalid="ignore"):
        return both / (counts.sum(1) + counts[:, :19].sum(0) - both)


def test_paper_protocol_by_script(cityscapes, model, flags, tmp_path, command) -> None:
    """From another folder, through the command line, against the definition."""
    result = tmp_path / "new" / "eval.json"
    words = ["--datadir", cityscapes, "--weights", flags["weights"], "--height", 64]
    words += ["--batch-size", 2, "--num-workers", 2, "--json", result]
    done = command(ROOT / "eval/eval_cityscapes_iou.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = open_val(cityscapes)
    counts = np.zeros((3, 20, 20), int)
    for i in range(3):
        prediction = predict(model, data, i).argmax(0).numpy()
        np.add.at(counts[i], (data[i].label.numpy(), prediction), 1)
    counts = counts[:, :19]
    assert counts[..., 19].any()
    expected = ious(counts.sum(0))
    written = json.loads(result.read_text())
    assert written["confusion"] == counts.sum(0).tolist()
    found = np.array(list(written["per_class"].values()), float)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert written["mean_iou"] == pytest.approx(np.nanmean(expected))
    assert f"{100 * written['mean_iou']:.2f}" in done.stdout
    for sample, own in zip(data.samples, counts, strict=True):
        assert written["per_image"][sample.name] == pytest.approx(np.nanmean(ious(own)))


def test_full_protocol_is_what_cityscapesscripts_scores(cityscapes, flags, tmp_path) -> None:
    peer = import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    scored, pictures = tmp_path / "eval.json", tmp_path / "pictures"
    common = flags | {"datadir": cityscapes, "batch_size": 2}
    eval_cityscapes_iou.main(IoUOptions(**common, protocol="full", json=scored))
    eval_cityscapes_color.main(ColorOptions(**common, label_ids=True, output_dir=pictures))

    predictions = [str(path) for path in sorted(pictures.rglob("*.png"))]
    truths = [str(path) for path in sorted(cityscapes.glob("gtFine/val/*/*_labelIds.png"))]
    # As it finds a submission's files.
    peer.args.predictionPath, peer.args.predictionWalk = str(pictures), None
    assert [peer.getPrediction(peer.args, truth) for truth in truths] == predictions
    peer.args.evalInstLevelScore, peer.args.JSONOutput, peer.args.quiet = False, False, True
    theirs = peer.evaluateImgLists(predictions, truths, peer.args)
    ours = json.loads(scored.read_text())
    assert ours["mean_iou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-12)
    for name, value in ours["per_class"].items():
        expected = theirs["classScores"][name]
        assert np.isnan(expected) if value is None else value == pytest.approx(expected, abs=1e-12)
    assert sum(value is not None for value in ours["per_class"].values()) > 12  # predicted counts


def reference(model: Any, photograph: Image.Image, views: Any) -> torch.Tensor:
    """Mean class probabilities (19, *SIZE), one view after the other, at height 64."""
    (h, w), (down, right) = views.window, views.stride
    probabilities = []
    for scale in views.scales:
        size = (round(scale * 128), round(scale * 64))
        pixels = np.array(photograph.resize(size, Image.Resampling.BILINEAR))
        upright = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        for image in (upright, upright.flip(-1)):
            logits, seen = torch.zeros(1, 20, *image.shape[-2:]), 0 * image[:, :1]
            for y in range(0, max(image.shape[-2] - h, 0) + down, down):
                for x in range(0, max(image.shape[-1] - w, 0) + right, right):
                    bottom, end = min(y + h, image.shape[-2]), min(x + w, image.shape[-1])
                    part = np.s_[..., max(bottom - h, 0) : bottom, max(end - w, 0) : end]
                    found = model(image[part]).logits
                    logits[part] += F.interpolate(found, image[part].shape[2:], mode="bilinear")
                    seen[part] += 1
            full = F.interpolate((logits / seen)[:, :19], SIZE, mode="bilinear").softmax(1)
            probabilities.append(full if image is upright else full.flip(-1))
    return torch.cat(probabilities).mean(0)


def test_averages_over_several_views(cityscapes, model) -> None:
    views = Views(scales=(1.75, 0.75), flip=True, window=(64, 64), stride=(40, 24))
    data = open_val(cityscapes)
    data.samples = data.samples[:1]
    expected = reference(model, data.photograph(0), views)
    network = partial(forward, model, device="cpu")
    found = views.probabilities(network, data.photograph(0), 64, SIZE, 19)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    counts = evaluate(model, data, protocol="full", views=views).counts[0]
    pairs = data.full_label(0).astype(int) * 20 + expected.argmax(0).numpy()
    matrix = torch.from_numpy(np.bincount(pairs.ravel(), minlength=400)).view(20, 20)
    assert int((counts - matrix).abs().sum()) <= 10  # of 18432 pixels, where two classes tie


def test_acdc_conditions(weathers, flags, tmp_path, capsys) -> None:
    eval_ACDC_iou.main(IoUOptions(weathers, **flags, json=tmp_path / "eval.json"))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("all", "fog", "snow", "motorcycle"))
    written = json.loads((tmp_path / "eval.json").read_text())
    assert list(written["conditions"]) == ["fog", "night", "rain", "snow"]
    data = open_val(weathers, "ACDC")
    data.samples = [sample for sample in data.samples if sample.condition == "night"]
    network = load_model(flags["weights"]).train()
    night = evaluate(network, data).as_json()
    assert network.training  # as it was
    assert written["conditions"]["night"] == night["conditions"]["night"]
    assert written["mean_iou"] not in [x["mean_iou"] for x in written["conditions"].values()]


def test_pictures(cityscapes, model, flags, tmp_path) -> None:
    """At the logits' size, the photograph's, blended with it, and as the ACDC server takes them."""
    kinds: dict[str, Any] = {
        "small": {},
        "full": {"size": "full"},
        "mixed": {"overlay": 0.25, "batch_size": 2},
        "ids": {"train_ids": True, "flat": True},
    }
    for kind, more in kinds.items():
        options = ColorOptions(cityscapes, **flags, **more, output_dir=tmp_path / kind)
        eval_cityscapes_color.main(options)
    data = open_val(cityscapes)
    for index, sample in enumerate(data.samples):
        name = Path(sample.name).with_suffix(".png")  # one of the inputs is .jpg
        small, full, mixed = (
            np.asarray(Image.open(tmp_path / kind / name), float)
            for kind in ("small", "full", "mixed")
        )
        logits = predict(model, data, index)
        assert (small == CITYSCAPES.palette[logits.argmax(0)]).all()
        grown = F.interpolate(logits[None], SIZE, mode="bilinear")[0]
        assert (full == CITYSCAPES.palette[grown.argmax(0)]).mean() > 0.999
        photograph = np.asarray(data.photograph(index), float)
        assert np.abs(mixed - (0.75 * photograph + 0.25 * full)).max() <= 1
        ids = Image.open(tmp_path / "ids" / name.name)
        assert ids.mode == "L" and np.mean(np.asarray(ids) == grown[:19].argmax(0).numpy()) > 0.999


def test_runs_have_folders_of_their_own(cityscapes, flags, tmp_path, monkeypatch) -> None:
    """All runs' weights are called student; `~` is the home folder. A split may lack labels."""
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student.pth").symlink_to(flags["weights"])
    given = flags | {"weights": Path("~/run/student.pth"), "subset": "test"}
    options = ColorOptions(cityscapes, **given, json=Path("~/x.json"))
    for folder in ("color/student", "color/run/student"):
        (made,) = commands.render("cityscapes", options)
        assert made.is_relative_to(tmp_path / folder)
        assert json.loads((tmp_path / "x.json").read_text())["files"] == [str(made)]
        (tmp_path / "run" / "options.json").write_text("{}")  # from now on it is a run's folder


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"overlay": 0.5, "label_ids": True}, "give one of --overlay"),
        ({"output_dir": Path()}, "lies among the images"),
        ({"weights": Path("no.onnx")}, "no weights at no.onnx"),
        ({"json": Path("weights.pth")}, r"name a file that ends in \.json"),
        ({"subset": "test", "protocol": "paper"}, "berlin_000000_000000"),  # which has no label
        ({"test_time": Views(scales=(0.5,)), "protocol": "paper"}, "--protocol full"),
        ({"test_time": Views(scales=(0.1,)), "protocol": "full"}, "height 6 is too small"),
        ({"height": 0, "protocol": "paper"}, "height 0 is too small"),
    ],
)
def test_mistakes(cityscapes, flags, tmp_path, monkeypatch, more, words) -> None:
    monkeypatch.chdir(cityscapes)
    with pytest.raises(UserError, match=words) as error:
        if "protocol" in more:
            eval_cityscapes_iou.main(IoUOptions(cityscapes, **flags | more))
        else:
            given = flags | {"output_dir": tmp_path} | more
            eval_cityscapes_color.main(ColorOptions(cityscapes, **given))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.png"))


def test_published_names(tmp_path, monkeypatch) -> None:
    """Evaluation looks for them in outputs/; one script has B2 in the student's name."""
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path)
    options = commands.Options(tmp_path, distillation_type="student")
    with pytest.raises(UserError, match="zoo download segformerb0_student_acdc,"):
        commands.find_weights(options, "ACDC")
    for size in ("b2", "b0"):
        path = tmp_path / f"segformer{size}_student_acdc.pth"
        path.touch()
        assert commands.find_weights(options, "ACDC") == path
