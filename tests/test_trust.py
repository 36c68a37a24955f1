"""Nothing is lost and nothing is silent: kills, signals, full disks, damaged files, NaN, two runs
in one folder, mistakes that hide in the data."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from errors import UserError
from models import create_model
from models.distillation import Distiller
from tests import runs
from tests.conftest import ROOT, Command, write_dataset
from tests.runs import Small
from tests.trees import limited
from train import engine, student
from train.checkpoint import load_checkpoint
from train.setup import start

# Pays for the imports once: each attempt is a fork that is killed, until one comes to its end. Two
# in three are killed in the midst of training or saving, the others while they start. Every fifth
# leaves its loading worker behind.
KILLER = """
import os, random, shutil, signal, sys, time
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, {root!r})
import cli
import torch._dynamo  # else every optimizer loads it, which takes a second
from train import student
folder, kills, *arguments = sys.argv[1:]
metrics = Path(folder, "metrics.jsonl")
moments, killed, left_behind = random.Random(7), 0, []
sys.argv = ["student.py", *arguments, "--output-dir", folder, "--resume", "auto"]
while True:
    written = metrics.stat().st_mtime_ns if metrics.exists() else 0
    child = os.fork()
    if child == 0:
        os.setsid()
        cli.run(student.main, student.Options)
        os._exit(0)
    begun = killed % 3 == 0
    left, done, status = moments.uniform(0, 0.4), 0, 0
    while not done and (left > 0 or killed >= int(kills)):
        time.sleep(0.01)
        begun = begun or metrics.exists() and metrics.stat().st_mtime_ns != written
        left -= 0.01 * begun
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        killed += 1
        (os.killpg if killed % 5 else os.kill)(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left_behind.append(child)
    elif status or killed >= int(kills):
        for group in left_behind:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        sys.exit(status and 1)
    else:
        shutil.rmtree(folder)  # it got through: once more
"""


@pytest.mark.slow
def test_twenty_kills_change_nothing(command: Command, small: Small) -> None:
    """Killed at random, with a worker, saving after every step: the bits of a run left alone."""
    more = {"max_steps": 7, "save_every": 0, "num_workers": 1}
    small.train(student, "whole", **more)
    flags = [small.folder / "killed", 20, *runs.flags_of(student, small.datadir, None, **more)]
    cache = str(small.folder / "cache")  # built anew, under fire
    done = command("-c", KILLER.format(root=str(ROOT)), *flags, TRANSKD_CACHE=cache)
    assert done.returncode == 0, done.stderr
    for name in ("student.safetensors", "student_best.safetensors"):
        small.require_equal(f"whole/{name}", f"killed/{name}")
    assert small.losses("whole") == small.losses("killed") and len(small.losses("killed")) == 7


def test_signals_that_save() -> None:
    """Ctrl-C, a terminal that closes, and what schedulers of clusters send; a second one acts."""
    with runs.as_a_process():
        received = engine.remember_signals()
        for number in runs.SIGNALS:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL
        assert received == runs.SIGNALS


@pytest.mark.parametrize(
    ("says", "more"),
    [
        (r"the loss ce is NaN or infinite at step 2 \(images leftImg8bit/train/.*--lr", {}),
        # An epoch's last step: its weights are finite, and no loss shows what they give.
        ("outputs are NaN or infinite", {"batch_size": 10}),
    ],
)
def test_losses_and_outputs_that_are_no_numbers(says: str, more: Any, small: Small) -> None:
    small.refused(says, student, num_epochs=2, steps_loss=3, lr=1e20, **more)
    assert not [*small.folder.glob("*.safetensors"), *small.folder.glob("*.pt")]


def test_weights_that_are_not_numbers_are_not_saved(scenes: Path, tmp_path: Path) -> None:
    """A gradient that overflows behind a finite loss, in the step before a save."""
    run = start(runs.options_of(student, scenes, tmp_path, max_steps=5, save_every=0))
    network = create_model("segformer_b0")
    steps: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return gradient * (torch.nan if len(steps) == 3 else 1)

    network.head.classifier.weight.register_hook(spoil)
    says = r"step 3 made weights NaN.*the last good state is kept"
    with runs.as_a_process(), pytest.raises(UserError, match=says):
        engine.train(Distiller(network), run)
    assert load_checkpoint(tmp_path)["state"]["step"] == 2


def test_full_disk(small: Small) -> None:
    """A limit on file sizes stands in for it: the write fails half-way."""
    small.train(student, max_steps=2)
    before = (small.folder / "last.pt").read_bytes()
    with limited(resource.RLIMIT_FSIZE, len(before) // 2):
        says = r"can't write .*\.pt \(File too large\); nothing"
        small.refused(says, student, max_steps=4, resume=True)
    assert (small.folder / "last.pt").read_bytes() == before
    small.train(student, max_steps=4, resume=True)
    assert not [path for path in small.folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """The one before it is taken, with a warning, and the result is the same."""
    for name in ("whole", "damaged"):
        small.train(student, name, max_steps=4, save_every=0)
        last = small.folder / name / "last.pt"
        if name == "damaged":
            last.write_bytes(last.read_bytes()[:-1000])
        assert "is damaged" not in caplog.text
        small.train(student, name, max_steps=6, resume=True)
    assert "last.pt is damaged" in caplog.text and "previous.pt, step 3" in caplog.text
    small.require_equal("whole/student.safetensors", "damaged/student.safetensors")
    assert small.steps("damaged") == [1, 2, 3, 4, 5, 6]  # the fourth once


@pytest.mark.parametrize("other", [b"", [1], {"a": torch.zeros(1)}], ids=["empty", "list", "dict"])
def test_what_is_no_checkpoint(
    other: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a power cut may leave it, or a released file that was copied over it."""
    last = tmp_path / "last.pt"
    torch.save(other, last) if other else last.touch()
    with pytest.raises(UserError, match=r"no whole checkpoint in .* \(.+\); leave --resume out"):
        load_checkpoint(tmp_path)
    content = {"model": {}, "optimizer": {}, "state": {"step": 3}, "random": [[None]]}
    torch.save(content, tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path) == content
    assert caplog.text.count("last.pt is damaged (") == 2


def test_folders_that_cannot_be_used(small: Small) -> None:
    with FileLock(small.folder / "lock"):
        small.refused("another run writes into", student)
    (small.folder / "file").touch()
    small.refused(r"can't make the folder .*file/run \(Not a directory\)", student, "file/run")


Spoil = Callable[[Path, Path], object]  # an image and its label
SPOILT: list[tuple[Spoil, bool, str]] = [
    # LayerNorm multiplies the gradients of a single colour by 1/sqrt(eps) in every block.
    (lambda image, _: Image.new("RGB", (128, 64)).save(image), True,
     "step 1 made weights NaN or infinite.*images of a single colour"),
    (lambda image, _: image.write_bytes(image.read_bytes()[:400]), False, r"leftImg8bit\.png"),
    (lambda _, label: Image.new("L", (32, 16)).save(label), True,
     r"64×128 pixels .*, but its label .* is 16×32"),
    (lambda _, label: Image.new("L", (128, 64), 77).save(label), False,
     r"labelTrainIds\.png .* 77"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "cache", "says"), SPOILT)
def test_mistakes_that_hide_in_the_data(
    spoil: Spoil, cache: bool, says: str, tmp_path: Path
) -> None:
    small = Small(tmp_path / "data", tmp_path / "run")
    write_dataset(small.datadir, dataset="cityscapes", train=2, val=1, height=64, width=128)
    images = sorted((small.datadir / "leftImg8bit" / "train").rglob("*.png"))
    labels = sorted((small.datadir / "gtFine" / "train").rglob("*.png"))
    for image, label in zip(images, labels, strict=True):
        spoil(image, label)
    small.refused(says, student, max_steps=1, cache=cache, num_workers=1)


def test_data_that_goes_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is still there."""
    small = Small(tmp_path / "data", tmp_path / "run")
    write_dataset(small.datadir, dataset="cityscapes", train=6, val=2, height=64, width=128)
    validate = engine.validate

    def remove_then_validate(*arguments: Any) -> float:
        for image in (small.datadir / "leftImg8bit" / "train").rglob("*.png"):
            image.unlink()
        return validate(*arguments)

    monkeypatch.setattr(engine, "validate", remove_then_validate)
    small.refused("No such file", student, max_steps=12, cache=False)
    assert load_checkpoint(small.folder)["state"]["step"] == 3
