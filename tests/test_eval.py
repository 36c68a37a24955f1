"""The evaluation scripts on small trees: scores, pictures, and what they refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli import run
from datasets import SceneDataset, open_split
from datasets.classes import CITYSCAPES
from datasets.loading import evaluation_batches
from datasets.transforms import to_float
from errors import UserError
from eval import (
    commands,
    eval_ACDC_color,
    eval_ACDC_iou,
    eval_cityscapes_color,
    eval_cityscapes_iou,
    eval_color,
    eval_iou,
    options,
)
from eval.inference import evaluate, forward, render
from eval.rendering import colorize, legend, overlay, side_by_side, stack
from models import SegFormer, create_model, load_model

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = (96, 192)  # height, width of the files; evaluated at height 64


def write_pair(image: Path, label: Path, rng: np.random.Generator, classes: int = 19) -> None:
    """Noise as photograph; as label, blocks of label ids with some ignored ones (0 and 4)."""
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(image)
    ids = np.array([*CITYSCAPES.label_ids[:classes], 0, 4], np.uint8)
    blocks = ids[rng.integers(0, len(ids), (SIZE[0] // 8, SIZE[1] // 8))]
    Image.fromarray(np.kron(blocks, np.ones((8, 8), np.uint8))).save(label)


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled val images, one of them .jpg, in a few classes only; a test image without."""
    root, rng = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for i, suffix in enumerate(("png", "png", "jpg")):
        name = f"val/frankfurt/frankfurt_000000_00000{i}"
        image = root / "leftImg8bit" / f"{name}_leftImg8bit.{suffix}"
        write_pair(image, root / "gtFine" / f"{name}_gtFine_labelIds.png", rng, classes=12)
    image = root / "leftImg8bit/test/berlin/berlin_000000_000000_leftImg8bit.png"
    write_pair(image, root / "unused.png", rng)
    return root


@pytest.fixture(scope="module")
def acdc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("acdc"), np.random.default_rng(1)
    for drive, (condition, images) in enumerate(
        (("fog", 2), ("night", 1), ("rain", 1), ("snow", 1))
    ):
        for i in range(images):
            name = f"{condition}/val/GOPR000{drive}/GOPR000{drive}_frame_00000{i}"
            image, label = f"rgb_anon/{name}_rgb_anon.png", f"gt/{name}_gt_labelIds.png"
            write_pair(root / image, root / label, rng)
    return root


@pytest.fixture(scope="module")
def model() -> SegFormer:
    """A B0 with random weights, balanced so that every class is predicted, ignore among them."""
    torch.manual_seed(0)
    model = create_model("segformer_b0").eval()
    with torch.no_grad():
        model.linear_pred.weight.normal_()
        logits = model(torch.rand(1, 3, 64, 128)).logits
        model.linear_pred.bias -= logits.mean(dim=(0, 2, 3))
    return model


@pytest.fixture(scope="module")
def weights(model: SegFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as the published distillation checkpoints are."""
    path = tmp_path_factory.mktemp("weights") / "released.pth"
    torch.save({f"module.student.{key}": x for key, x in model.state_dict().items()}, path)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a script's main with these flags in this process; its exit code and what it printed."""

    def call(script: Any, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags), "--num-workers", "0"])
        kind = options.IoUOptions if script.__name__.endswith("iou") else options.ColorOptions
        try:
            run(script.main, kind)
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return call


def count(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """IoU by class name, straight from the definition."""
    scores = {}
    for index, name in enumerate(CITYSCAPES.names):
        both = either = 0
        for prediction, label in pairs:
            p, y = (prediction == index) & (label < 19), label == index
            both, either = both + int((p & y).sum()), either + int((p | y).sum())
        if either:
            scores[name] = both / either
    return scores


def predict(model: SegFormer, data: SceneDataset, index: int) -> np.ndarray:
    with torch.no_grad():
        return model(to_float(data[index].image)[None]).logits.argmax(1)[0].numpy()


def test_paper_protocol_by_script(
    cityscapes: Path, model: SegFormer, weights: Path, tmp_path: Path
) -> None:
    """From another folder, through the command line, against the definition."""
    result = tmp_path / "new" / "eval.json"
    flags = ["--datadir", cityscapes, "--weights", weights, "--height", 64, "--json", result]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "eval/eval_cityscapes_iou.py", *map(str, flags)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr and len(done.stderr.strip().splitlines()) == 1

    data = open_split("cityscapes", cityscapes, "val", height=64, cache=False)
    pairs = [(predict(model, data, i), data[i].label.numpy()) for i in range(3)]
    assert any((prediction == 19).any() for prediction, _ in pairs)
    expected = count(pairs)
    written = json.loads(result.read_text())
    assert [path.name for path in result.parent.iterdir()] == ["eval.json"]
    assert {k: v for k, v in written["per_class"].items() if v is not None} == expected
    assert written["mean_iou"] == pytest.approx(sum(expected.values()) / len(expected))
    assert written["mean_iou_published"] == pytest.approx(sum(expected.values()) / 19)
    assert (written["protocol"], written["images"]) == ("paper", 3)
    assert written["weights"] == str(weights) and "conditions" not in written
    source = ("dataset", "datadir", "subset", "height")
    assert [written[key] for key in source] == ["cityscapes", str(cityscapes), "val", 64]
    for true, predicted in ((0, 0), (3, 19), (11, 2)):
        pixels = sum(int(((y == true) & (p == predicted)).sum()) for p, y in pairs)
        assert written["confusion"][true][predicted] == pixels
    assert [len(row) for row in written["confusion"]] == 19 * [20]
    for sample, pair in zip(data.samples, pairs, strict=True):
        own = count([pair])
        assert written["per_image"][sample.name] == pytest.approx(sum(own.values()) / len(own))
    assert f"{100 * written['mean_iou']:.2f}" in done.stdout
    assert ("published mean" in done.stdout) == (len(expected) < 19)


def test_batches_and_workers_change_nothing(cityscapes: Path, model: SegFormer) -> None:
    data = open_split("cityscapes", cityscapes, "val", height=64, cache=False)
    model.train()
    try:
        results = [
            evaluate(model, data, batch_size=b, num_workers=w, progress=False, protocol=p).counts
            for p in ("paper", "full")
            for b, w in ((1, 0), (2, 1))
        ]
        assert model.training  # as it was
    finally:
        model.eval()
    assert torch.equal(results[0].counts, results[1].counts)
    assert torch.equal(results[2].counts, results[3].counts)
    assert int(results[2].counts.sum()) == 3 * SIZE[0] * SIZE[1]


def test_full_protocol_is_what_cityscapesscripts_scores(
    cityscapes: Path, weights: Path, tmp_path: Path, command: Any
) -> None:
    """Our label-id files under the benchmark's evaluator give our own full-size figures."""
    peer = import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

    flags = ["--datadir", cityscapes, "--weights", weights, "--height", 64, "--batch-size", 2]
    scored = tmp_path / "eval.json"
    assert command(eval_cityscapes_iou, *flags, "--protocol", "full", "--json", scored)[0] == 0
    pictures = tmp_path / "pictures"
    assert command(eval_cityscapes_color, *flags, "--label-ids", "--output-dir", pictures)[0] == 0

    predictions = sorted(pictures.rglob("*.png"))
    truths = sorted(cityscapes.glob("gtFine/val/*/*_labelIds.png"))
    assert len(predictions) == len(truths) == 3
    assert {int(i) for path in predictions for i in np.unique(np.asarray(Image.open(path)))} <= set(
        CITYSCAPES.label_ids[:19]
    )
    peer.args.predictionPath, peer.args.predictionWalk = (
        str(pictures),
        None,
    )  # as it finds a submission's files
    assert [peer.getPrediction(peer.args, str(truth)) for truth in truths] == [
        str(path) for path in predictions
    ]
    peer.args.evalInstLevelScore, peer.args.JSONOutput, peer.args.quiet = False, False, True
    theirs = peer.evaluateImgLists(
        [str(p) for p in predictions], [str(t) for t in truths], peer.args
    )
    ours = json.loads(scored.read_text())
    assert ours["mean_iou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-12)
    for name, value in ours["per_class"].items():
        expected = theirs["classScores"][name]
        assert (
            value == pytest.approx(expected, abs=1e-12) if value is not None else np.isnan(expected)
        )
    assert sum(value is not None for value in ours["per_class"].values()) > 12  # predicted counts


def test_acdc_conditions(acdc: Path, weights: Path, tmp_path: Path, command: Any) -> None:
    result = tmp_path / "eval.json"
    flags = ["--datadir", acdc, "--weights", weights, "--height", 64, "--json", result]
    code, out, _ = command(eval_ACDC_iou, *flags)
    assert code == 0
    written = json.loads(result.read_text())
    conditions = written["conditions"]
    assert {name: part["images"] for name, part in conditions.items()} == {
        "fog": 2,
        "night": 1,
        "rain": 1,
        "snow": 1,
    }
    assert all(
        set(part) == {"protocol", "images", "mean_iou", "mean_iou_published", "per_class"}
        for part in conditions.values()
    )
    assert (
        sum(len(part["per_class"]) for part in conditions.values()) == 4 * 19
        and len(written["per_image"]) == 5
    )
    assert all(word in out for word in ("all", "fog", "night", "rain", "snow", "motorcycle"))
    data = open_split("ACDC", acdc, "val", height=64, cache=False, conditions=["night"])
    night = evaluate(load_model(weights), data, progress=False).counts.scores()
    assert {key: conditions["night"][key] for key in night} == night
    assert written["mean_iou"] not in [part["mean_iou"] for part in conditions.values()]


def test_train_ids_are_what_the_acdc_server_takes(
    acdc: Path, model: SegFormer, weights: Path, tmp_path: Path, command: Any
) -> None:
    """One channel at the photograph's size, 0 … 18, all in one folder."""
    data = open_split("ACDC", acdc, "val", height=64, cache=False)
    flags = [
        "--datadir",
        acdc,
        "--weights",
        weights,
        "--height",
        64,
        "--output-dir",
        tmp_path / "train_ids",
    ]
    code, _, err = command(eval_ACDC_color, *flags, "--train-ids", "--flat")
    assert code == 0, err
    files = [tmp_path / "train_ids" / Path(sample.name).name for sample in data.samples]
    assert len(files) == 5 and all(path.name.endswith("_rgb_anon.png") for path in files)
    ids = render(model, data, tmp_path / "label_ids", ids="label_ids", progress=False)
    for ours, theirs in zip(files, ids, strict=True):
        picture = Image.open(ours)
        assert picture.mode == "L" and picture.size == (SIZE[1], SIZE[0])
        labels = np.asarray(picture)
        assert labels.max() < 19 and len(np.unique(labels)) > 5
        assert (np.asarray(CITYSCAPES.label_ids)[labels] == np.asarray(Image.open(theirs))).all()


def test_colour_at_the_logits_size(
    acdc: Path, model: SegFormer, weights: Path, tmp_path: Path, command: Any
) -> None:
    flags = ["--datadir", acdc, "--weights", weights, "--height", 64, "--output-dir", tmp_path]
    code, out, _ = command(eval_ACDC_color, *flags)
    assert code == 0 and str(tmp_path) in out
    data = open_split("ACDC", acdc, "val", height=64, cache=False)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.*"))] == sorted(
        sample.name for sample in data.samples
    )
    for index, sample in enumerate(data.samples):
        written = np.asarray(Image.open(tmp_path / sample.name))
        prediction = predict(model, data, index)
        assert written.shape == (16, 32, 3)
        for value in np.unique(prediction):  # class by class, against the palette table
            assert (written[prediction == value] == CITYSCAPES.palette[value]).all()


def test_colour_full_and_overlay(cityscapes: Path, weights: Path, tmp_path: Path) -> None:
    data, model = (
        open_split("cityscapes", cityscapes, "val", height=64, cache=False),
        load_model(weights),
    )
    full = render(model, data, tmp_path / "full", size="full", progress=False)
    blended = render(model, data, tmp_path / "blend", overlay=0.25, batch_size=2, progress=False)
    jpg = "leftImg8bit/val/frankfurt/frankfurt_000000_000002_leftImg8bit.png"  # the input is .jpg
    assert full[2] == tmp_path / "full" / jpg
    for index in range(3):
        colors, mix = (np.asarray(Image.open(p[index]), float) for p in (full, blended))
        photograph = np.asarray(data.photograph(index), float)
        assert colors.shape == (*SIZE, 3)
        assert np.abs(mix - (0.75 * photograph + 0.25 * colors)).max() <= 1
    batch = next(iter([data[0]]))
    logits = model(to_float(batch.image)[None]).logits.detach()
    grown = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
    expected = CITYSCAPES.palette[grown.argmax(1)[0].numpy()]
    assert (np.asarray(Image.open(full[0])) == expected).all()


def test_runs_have_folders_of_their_own(
    cityscapes: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All runs' weights are called student."""
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path / "outputs")
    for place in ("one", "two", "elsewhere"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "student.pth").symlink_to(weights)
        if place != "elsewhere":
            (tmp_path / place / "options.json").write_text("{}")
        chosen = options.ColorOptions(
            cityscapes, weights=tmp_path / place / "student.pth", height=64, num_workers=0
        )
        made = commands.paint("cityscapes", chosen)
        folder = (
            tmp_path / "outputs" / "color" / ("" if place == "elsewhere" else place) / "student"
        )
        assert made and all(path.is_relative_to(folder) for path in made)


def test_scripts_for_any_data_set(
    cityscapes: Path, acdc: Path, weights: Path, tmp_path: Path
) -> None:
    for dataset, datadir, scorer in (
        ("cityscapes", cityscapes, eval_cityscapes_iou),
        ("ACDC", acdc, eval_ACDC_iou),
    ):
        common: dict[str, Any] = {
            "datadir": datadir,
            "weights": weights,
            "height": 64,
            "num_workers": 0,
        }
        results = tmp_path / f"{dataset}.json", tmp_path / f"{dataset}_any.json"
        scorer.main(options.IoUOptions(**common, json=results[0]))
        eval_iou.main(eval_iou.Options(**common, json=results[1], dataset=dataset))
        assert results[0].read_text() == results[1].read_text()
        eval_color.main(
            eval_color.Options(**common, output_dir=tmp_path / dataset, dataset=dataset)
        )
        images = json.loads(results[0].read_text())["images"]
        assert len(list((tmp_path / dataset).rglob("*.png"))) == images > 0


def test_splits_without_labels_are_rendered_but_not_scored(
    cityscapes: Path, weights: Path, tmp_path: Path, command: Any
) -> None:
    flags = ["--datadir", cityscapes, "--weights", weights, "--height", 64, "--subset", "test"]
    result = tmp_path / "written.json"
    code, _, _ = command(
        eval_cityscapes_color, *flags, "--output-dir", tmp_path, "--label-ids", "--json", result
    )
    (picture,) = json.loads(result.read_text())["files"]
    assert code == 0 and Image.open(picture).mode == "L"
    assert Image.open(picture).size == (SIZE[1], SIZE[0])
    code, _, err = command(eval_cityscapes_iou, *flags)
    assert code == 2 and "label" in err and "berlin_000000_000000" in err
    data = open_split(
        "cityscapes", cityscapes, "test", height=64, cache=False, require_labels=False
    )
    with pytest.raises(UserError, match="has no label to score against"):
        evaluate(load_model(weights), data, progress=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--overlay", "1.5"], "--overlay 1.5"),
        (["--overlay", "0.5", "--label-ids"], "exclude each other"),
        (["--train-ids", "--label-ids"], "exclude each other"),
        (["--output-dir", "{datadir}/leftImg8bit/val"], "lies in the data set"),
        (["--output-dir", "{datadir}", "--flat"], "lies in the data set"),
        (
            ["--datadir", "{linked}", "--output-dir", "{datadir}/leftImg8bit/val/new"],
            "lies in the data set",
        ),
        (["--output-dir", "{weights}"], "can't make the folder"),
        (["--json", "{linked}"], "is a folder"),
        (["--json", "{weights}"], "does not end in .json"),
        (["--distillation-type", "student"], "leave one out"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--device", "warp"], "--device warp"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_mistakes_get_one_line(
    cityscapes: Path, weights: Path, tmp_path: Path, command: Any, flags: list[str], words: str
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "leftImg8bit").symlink_to(cityscapes / "leftImg8bit")
    given = [
        "--datadir",
        cityscapes,
        "--weights",
        weights,
        "--height",
        64,
        "--output-dir",
        tmp_path / "pictures",
    ]
    more = [flag.format(datadir=cityscapes, linked=linked, weights=weights) for flag in flags]
    code, _, err = command(eval_cityscapes_color, *given, *more)
    assert code == 2 and words in err and err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png")) and not (cityscapes / "leftImg8bit/val/new").exists()


@pytest.mark.parametrize(
    ("script", "kind", "name"),
    [
        (eval_cityscapes_iou, "teacher", "segformerb2_teacher_cityscapes.pth"),
        (eval_cityscapes_color, "student", "segformerb0_student_cityscapes.pth"),
        (eval_ACDC_iou, "TransKD_GL", "segformerb0_TransKD_GL_acdc.pth"),
        (eval_ACDC_color, "TransKD_EA", "segformerb0_TransKD_EA_acdc.pth"),
    ],
)
def test_published_names(
    script: Any,
    kind: str,
    name: str,
    cityscapes: Path,
    acdc: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
) -> None:
    monkeypatch.setattr(options, "OUTPUTS", tmp_path)
    datadir = acdc if "ACDC" in script.__name__ else cityscapes
    flags = ["--datadir", datadir, "--distillation-type", kind, "--height", 64]
    if script.__name__.endswith("color"):
        flags += ["--output-dir", tmp_path / "pictures"]
    code, _, err = command(script, *flags)
    assert code == 2 and str(tmp_path / name) in err and "--weights" in err
    (tmp_path / name).write_bytes(weights.read_bytes())
    assert command(script, *flags)[0] == 0


def test_pictures_stay_below_the_output_folder(
    cityscapes: Path, model: SegFormer, tmp_path: Path
) -> None:
    """A link in the output folder that leads elsewhere is not followed."""
    data = open_split("cityscapes", cityscapes, "val", height=64, cache=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "leftImg8bit").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leaves --output-dir"):
        render(model, data, tmp_path / "out", progress=False)
    assert not list(elsewhere.iterdir())
    with pytest.raises(UserError, match="is an input image"):
        render(model, data, cityscapes, progress=False)


def test_odd_sizes(model: SegFormer, tmp_path: Path) -> None:
    """65×131 pixels: logits, quarter label and scores agree on 17×33."""
    (tmp_path / "leftImg8bit/val/a").mkdir(parents=True)
    (tmp_path / "gtFine/val/a").mkdir(parents=True)
    image = Image.fromarray(np.full((65, 131, 3), 90, np.uint8))
    image.save(tmp_path / "leftImg8bit/val/a/a_000000_000000_leftImg8bit.png")
    label = Image.fromarray(np.full((65, 131), 7, np.uint8))
    label.save(tmp_path / "gtFine/val/a/a_000000_000000_gtFine_labelIds.png")
    data = open_split("cityscapes", tmp_path, "val", height=65, cache=False)
    counted = [evaluate(model, data, protocol=p, progress=False).counts for p in ("paper", "full")]
    assert [int(matrix.counts.sum()) for matrix in counted] == [17 * 33, 65 * 131]


def test_figures() -> None:
    """Sizes and colours of the parts a figure is made of."""
    labels = np.array([[0, 10], [13, 19]])
    colors = colorize(labels, CITYSCAPES)
    assert [colors.getpixel(p) for p in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        (128, 64, 128),
        (70, 130, 180),
        (0, 0, 142),
        (0, 0, 0),
    ]
    photograph = Image.new("RGB", (8, 4), (100, 100, 100))
    assert overlay(photograph, colors, 0.0).getpixel((0, 0)) == (100, 100, 100)
    assert overlay(photograph, colors, 0.5).getpixel((7, 0)) == (85, 115, 140)
    row = side_by_side([("photograph", photograph.resize((200, 100))), ("truth", colors)])
    assert row.width == 200 + 8 + 100 and row.height > 100
    assert row.getpixel((row.width - 60, row.height - 60)) == (128, 64, 128)  # grown, not blurred
    strip = legend(CITYSCAPES, 300, present=[13])
    assert (0, 0, 142) in {color for _, color in strip.getcolors(10_000)}
    assert stack([row, strip]).size == (max(row.width, 300), row.height + strip.height)


def test_forward_is_the_model(model: SegFormer, cityscapes: Path) -> None:
    data = open_split("cityscapes", cityscapes, "val", height=64, cache=False)
    (batch,) = evaluation_batches(data, batch_size=3)
    with torch.no_grad():
        expected = model(batch.images.float() / 255).logits
    assert torch.equal(forward(model, batch, "cpu"), expected)


def test_colours_of_any_type() -> None:
    """A palette written without dtype, or as a plain list, gives the colours that it says."""
    colours = [(200, 10, 20), (30, 140, 50), (0, 0, 0)]
    for palette in (colours, np.array(colours)):
        mine = replace(
            CITYSCAPES, names=("road", "sky"), palette=palette, weights=None, label_ids=(1, 2, 0)
        )
        assert np.asarray(colorize(np.array([[0, 1, 2]]), mine)).tolist() == [
            [list(colour) for colour in colours]
        ]
