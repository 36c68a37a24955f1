"""Weights out: every export is read back by the library it is for. Weights in: what they expect of their input."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessorPil

from datasets import LAYOUTS
from datasets.classes import CITYSCAPES, VOC2012
from datasets.transforms import resize_image, to_float
from errors import UserError
from models import SegFormer, create_model, load_backbone, load_model, load_weights, save_model
from models.checkpoints import IMAGENET, read_facts
from models.export import SIZES, Export, OnnxNetwork, Options, difference, main
from models.factory import BUILDERS
from models.layouts.huggingface import to_huggingface
from models.layouts.mmsegmentation import to_mmseg
from models.model_card import model_card, read_run
from tests.conftest import Command
from tests.golden_data import seed
from tests.test_peers import huggingface_config, randomise, with_segformers_eps
from train import distill
from train.run_folder import FREE
from train.TransKDBase import Options as TrainingOptions

IMAGES = torch.rand((2, 3, 65, 130), generator=torch.Generator().manual_seed(3))
ODD = torch.rand((1, 3, 70, 33), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def network() -> SegFormer:
    return seed(create_model("segformer_b0")).eval()


@pytest.fixture(scope="module")
def weights(network: SegFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_model(network, path, method="TransKD_EA", dataset="ACDC", step=7, mean_iou=0.5891)
    return path


def beside(weights: Path, **options: object) -> Path:
    """The same weights in a run's folder, as training leaves it."""
    folder = weights.parent / "run"
    folder.mkdir(exist_ok=True)
    shutil.copy(weights, folder)
    written = {
        "method": "TransKD_EA",
        "dataset": "ACDC",
        "lr": 6e-05,
        "teacher_model": "segformer_b2",
        "height": 96,
    }
    (folder / "options.json").write_text(
        json.dumps(written | {"datadir": "/home/someone/data"} | options)
    )
    events = [
        {
            "event": "start",
            "step": 0,
            "revision": "f00d",
            "device": "NVIDIA X",
            "versions": {"torch": "2.13.0"},
        },
        {"event": "val", "step": 7, "per_class": {"road": 0.9, "train": None}},
        {"event": "val", "step": 8, "per_class": {"road": 0.1}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder / weights.name


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).logits


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 171, 3), np.uint8))


def ours(model: nn.Module, height: int) -> Tensor:
    """Logits of the photograph as this project predicts it."""
    pixels = torch.from_numpy(np.array(resize_image(photograph(), height)))
    return logits(model, to_float(pixels.permute(2, 0, 1)[None]))


def theirs(folder: Path) -> Tensor:
    """Logits of the photograph by transformers alone, as a model card says."""
    processor = SegformerImageProcessorPil.from_pretrained(folder)
    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    return logits(
        lambda images: with_segformers_eps(model)(**images),
        processor(photograph(), return_tensors="pt"),
    )


def test_huggingface_folder(
    weights: Path, network: SegFormer, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "student"
    flags = (
        "-m",
        "models.export",
        "--weights",
        weights,
        "--format",
        "hf",
        "--output",
        folder,
        "--height",
        64,
    )
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    assert (
        "3.72 M parameters" in done.stdout
        and "compared with ours" in done.stdout
        and not done.stderr
    )
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SegformerForSemanticSegmentation"]
    assert list(config["id2label"].values()) == [*CITYSCAPES.names, "ignore"]
    torch.testing.assert_close(theirs(folder), ours(network, 64), rtol=1e-4, atol=1e-5)
    assert theirs(folder).shape == (1, 20, 16, 31)  # 90×171 becomes 64×121
    ours_in = to_float(
        torch.from_numpy(np.array(resize_image(photograph(), 64))).permute(2, 0, 1)[None]
    )
    theirs_in = SegformerImageProcessorPil.from_pretrained(folder)(
        photograph(), return_tensors="pt"
    )
    torch.testing.assert_close(theirs_in["pixel_values"], ours_in, rtol=0, atol=1e-6)
    back = load_model(folder)
    assert back.normalisation is None
    assert torch.equal(logits(back, IMAGES), logits(network, IMAGES))
    again = command(*flags)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_model_card(weights: Path, tmp_path: Path) -> None:
    """What is known of a run is on the card, as the hub reads it; paths are not, nor another run's folder."""
    main(Options(weights=beside(weights), format="hf", output=tmp_path / "hf"))
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "a data set in the layout of ACDC",
        "mean_iou",
        58.91,
    )
    assert (card.data.license, card.data.datasets, card.data.metrics) == (
        "other",
        None,
        ["mean_iou"],
    )
    for fact in (
        "58.91 % mIoU",
        "after step 7",
        "| road | 90.00 |",
        "lr 6e-05",
        "teacher_model segformer_b2",
        "f00d",
    ):
        assert fact in card.text
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["size"] == {
        "shortest_edge": 96
    }
    assert "10.00" not in card.text and "| train |" not in card.text and "/home" not in str(card)
    main(
        Options(
            weights=beside(weights, method="TransKDBase"), format="hf", output=tmp_path / "other"
        )
    )
    text = (tmp_path / "other" / "README.md").read_text()
    assert "shorter side 512 pixels" in text
    assert (
        "58.91 % mIoU" in text
        and "Nothing is recorded beside these weights" in text
        and "lr" not in text
    )


@pytest.mark.parametrize(
    ("method", "says", "taught"),
    [
        ("teacher", "Trained without a teacher (method teacher)", False),
        ("student", "Trained without a teacher (method student)", False),
        ("reviewkd", "Distilled by reviewkd, in a PyTorch", True),
        ("TransKD_GL", "Distilled by TransKD_GL of TransKD", True),
    ],
)
def test_a_card_names_a_teacher_where_there_was_one(
    method: str, says: str, taught: bool, network: SegFormer, tmp_path: Path
) -> None:
    save_model(network, tmp_path / "w.safetensors", method=method, dataset="cityscapes")
    weights = beside(tmp_path / "w.safetensors", method=method, dataset="cityscapes", embed=5)
    facts = read_facts(weights)
    options = Options(weights=weights, format="hf", output=tmp_path)
    card = model_card(Export(network, facts, options, *read_run(weights, facts)))
    assert says in card and "lr 6e-05" in card
    for word in ("only the student is here", "teacher_model", "embed 5", "knowledge-distillation"):
        assert (word in card) == taught, word


def test_a_card_tells_every_option_that_changes_numbers(weights: Path, tmp_path: Path) -> None:
    options = distill.Options(method="response", datadir=tmp_path, crop=(64, 64)).as_json()
    save_model(
        load_model(weights), tmp_path / "w.safetensors", method="response", dataset="cityscapes"
    )
    taken = beside(tmp_path / "w.safetensors", **options)
    facts = read_facts(taken)
    export = Export(
        load_model(taken),
        facts,
        Options(weights=taken, format="hf", output=tmp_path),
        *read_run(taken, facts),
    )
    told = model_card(export).split("## Training")[1].split("\n\n")[1]
    names = {
        part.split()[0] for part in told.removeprefix("Options: ").split(", ") if part[0].isalpha()
    }
    bound = {key for key, value in options.items() if key not in FREE and value is not None}
    assert names == bound - {"method", "network", "dataset", "override"} | {"num_epochs"}


def test_facts_that_are_none_stop_nothing(
    network: SegFormer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged, of other types, or of a data set that is known elsewhere."""
    path, options = (
        tmp_path / "w.safetensors",
        Options(weights=tmp_path, format="onnx", output=tmp_path),
    )
    for facts in ("{", "[1]", '"x"'):
        save_file(network.state_dict(), path, {"facts": facts})
        assert read_facts(path) == {}
        assert "can't be understood" in capsys.readouterr().err
    save_file(
        network.state_dict(), path, {"facts": '{"dataset": 3, "mean_iou": "good", "step": 7}'}
    )
    assert read_facts(path) == {"step": 7}
    save_model(network, path, dataset="mine")
    names = Export(network, read_facts(path), options, {}, []).class_names
    assert (names[:2], names[-1], len(names)) == (["class 0", "class 1"], "ignore", 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argmax"), [("segformer_b0", False), ("pvt_v2_b0", True), ("lvt", False)]
)
def test_onnx(name: str, argmax: bool, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    network, path = seed(create_model(name)).eval(), tmp_path / "student.onnx"
    if argmax:  # "ignore" is the likeliest everywhere, and no answer
        network.get_parameter("head.conv_seg.bias").data[-1] += 1e6
    save_model(network, tmp_path / "w.safetensors")
    main(Options(weights=tmp_path / "w.safetensors", format="onnx", output=path, argmax=argmax))
    assert {file.name for file in tmp_path.iterdir()} == {
        "student.onnx",
        "w.safetensors",
    }  # weights inside
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [
        *CITYSCAPES.names,
        "ignore",
    ]
    for images in (IMAGES, ODD, torch.rand(3, 3, 64, 64)):
        expected = logits(network, images).numpy()
        (actual,) = session.run(None, {"images": images.numpy()})
        if argmax:
            assert actual.dtype == np.uint8
            np.testing.assert_array_equal(actual, expected[:, :19].argmax(1))
        else:
            np.testing.assert_allclose(
                actual, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
            )


def test_bare_weights(weights: Path, network: SegFormer, tmp_path: Path) -> None:
    """From a distilled checkpoint as published, the student alone; from our files, with what they tell."""
    released = tmp_path / "released.pth"
    state = {f"module.student.{key}": value for key, value in network.state_dict().items()}
    torch.save(state | {"module.embed1_linearproject.weight": torch.zeros(2)}, released)
    main(Options(weights=released, format="torch", output=tmp_path / "student.pth"))
    bare = torch.load(tmp_path / "student.pth", weights_only=True)
    assert bare.keys() == network.state_dict().keys()
    assert torch.equal(
        logits(load_model(tmp_path / "student.pth"), IMAGES), logits(network, IMAGES)
    )
    main(Options(weights=weights, format="safetensors", output=tmp_path / "copy.safetensors"))
    with (
        safe_open(weights, "pt") as before,
        safe_open(tmp_path / "copy.safetensors", "pt") as after,
    ):
        assert before.metadata() == after.metadata()


@pytest.mark.parametrize("kind", ["hf", "mmseg"])
def test_other_networks_are_refused(kind: str, tmp_path: Path) -> None:
    save_model(create_model("pvt_v2_b0"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="pvt_v2_b0 is none; choose onnx, safetensors or torch"):
        main(Options(weights=tmp_path / "w.safetensors", format=kind, output=tmp_path / "new"))


def test_an_onnx_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"w\.onnx is no network that models\.export wrote"):
        OnnxNetwork(tmp_path / "w.onnx")


def test_what_a_state_dict_cannot_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name of a network of one's own, by which it is read again."""

    class Own(SegFormer):
        def __init__(self, num_classes: int, **options: float) -> None:
            super().__init__("segformer_b0", num_classes, **options)
            self.extra = nn.Linear(1, 1)

    monkeypatch.setitem(BUILDERS, "own", Own)
    save_model(create_model("own"), tmp_path / "w.safetensors")
    main(
        Options(
            weights=tmp_path / "w.safetensors",
            format="safetensors",
            output=tmp_path / "copy.safetensors",
        )
    )
    with pytest.raises(
        UserError, match="a bare state dict can't say that it is own; use safetensors"
    ):
        main(Options(weights=tmp_path / "w.safetensors", format="torch", output=tmp_path / "w.pth"))


def test_a_wrong_export_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = to_huggingface(state)
        query = "segformer.encoder.block.0.0.attention.self.query.weight"
        return state | {query: -state[query]}

    monkeypatch.setattr("models.export.to_huggingface", swapped)
    with pytest.raises(UserError, match="differs from ours"):
        main(Options(weights=weights, format="hf", output=tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_number_is_a_difference(size: tuple[int, ...]) -> None:
    def theirs(images: Tensor) -> Tensor:
        return images * (float("nan") if images.shape == size else 1)

    assert not difference(lambda images: images, theirs) < 1e-3


def test_the_source_is_not_overwritten(network: SegFormer, tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pth"
    torch.save({"model": network.state_dict(), "optimizer": {"lr": 1.0}}, checkpoint)
    (tmp_path / "link.pth").symlink_to(checkpoint)
    with pytest.raises(UserError, match=r"last\.pth is --weights"):
        main(Options(weights=tmp_path / "link.pth", format="torch", output=checkpoint))
    assert "optimizer" in torch.load(checkpoint)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"format": "torch", "argmax": True}, "--argmax is for onnx"),
        ({"format": "onnx"}, "must end in .onnx"),
        (
            {"format": "onnx", "output": Path("s.onnx"), "height": 512},
            "--height is for hf and mmseg",
        ),
        ({"format": "hf", "height": -5}, "--height is -5"),
        ({"format": "safetensors"}, "must end in .safetensors"),
        ({"format": "hf", "weights": Path("nowhere")}, "nowhere"),
    ],
)
def test_mistakes(flags: dict, says: str, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        main(Options(**{"weights": weights, "output": tmp_path / "student.txt"} | flags))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["hf", "mmseg", "safetensors", "torch"])
def test_a_full_disk(kind: str, weights: Path, tmp_path: Path) -> None:
    """Its message is one line, and nothing is left."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2**20, unlimited[1])
    )  # the kernel lets no file grow beyond
    try:
        with pytest.raises(UserError, match=r"can't write .*File too large"):
            endings = {"safetensors": ".safetensors", "torch": ".pth"}
            main(
                Options(
                    weights=weights, format=kind, output=tmp_path / f"new{endings.get(kind, '')}"
                )
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


# What weights that were trained elsewhere expect ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public SegFormer on Cityscapes: 19 classes, and a processor that normalises."""
    folder = tmp_path_factory.mktemp("foreign")
    randomise(
        SegformerForSemanticSegmentation(huggingface_config("segformer_b0", 19))
    ).save_pretrained(folder)
    SegformerImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def test_their_preprocessing_is_honoured(foreign: Path, tmp_path: Path) -> None:
    """In: from the folder and from the file in it. Out: through our safetensors, through a folder of ours."""
    model = load_model(foreign)
    assert model.normalisation == IMAGENET and model.num_classes == 19
    expected = theirs(foreign)
    torch.testing.assert_close(ours(model, 64), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(seed_free(model), 64), expected, rtol=1e-2)

    for output, kind, height in (
        (tmp_path / "w.safetensors", "safetensors", None),
        (tmp_path / "hf", "hf", 64),
    ):
        main(
            Options(
                weights=foreign / "model.safetensors", format=kind, output=output, height=height
            )
        )
        assert torch.equal(ours(load_model(output), 64), ours(model, 64))
    torch.testing.assert_close(theirs(tmp_path / "hf"), expected)
    with pytest.raises(UserError, match="use safetensors"):
        main(Options(weights=foreign, format="torch", output=tmp_path / "w.pth"))

    for load in (load_weights, load_backbone):
        started = create_model("segformer_b0", 19).eval()
        load(started, tmp_path / "w.safetensors")
        assert torch.equal(ours(started, 64), ours(model, 64))
    assert "normalisation" not in "".join(model.state_dict())


def seed_free(model: SegFormer) -> SegFormer:
    """The same weights without the normalisation."""
    bare = create_model(model.name, model.num_classes).eval()
    bare.load_state_dict(model.state_dict())
    return bare


@pytest.mark.parametrize(
    ("theirs", "expected", "order"),
    [
        (
            ["void", *(n.title().replace(" ", "_") for n in CITYSCAPES.names)],
            CITYSCAPES.output_names,
            [*range(1, 20), 0],
        ),
        (CITYSCAPES.names[::-1], CITYSCAPES.names, range(18, -1, -1)),
        ([*CITYSCAPES.names[:-1], "tree"], (*CITYSCAPES.names[:-1], "tree"), range(19)),
        ([*CITYSCAPES.names, "tree"], (*CITYSCAPES.names, "tree"), range(20)),
        ([f"LABEL_{i}" for i in range(19)], None, range(19)),
        (["road"], None, range(19)),
    ],
    ids=["void first", "reversed", "another", "one more", "placeholders", "too few"],
)
@pytest.mark.parametrize("where", ["hf", "1.x", "0.x"])
def test_classes_come_in_our_order(
    where: str,
    theirs: list[str],
    expected: tuple[str, ...] | None,
    order: list[int],
    tmp_path: Path,
) -> None:
    """By their names, in Hugging Face's configuration and mmsegmentation's metadata; ours keep them."""
    network = seed(create_model("segformer_b0", len(order))).eval()
    if where == "hf":
        path = tmp_path
        save_file(to_huggingface(network.state_dict()), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(theirs))}))
    else:
        path = tmp_path / "w.pth"
        meta = (
            {"CLASSES": tuple(theirs)} if where == "0.x" else {"dataset_meta": {"classes": theirs}}
        )
        torch.save({"meta": meta, "state_dict": to_mmseg(network.state_dict())}, path)
    model = load_model(path)
    assert model.class_names == expected
    seen = model.normalisation(IMAGES) if model.normalisation else IMAGES
    torch.testing.assert_close(
        logits(model, IMAGES), logits(network, seen)[:, list(order)], rtol=1e-3, atol=1e-4
    )
    save_model(model, tmp_path / "ours.safetensors")
    ours = load_model(tmp_path / "ours.safetensors")
    assert ours.class_names == expected
    assert all(
        torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items()
    )


def test_an_order_that_a_data_set_has_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two data sets with the same classes, each one's weights stay in its order, and the other refuses them,
    unless it is to go on from them.
    """
    names, labels = CITYSCAPES.names[::-1], CITYSCAPES.label_ids
    turned = replace(
        CITYSCAPES, name="Turned", names=names, label_ids=(*labels[-2::-1], labels[-1])
    )
    monkeypatch.setitem(
        LAYOUTS, "turned", replace(LAYOUTS["cityscapes"], name="turned", classes=turned)
    )
    network = seed(create_model("segformer_b0", 20)).eval()
    for classes, other in ((turned, CITYSCAPES), (CITYSCAPES, turned)):
        network.class_names = classes.output_names
        save_model(network, tmp_path / "w.safetensors")
        model = load_model(tmp_path / "w.safetensors")
        assert torch.equal(logits(model, IMAGES), logits(network, IMAGES))
        classes.require("w", 20, model.class_names)
        with pytest.raises(UserError, match=f"w predicts {other.name}'s classes in another order"):
            other.require("w", 20, model.class_names)
        start = create_model("segformer_b0", 20).eval()
        start.class_names = other.output_names  # as training does
        assert load_backbone(start, tmp_path / "w.safetensors")
        torch.testing.assert_close(
            logits(start, IMAGES), logits(network, IMAGES)[:, [*range(18, -1, -1), 19]]
        )


def test_other_classes_are_refused_where_they_are_known() -> None:
    CITYSCAPES.require("w", 20, CITYSCAPES.output_names)
    for names in (None, ["class 0"] * 19):
        CITYSCAPES.require("w", 19, names)
    for outputs, names, says in (
        (
            19,
            [*CITYSCAPES.names[:-1], "tree"],
            r"other classes than Cityscapes's \(road, sidewalk, building …\)",
        ),
        (20, [*CITYSCAPES.names, "tree"], "other classes"),
        (21, None, "21 classes, Cityscapes has 19"),
    ):
        with pytest.raises(UserError, match=f"w predicts {says}"):
            CITYSCAPES.require("w", outputs, names)


def test_configurations_that_are_none(foreign: Path, tmp_path: Path) -> None:
    shutil.copy(foreign / "model.safetensors", tmp_path)
    for damaged in ("{", "[]", '{"id2label": 3}', '{"id2label": {"a": "road"}}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"config\.json is no configuration"):
            load_model(tmp_path)
    for damaged in ("{", "[1]", "3"):
        save_file(
            {"head.weight": torch.zeros(2)}, tmp_path / "w.safetensors", {"class_names": damaged}
        )
        with pytest.raises(UserError, match="tells class names that are none"):
            load_model(tmp_path / "w.safetensors")


def test_processors_of_other_kinds(foreign: Path, tmp_path: Path) -> None:
    state = to_huggingface(create_model("segformer_b0").state_dict())
    save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors"
    )
    file = tmp_path / "preprocessor_config.json"
    for processor, expected in (
        ({}, IMAGENET),  # their defaults
        ({"do_normalize": False}, None),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}, ((0.5,) * 3, (1.0,) * 3)),
        (
            {"do_normalize": False, "do_rescale": False},
            ((0.0,) * 3, (1 / 255,) * 3),
        ),  # wants 0 to 255
    ):
        file.write_text(json.dumps(processor))
        assert load_model(tmp_path).normalisation == expected
    for damaged in ("[]", "{", '{"image_mean": [1]}', '{"image_std": null}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"preprocessor_config\.json is no image processor"):
            load_model(tmp_path)


def test_releases_of_the_segformer_repository(network: SegFormer, tmp_path: Path) -> None:
    """mmcv's checkpoint: backbone and head prefixed, an unused classifier of the base class; trained normalised."""
    state = {
        f"{'decode_head' if key.startswith('linear_') else 'backbone'}.{key}": value
        for key, value in network.state_dict().items()
    }
    state |= {
        "decode_head.conv_seg.weight": torch.zeros(20, 128, 1, 1),
        "decode_head.conv_seg.bias": torch.zeros(20),
    }
    path = tmp_path / "segformer.b0.1024x1024.city.160k.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, path)
    model = load_model(path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(logits(model, IMAGES), logits(network, (IMAGES - mean) / std))


def test_a_foreign_teacher_teaches(
    foreign: Path, command: Command, scenes: Path, tmp_path: Path
) -> None:
    done = command(
        *(
            "train/TransKDBase.py",
            "--datadir",
            scenes,
            "--teacher-weights",
            foreign,
            "--teacher-model",
            "segformer_b0",
        ),
        *(
            "--height",
            64,
            "--num-workers",
            0,
            "--max-steps",
            1,
            "--no-tensorboard",
            "--device",
            "cpu",
        ),
        *("--validate-teacher", "--output-dir", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "run" / "student.safetensors").num_classes == 20


def test_a_teacher_of_another_kind_is_named(foreign: Path, tmp_path: Path) -> None:
    options = TrainingOptions(datadir=tmp_path, teacher_weights=foreign)
    with pytest.raises(
        UserError, match=r"does not fit segformer_b2; it looks like segformer_b0"
    ) as error:
        options.teacher(CITYSCAPES)
    assert "\n" not in str(error.value)
    options = TrainingOptions(
        datadir=tmp_path,
        teacher_weights=foreign,
        teacher_model="segformer_b0",
        validate_teacher=True,
    )
    assert options.teacher(CITYSCAPES).num_classes == 19
    with pytest.raises(UserError, match="predicts 19 classes, VOC 2012 has 21"):
        options.teacher(VOC2012)
