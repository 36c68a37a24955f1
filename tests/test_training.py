"""The training scripts on drawn scenes, and the promises of their loop."""

import json
import re
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datasets import Augmentation, SceneDataset, open_split, to_float
from eval.inference import evaluate
from models import create_model, load_model
from models.checkpoints import read_checkpoint
from models.distillation import Distiller
from models.layouts import IMAGENET
from tests import runs
from tests.conftest import ROOT, Command, write_dataset
from tests.golden_data import load
from tests.runs import Small
from train import TransKD_EA, TransKD_GLMixer, TransKDBase, student, teacher
from train.flags import DistillationOptions
from train.networks import teacher_path
from train.optimisation import Plan
from train.setup import start


def test_what_a_run_leaves(small: Small, weathers: Path) -> None:
    small.datadir = weathers
    small.train(TransKDBase, dataset="ACDC", max_steps=2, validate_teacher=True)
    assert small.steps() == [1, 2] and len(small.records("teacher")) == 1
    for losses in small.losses():
        assert list(losses) == ["ce", "hcl", "embed1", "embed2", "embed3", "embed4", "total"]
        assert losses["total"] == pytest.approx(sum(losses.values()) / 2)
    written = json.loads((small.folder / "options.json").read_text())
    assert (written["dataset"], written["parameters"]) == ("ACDC", 3_719_284)
    # A run's checkpoint is weights too, and distillation modules are none of the network.
    for name in ("student.safetensors", "student_best.safetensors"):
        small.require_equal("last.pt", name)
    before = (small.folder / "last.pt").read_bytes()
    small.refused("already holds a run; add --resume", TransKDBase, dataset="ACDC")
    assert (small.folder / "last.pt").read_bytes() == before


def test_the_published_command(small: Small, command: Command) -> None:
    """From the scripts' folder, as the original's README does it; the loss falls."""
    more = {"num_epochs": 6, "validate_every": 8, "lr": 1e-3}
    flags = runs.flags_of(student, small.datadir, small.folder, **more)
    done = command("student.py", *flags, cwd=ROOT / "train")
    assert done.returncode == 0 and "val mIoU" in done.stderr and "done: " in done.stderr, done
    last = r"epoch 6: +\S+ +30/30 +\d+\.\d+ steps/s +00:00 left, \d+\.\d images/s  lr \S+  ce \d"
    assert re.match(last, done.stderr.splitlines()[-1]), done
    ce = [losses["ce"] for losses in small.losses()]
    assert len(ce) == 30 and sum(ce[-5:]) < 0.7 * sum(ce[:5])
    (begin,) = small.records("start")
    assert begin["total_steps"] == 30 and begin["device"] and "--datadir" in begin["command"]


def test_schedule() -> None:
    """The learning rate of every epoch is the published one."""
    golden = load("lr_golden.json")["used_lr_by_epoch"]
    plan = Plan(runs.options_of(TransKDBase, Path(), Path()).recipe, 2, 10, 5)
    assert {epoch: plan.learning_rate(int(epoch), 0) for epoch in golden} == golden


@pytest.mark.parametrize(
    ("script", "more", "says"),
    [
        (student, {"datadir": "nowhere"}, "^no .png or .jpg images in nowhere/leftImg8bit/train"),
        (student, {"num_epochs": 2000}, "--lr-decay-epochs"),
        (student, {"accumulate": 3}, "--batch-size 2 can't be divided by 3"),
        (student, {"compile_mode": "max-autotune", "accumulate": 2}, "without --accumulate"),
        (student, {"published_shift": True, "loss_size": "full"}, "^--published-shift goes"),
        (student, {"scale": [2.0, 0.5]}, "^--scale takes the smaller factor first"),
        (TransKD_GLMixer, {"embed": 2}, "stage 4"),
        (TransKD_EA, {"embed": 0}, "align one stage"),
        (student, {"visualize": True}, "^visdom is not installed; pip .*README.md"),
        (student, {"student_pretrained": True}, "-m models.zoo download mit_b0"),
        (teacher, {}, "-m models.zoo download mit_b2, .*--from-scratch"),
        (TransKDBase, {"teacher_weights": None}, "download segformerb2_teacher_cityscapes"),
    ],
)
def test_mistakes(script: Any, more: Any, says: str, small: Small, monkeypatch: Any) -> None:
    """They are found before anything long is begun: no image has been read."""
    monkeypatch.setattr("train.networks.ROOT", small.folder)
    monkeypatch.setattr("train.networks.OUTPUTS", small.folder)
    monkeypatch.setattr(SceneDataset, "read", None)
    monkeypatch.setitem(sys.modules, "visdom", None)
    monkeypatch.setattr("datasets.cache.default_cache_dir", lambda: small.folder / "cache")
    small.refused(says, script, **more)


def test_where_a_teacher_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What teacher.py wrote goes before the published file."""
    monkeypatch.setattr("train.networks.OUTPUTS", tmp_path)
    own = tmp_path / "teacher_ACDC" / "teacher_best.safetensors"
    own.parent.mkdir()
    for path in (tmp_path / "segformerb2_teacher_acdc.pth", own):
        path.touch()
        assert teacher_path(DistillationOptions(), "ACDC") == path


@pytest.mark.parametrize("kind", ["encoder", "whole"])
def test_what_a_student_starts_from(kind: str, small: Small) -> None:
    """Its weights are those of the file, and it expects the input that it was trained with."""
    torch.manual_seed(5)
    state = create_model("segformer_b0").state_dict()
    encoder = {key: value for key, value in state.items() if not key.startswith("linear_")}
    file = small.folder / "start.pth"
    torch.save(encoder if kind == "encoder" else state, file)
    small.train(student, max_steps=1, lr=1e-12, normalisation="auto", student_weights=file)
    checkpoint = read_checkpoint(small.folder / "student.safetensors")
    assert all(torch.allclose(checkpoint.state[key], encoder[key], atol=1e-9) for key in encoder)
    assert checkpoint.normalisation == (IMAGENET if kind == "encoder" else None)
    facts = {"method": "student", "dataset": "cityscapes", "height": 64, "step": 1}
    assert read_checkpoint(small.folder / "last.pt").facts == facts
    facts["mean_iou"] = small.records("val")[0]["mean_iou"]
    assert checkpoint.facts == facts


def test_16_bits_change_the_loss_a_little(small: Small) -> None:
    ce = {}
    for precision in ("fp32", "bf16", "fp16"):
        more = {"max_steps": 1, "drop_path_rate": 0, "dropout": 0, "precision": precision}
        small.train(student, precision, **more)
        ce[precision] = small.losses(precision)[0]["ce"]
    for precision in ("bf16", "fp16"):
        assert ce["fp32"] != ce[precision] == pytest.approx(ce["fp32"], rel=2e-2)


def test_a_machine_without_git_and_compiler(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Distiller, "compile", lambda _, **how: asked.append(how))
    small.train(student, "compiled", max_steps=1, compile=True, compile_mode="reduce-overhead")
    assert asked == [{"dynamic": False, "mode": "reduce-overhead"}]
    monkeypatch.setenv("PATH", "")
    small.train(student, "git", max_steps=1)
    assert small.records("start", "git")[0]["revision"] is None
    small.refused(r"^--compile needs a C\+\+ compiler", student, "compiler", compile=True)


def test_what_is_logged_is_what_the_saved_network_scores(small: Small) -> None:
    """mIoU and loss of the validation images, mIoU of the training images; numbered weights."""
    small.train(student, num_epochs=4, iou_train=True, epochs_save=2, validate_every=3)
    numbered = sorted(path.name for path in small.folder.glob("student_epoch*"))
    assert numbered == ["student_epoch0002.safetensors", "student_epoch0004.safetensors"]
    small.require_equal(numbered[1], "student.safetensors")
    validated = small.records("val")
    assert [record["epoch"] for record in validated] == [2, 3, 4]
    rates = [step["lr"] / 6e-5 for step in small.records("train")]
    assert rates == pytest.approx([1 - (1 + i // 5) / 1500 for i in range(20)], rel=1e-9)
    for name, logged in zip(numbered, validated[::2], strict=True):
        network = load_model(small.folder / name)
        for subset, key in (("train", "train_iou"), ("val", "mean_iou")):
            split = open_split("cityscapes", small.datadir, subset, height=64)
            found = evaluate(network, split, progress=False).as_json()
            assert logged[key] == pytest.approx(found["mean_iou"], abs=1e-6)
    items = [split[index] for index in range(len(split))]
    with torch.no_grad():
        logits = network(to_float(torch.stack([item.image for item in items]))).logits
    labels = torch.stack([item.label for item in items]).long()
    loss = F.cross_entropy(logits, labels, torch.tensor(split.classes.weights))
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_best_stays_the_best(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worse validation afterwards, and one after `--resume`, leave it alone."""
    scores = iter([0.5, 0.3, 0.4])
    found = SimpleNamespace(as_json=lambda: {"mean_iou": next(scores)})
    monkeypatch.setattr("train.engine.evaluate", lambda *_, **__: found)
    for epochs in (2, 3):
        small.train(student, num_epochs=epochs, batch_size=10, resume="auto")
    facts = read_checkpoint(small.folder / "student_best.safetensors").facts
    assert (facts["step"], facts["mean_iou"]) == (1, 0.5)
    assert read_checkpoint(small.folder / "student.safetensors").facts["step"] == 3


def test_it_is_saved_every_so_many_minutes(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0, 25)  # a step looks once, and so does a save
    saved: list[int] = []
    monkeypatch.setattr("train.engine.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("train.engine.save", lambda *given, **_: saved.append(given[-1].step))
    small.train(student, max_steps=8, num_epochs=2, save_every=1.0, validate_every=9)
    assert saved == [3, 6, 8]  # after 75 seconds, and at the end


def test_flags_of_the_data(small: Small) -> None:
    """Training images alone are augmented; the published weights are in the loss above."""
    augment = Augmentation(flip=False, shift=1, crop=(66, 70), seed=3)
    flags = {"flip": False, "shift": 1, "crop": [66, 70], "seed": 3}
    for kind in ("none", "dataset"):
        more = flags | {"class_weights": kind}
        run = start(runs.options_of(student, small.datadir, small.folder / kind, **more))
        assert (run.train_set.augment, run.val_set.augment) == (augment, None)
        item = run.train_set[1, 0]  # cut at full size, and the label then reduced to a quarter
        assert (item.image.shape[1:], item.label.shape) == ((66, 70), (17, 18))
        counted = run.train_set.count_class_weights()
        assert run.class_weights() == (None if kind == "none" else counted)


def test_what_decides_a_run_is_compared(tmp_path: Path) -> None:
    """Options, both splits, and the teacher, whatever its file is called."""
    small = Small(tmp_path / "data", tmp_path / "run")
    options = small.folder / "options.json"
    write_dataset(small.datadir, dataset="cityscapes", train=2, val=1, height=64, width=128)
    small.train(TransKDBase, max_steps=1)
    before = options.read_text()

    def refused(says: str, **more: Any) -> None:
        small.refused(says, TransKDBase, max_steps=1, resume=True, **more)
        assert options.read_text() == before

    refused("its result: lr 0.0001 instead of 6e-05; .*--override to insist", lr=1e-4)
    refused("result: teacher ", teacher_weights=small.folder / "student.safetensors")
    for split, fact in (("val", "val_data"), ("train", "data")):
        image = next((small.datadir / "leftImg8bit" / split).rglob("*.png"))
        kept = image.read_bytes()
        Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image, optimize=True)
        refused(f"result: {fact} ")
        image.write_bytes(kept)
    refused("is of another method", override=True, decay="matrices")
    more = {"override": True, "lr": 1e-4, "weight_decay": 0.5, "max_steps": 2}
    small.train(TransKDBase, resume=True, **more)
    assert small.records("train")[-1]["lr"] == pytest.approx(1e-4, rel=0.01)
    (group,) = torch.load(small.folder / "last.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5  # the option in force, not the checkpoint's
