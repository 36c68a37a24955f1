"""What a GPU computes: the published numbers, the same by every way of computing them.

    python -m pytest -m gpu -n 0 tests/test_gpu.py         on the first GPU; skipped without one
    TRANSKD_TEST_DEVICE=cpu python -m pytest -m gpu …      the same on the CPU, as a rehearsal

Bounds in 16 bits and in TF32 are relative to the largest value of a tensor, or to a loss.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from datasets import CITYSCAPES
from datasets.loading import Batch
from eval.metrics import ConfusionMatrix
from models.pyramid import DropPath
from tests.conftest import ROOT, free_port
from tests.golden_data import arrays, build, golden_input, golden_labels, load, seeded
from train.engine import loss_scales

DEVICE = os.environ.get("TRANSKD_TEST_DEVICE", "cuda")
CUDA = DEVICE.startswith("cuda")
CLASS_WEIGHTS = torch.tensor(CITYSCAPES.weights)
METHODS = (
    "transkd_base_b0",
    "transkd_gl_b0",
    "transkd_ea_b0",
    "transkd_base_pvt_v2_b0",
    "transkd_base_lvt",
    "mit_b0",
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no GPU here"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="of CUDA alone")


@contextmanager
def matmuls(kind: str) -> Iterator[None]:
    """float32 products as such, in TF32, or in 16 bits by autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        with torch.autocast(DEVICE.split(":")[0], torch.bfloat16, enabled=kind == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Step:
    """A golden method's losses on its golden batch, on the device and without randomness."""

    def __init__(self, name: str) -> None:
        self.distiller, self.teacher = build(name)
        for module in self.distiller.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout2d):
                module.p = 0.0
        self.distiller.to(DEVICE).train()
        if self.teacher is not None:
            self.teacher.to(DEVICE)
        self.images, self.labels = golden_input("A").to(DEVICE), golden_labels().to(DEVICE)

    def __call__(self, kind: str = "fp32") -> dict[str, Tensor]:
        """As training computes them."""
        taught = None
        with matmuls(kind):
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(self.images, logits=False)
            return self.distiller(self.images, self.labels, taught)


@pytest.mark.parametrize("name", ["mit_b0", "mit_b2", "pvt_v2_b0", "lvt"])
@pytest.mark.parametrize(
    ("kind", "bound"),
    [("fp32", 1e-4), pytest.param("tf32", 1e-2, marks=needs_cuda), ("bf16", 1e-1)],
)
def test_outputs(name: str, kind: str, bound: float) -> None:
    """The published logits, relative to the largest."""
    model = seeded(name).student.eval().to(DEVICE)
    with torch.no_grad(), matmuls(kind):
        logits = model(golden_input("A").to(DEVICE)).logits.float().cpu().numpy()
    golden = arrays()
    _, _, _, low, high = golden[f"{name}/eval/A/logits#stats"]
    np.testing.assert_allclose(
        [logits.min(), logits.max()], [low, high], rtol=0, atol=bound * max(abs(low), abs(high))
    )
    if (whole := golden.get(f"{name}/eval/A/logits")) is not None:
        np.testing.assert_allclose(logits, whole, rtol=0, atol=bound * np.abs(whole).max())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("kind", "of_losses", "of_gradients"),
    [
        ("fp32", 1e-4, 5e-3),
        pytest.param("tf32", 5e-3, 5e-2, marks=needs_cuda),
        ("bf16", 3e-2, 2e-1),
    ],
)
def test_losses_and_gradients(name: str, kind: str, of_losses: float, of_gradients: float) -> None:
    """The published losses, and the norm of all gradients together.

    A batch of two leaves two values a channel to the BatchNorm in CSF's squeeze. With SegFormer
    some are so close that features which differ by 0.0005 halve the gradients, so that only
    float32 meets them.
    """
    golden = load("train_golden.json")[name]
    step = Step(name)
    total = torch.stack(list(step(kind).values())).sum()
    total.backward()
    assert total.item() == pytest.approx(golden["losses"]["total"], rel=of_losses)
    if kind != "fp32" and name in METHODS[:3]:
        return
    gradients = [p.grad.float() for p in step.distiller.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    expected = math.hypot(*(value or 0.0 for value in golden["grad_l2"].values()))
    assert norm == pytest.approx(expected, rel=of_gradients)


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_cuda)])
def test_compiled_steps_are_plain_ones(mode: str) -> None:
    """Also as CUDA graphs: the losses of three steps of the optimizer."""
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        step = Step("transkd_ea_b0")
        if compiled:
            assert step.teacher is not None
            how = {"mode": mode} if CUDA else {"backend": "aot_eager"}
            for module in (step.distiller, step.teacher):
                module.compile(dynamic=False, **how)
        optimizer = torch.optim.SGD(step.distiller.parameters(), lr=1e-3)
        totals = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            total = torch.stack(list(step().values())).sum()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        found.append(totals)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_confusion_matrix_is_the_cpu_s() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 64, 128, generator=generator)
    labels = torch.randint(0, 20, (2, 64, 128), generator=generator, dtype=torch.uint8)
    counts = []
    for device in ("cpu", DEVICE):
        matrix = ConfusionMatrix(CITYSCAPES, device)
        matrix.update(logits.to(device), labels.to(device))
        counts.append(matrix.counts.cpu())
    assert torch.equal(*counts)


@needs_cuda
def test_a_step_asks_the_device_for_nothing() -> None:
    """Else the host would wait for it at every step."""
    step = Step("transkd_gl_b0")
    optimizer = torch.optim.AdamW(step.distiller.parameters(), fused=True)
    for mode in ("default", "error"):  # the first step builds what the next ones use
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.stack(list(step("bf16").values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_accumulated_parts_are_one_batch() -> None:
    """Two unequal parts; BatchNorm, which sees other images at a time, is left in its eval mode."""
    images, labels = golden_input("A"), golden_labels().to(torch.uint8)
    images, labels = torch.cat([images, images.flip(-1)[:1]]), torch.cat([labels, labels[:1]])
    gradients = []
    for sizes in ([3], [2, 1]):
        step = Step("mit_b0")
        for module in step.distiller.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        parts = zip(images.split(sizes), labels.split(sizes), strict=True)
        group = [Batch(*part, torch.arange(len(part[0]))) for part in parts]
        scales = loss_scales(group, CLASS_WEIGHTS, torch.device(DEVICE))
        for batch, scale in zip(group, scales, strict=True):
            step.images, step.labels = batch.images.to(DEVICE), batch.labels.to(DEVICE)
            counts = 1 if scale is None else scale[0]
            (step()["ce"] * counts / len(group)).backward()
        gradients.append(step.distiller.student.head.classifier.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def training(scenes: Path, folder: Path, *flags: object) -> list[str]:
    """The command of a short training on the device."""
    common = ["--datadir", scenes, "--height", 64, "--batch-size", 4, "--num-workers", 0]
    words = ["train/student.py", *common, "--device", DEVICE, "--output-dir", folder, *flags]
    return [sys.executable, *map(str, words)]


def finish(command: list[str]) -> tuple[int, str]:
    """The exit code of a command that runs in the repository, and what it says on stderr."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_a_killed_run_ends_with_the_bits_of_one_left_alone(scenes: Path, tmp_path: Path) -> None:
    flags = ("--max-steps", 12, "--num-epochs", 50, "--deterministic", "--save-every", 0)
    assert finish(training(scenes, tmp_path / "whole", *flags))[0] == 0
    again = training(scenes, tmp_path / "killed", *flags, "--resume", "auto")
    process = subprocess.Popen(again, cwd=ROOT, stderr=subprocess.DEVNULL)
    last = tmp_path / "killed" / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finish(again)[0] == 0
    # Not the files' bytes: safetensors writes what it says beside the weights in any order.
    whole, killed = (load_file(tmp_path / n / "student.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole.keys() | killed.keys())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_give_no_nan(precision: str, scenes: Path, tmp_path: Path) -> None:
    """A loss or weight that is not finite ends a run."""
    steps = 200 if CUDA else 4
    flags = ("--precision", precision, "--max-steps", steps, "--num-epochs", 500, "--lr", 1e-3)
    assert finish(training(scenes, tmp_path, *flags)) == (0, ANY)


@needs_cuda
def test_one_process_under_torchrun(scenes: Path, tmp_path: Path) -> None:
    """By NCCL, with BatchNorm over all processes."""
    flags = ("--max-steps", 3, "--sync-batchnorm", "--precision", "bf16")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command = [
        *launcher,
        "--master-port",
        str(free_port()),
        *training(scenes, tmp_path, *flags)[1:],
    ]
    assert finish([sys.executable, *command]) == (0, ANY)


@needs_cuda
def test_too_little_memory_ends_in_one_line(scenes: Path, tmp_path: Path) -> None:
    words = training(scenes, tmp_path, "--max-steps", 1)[1:]
    start = "import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(1e-3)\n"
    start += f"sys.argv = {words!r}; sys.path.insert(0, '.')\n"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    code, errors = finish([sys.executable, "-c", start])
    assert code == 2 and "out of memory; lower --batch-size" in errors
