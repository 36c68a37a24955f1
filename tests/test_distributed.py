"""Two processes compute what one computes with the same global batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from datasets import open_split
from datasets.classes import CITYSCAPES
from datasets.loading import Batch
from eval.inference import evaluate
from models import load_model
from models.distillation.losses import cross_entropy
from tests import runs
from tests.conftest import Command, free_port
from tests.runs import Small
from train import TransKDBase, student
from train.engine import loss_scales

SCRIPT = """
import os, signal, sys
import cli
from train import TransKDBase, student
from train.logger import Logger

rank = int(os.environ["RANK"])
separator = sys.argv.index("--")
flags = {student: sys.argv[1:separator], TransKDBase: sys.argv[separator + 1 :]}
folder = os.environ["FOLDER"] + ("_of_1" if rank else "")  # as on two nodes


def run(script, name, *more, code=0):
    sys.argv = [script.__name__, *flags[script], "--output-dir", f"{folder}/{name}", *more]
    try:
        cli.run(script.main, script.Options)
    except SystemExit as end:
        assert end.code == code, end
    else:
        assert code == 0


def and_signal(self, step, *rest):
    stepped(self, step, *rest)
    if rank == 1 and step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


run(TransKDBase, "two")
run(student, "whole")
stepped, Logger.stepped = Logger.stepped, and_signal
run(student, "parts", code=143)  # in process 0 too, which got no signal
Logger.stepped = stepped
run(student, "parts", "--resume", "auto")
# No thread of the group outlives it: one may abort the interpreter's end.
tasks = "/proc/self/task"
if os.path.isdir(tasks):
    names = [open(f"{tasks}/{number}/comm").read() for number in os.listdir(tasks)]
    assert not [name for name in names if "gloo" in name], names
# What one of them ends the other does not wait for.
run(student, "no", *(["--subset-every", "2"] if rank == 1 else []), code=2)
run(student, "no", *(["--student-weights", "none"] if rank == 1 else []), code=2)
"""


@pytest.mark.slow
def test_two_processes(command: Command, small: Small) -> None:
    """The same losses as in one, an exact resume in mid-epoch, and mistakes of one end both.

    Process 1 has a disk of its own, on which nothing is written. Without dropout, whose draws each
    process makes for itself; BatchNorm sees the same images at a time in both. Of seven images the
    second batch of four lacks one, so that one process has one image and the other two.
    """
    names = sorted(p.name for p in (small.datadir / "leftImg8bit" / "train").rglob("*.png"))
    listed = small.folder / "seven.txt"
    listed.write_text("\n".join(names[:7]))
    equal = {"train_list": listed, "batch_size": 4, "max_steps": 3, "validate_every": 5}
    equal |= {"drop_path_rate": 0, "dropout": 0, "lr": 1e-4}
    resumed = {"batch_size": 4, "validate_every": 2, "max_steps": 6}
    flags = runs.flags_of(student, small.datadir, None, **resumed)
    flags += ["--", *runs.flags_of(TransKDBase, small.datadir, None, **equal)]
    folder = small.folder / "runs"
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port()), "FOLDER": str(folder)}
    with ThreadPoolExecutor() as threads:
        both = threads.map(lambda rank: command("-c", SCRIPT, *flags, RANK=rank, **group), "01")
        small.train(TransKDBase, "one", accumulate=2, **equal)
    for process in both:
        assert process.returncode == 0 and "Traceback" not in process.stderr, process
        errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        assert "process 1 has another subset_every, data than process 0" in errors[0]
        assert "no weights at none" in errors[1] and len(errors) == 2
    assert not Path(f"{folder}_of_1").exists()
    small.require_equal("runs/whole/student.safetensors", "runs/parts/student.safetensors")
    assert small.steps("runs/parts") == [1, 2, 3, 4, 5, 6]

    losses = zip(small.losses("one"), small.losses("runs/two"), strict=True)
    for step, (alone, shared) in enumerate(losses):
        assert alone == pytest.approx(shared, rel=1e-3 if step else 1e-5)
    # What is logged is what the saved network scores.
    network = load_model(folder / "two" / "student.safetensors")
    split = open_split("cityscapes", small.datadir, "val", height=64)
    weights = torch.tensor(CITYSCAPES.weights)
    scores = evaluate(network, split, progress=False, class_weights=weights).as_json()
    (logged,) = small.records("val", "runs/two")
    for key in ("mean_iou", "loss", "images"):
        assert scores[key] == pytest.approx(logged[key], rel=1e-5), key


def test_parts_count_as_the_whole_batch() -> None:
    """Parts of unequal size and weight: their losses' mean is what the whole batch gives."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 20, 4, 8), torch.randint(0, 20, (3, 4, 8), dtype=torch.uint8)
    labels[2, :3] = 19  # mostly ignored
    weights = torch.tensor(CITYSCAPES.weights)
    parts = list(zip(logits.split(2), labels.split(2), strict=True))
    batches = [Batch(x, y, torch.arange(len(x))) for x, y in parts]
    ce = torch.stack([cross_entropy(x, y, weights) for x, y in parts])
    mse = torch.stack([x.square().mean() for x, _ in parts])
    scales = loss_scales(batches, weights, torch.device("cpu"))
    found = torch.stack([ce, mse], dim=1).mul(scales).mean(0)
    whole = torch.stack([cross_entropy(logits, labels, weights), logits.square().mean()])
    torch.testing.assert_close(found, whole)
    assert (ce.mean() - whole[0]).abs() > 1e-2  # what a plain average would be off by
