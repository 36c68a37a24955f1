"""What a GPU computes: the published numbers, the same by every way of computing them.

    python -m pytest -m gpu -n 0 tests/test_gpu.py         on the first GPU; skipped without one
    TRANSKD_TEST_DEVICE=cpu python -m pytest -m gpu …      the same on the CPU, as a rehearsal

Bounds in 16 bits and in TF32 are relative to the largest value of a tensor, or to a loss.
"""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets import CITYSCAPES
from datasets.loading import Batch
from eval.metrics import confusion_matrix
from tests.conftest import ROOT, Command, free_port
from tests.golden_data import (
    arrays,
    build,
    golden_input,
    golden_labels,
    load,
    seeded,
    without_chance,
)
from train.engine import loss_scales

DEVICE = os.environ.get("TRANSKD_TEST_DEVICE", "cuda")
CUDA = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no GPU here"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="of CUDA alone")
SEGFORMERS = ["transkd_base_b0", "transkd_gl_b0", "transkd_ea_b0"]
OTHERS = ["transkd_base_pvt_v2_b0", "transkd_base_lvt", "mit_b0"]
KINDS = ["fp32", pytest.param("tf32", marks=needs_cuda), "bf16"]
BOUNDS = {"fp32": (1e-4, 1e-4, 5e-3), "tf32": (1e-2, 5e-3, 5e-2), "bf16": (1e-1, 3e-2, 2e-1)}
"""Of logits, losses, gradients."""


def matmuls(kind: str) -> torch.autocast:
    """float32 products as such, in TF32, or in 16 bits by autocast."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return torch.autocast(DEVICE.split(":")[0], torch.bfloat16, enabled=kind == "bf16")


class Step:
    """A golden method's losses on its golden batch, on the device and without randomness."""

    def __init__(self, name: str) -> None:
        self.distiller, self.teacher = build(name)
        without_chance(self.distiller.to(DEVICE).train())
        if self.teacher is not None:
            self.teacher.to(DEVICE)
        self.images, self.labels = golden_input("A").to(DEVICE), golden_labels().to(DEVICE)

    def __call__(self, kind: str = "fp32") -> dict[str, Tensor]:
        """As training computes them, and their total."""
        taught = None
        torch.compiler.cudagraph_mark_step_begin()  # as training does with CUDA graphs
        with matmuls(kind):
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(self.images, logits=False)
            losses = self.distiller(self.images, self.labels, taught)
        return losses | {"total": torch.stack(list(losses.values())).sum()}


@pytest.mark.parametrize("name", ["mit_b0", "mit_b2", "pvt_v2_b0", "lvt"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs(name: str, kind: str) -> None:
    """The published logits, relative to the largest."""
    model = seeded(name).student.eval().to(DEVICE)
    with torch.no_grad(), matmuls(kind):
        logits = model(golden_input("A").to(DEVICE)).logits.float().cpu().numpy()
    golden, bound = arrays(), BOUNDS[kind][0]
    _, _, _, *limits = golden[f"{name}/eval/A/logits#stats"]
    found = [logits.min(), logits.max()]
    np.testing.assert_allclose(found, limits, rtol=0, atol=bound * np.abs(limits).max())
    if (whole := golden.get(f"{name}/eval/A/logits")) is not None:
        np.testing.assert_allclose(logits, whole, rtol=0, atol=bound * np.abs(whole).max())


@pytest.mark.parametrize("name", SEGFORMERS + OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(name: str, kind: str) -> None:
    """The published losses, and the norm of all gradients together.

    A batch of two leaves two values a channel to the BatchNorm in CSF's squeeze. With SegFormer
    some are so close that features which differ by 0.0005 halve the gradients, so that only
    float32 meets them.
    """
    golden = load("train_golden.json")[name]
    _, of_losses, of_gradients = BOUNDS[kind]
    step = Step(name)
    total = step(kind)["total"]
    total.backward()
    assert total.item() == pytest.approx(golden["losses"]["total"], rel=of_losses)
    if kind == "fp32" or name in OTHERS:
        gradients = [p.grad.float() for p in step.distiller.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        expected = math.hypot(*(value or 0.0 for value in golden["grad_l2"].values()))
        assert norm == pytest.approx(expected, rel=of_gradients)


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_cuda)])
def test_compiled_steps_are_plain_ones(mode: str) -> None:
    """Also as CUDA graphs: the losses of three steps of the optimizer."""
    totals: dict[bool, list[float]] = {False: [], True: []}
    for compiled, found in totals.items():
        torch.compiler.reset()
        step = Step("transkd_ea_b0")
        if compiled:
            how = {"mode": mode} if CUDA else {"backend": "aot_eager"}
            step.distiller.compile(dynamic=False, **how)
            step.teacher.compile(dynamic=False, **how)
        optimizer = torch.optim.SGD(step.distiller.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            total = step()["total"]
            total.backward()
            optimizer.step()
            found.append(total.item())
    assert totals[True] == pytest.approx(totals[False], rel=1e-4)


def test_confusion_matrix_is_the_cpu_s() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 64, 128, generator=generator)
    labels = torch.randint(0, 20, (2, 64, 128), generator=generator, dtype=torch.uint8)
    counts = []
    for device in ("cpu", DEVICE):
        counts.append(confusion_matrix(logits.to(device), labels.to(device), 20).cpu())
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
            step("bf16")["total"].backward()
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
        step.distiller.eval()
        parts = zip(images.split(sizes), labels.split(sizes), strict=True)
        group = [Batch(*part, torch.arange(len(part[0]))) for part in parts]
        weights = torch.tensor(CITYSCAPES.weights)
        scales = loss_scales(group, weights, torch.device(DEVICE))
        for batch, (ce_scale, _) in zip(group, scales, strict=True):
            step.images, step.labels = batch.images.to(DEVICE), batch.labels.to(DEVICE)
            (step()["ce"] * ce_scale / len(group)).backward()
        gradients.append(step.distiller.student.head.classifier.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def training(scenes: Path, folder: Path, *flags: object) -> list[str]:
    """A short training on the device: the script and its flags."""
    common = ["--datadir", scenes, "--height", 64, "--batch-size", 4, "--num-workers", 0]
    words = ["train/student.py", *common, "--device", DEVICE, "--output-dir", folder, *flags]
    return [str(word) for word in words]


def test_a_killed_run_ends_with_the_bits_of_one_left_alone(
    scenes: Path, tmp_path: Path, command: Command
) -> None:
    flags = ("--max-steps", 12, "--num-epochs", 50, "--deterministic", "--save-every", 0)
    assert command(*training(scenes, tmp_path / "whole", *flags)).returncode == 0
    again = training(scenes, tmp_path / "killed", *flags, "--resume", "auto")
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as `command`
    process = subprocess.Popen([sys.executable, *again], cwd=ROOT, env=env)
    last = tmp_path / "killed" / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert command(*again).returncode == 0
    paths = [tmp_path / name / "student.safetensors" for name in ("whole", "killed")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_give_no_nan(
    precision: str, scenes: Path, tmp_path: Path, command: Command
) -> None:
    """A loss or weight that is not finite ends a run."""
    steps = 200 if CUDA else 4
    length = ("--max-steps", steps, "--num-epochs", 500, "--validate-every", 100)
    flags = ("--precision", precision, "--lr", 1e-3, *length)
    done = command(*training(scenes, tmp_path, *flags))
    assert done.returncode == 0, done.stderr


def test_one_process_under_torchrun(scenes: Path, tmp_path: Path, command: Command) -> None:
    """DistributedDataParallel by NCCL, with BatchNorm over all processes."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 1, "--master-port", free_port())
    flags = ["--max-steps", 3, "--precision", "bf16", *(["--sync-batchnorm"] if CUDA else [])]
    done = command(*launcher, *training(scenes, tmp_path, *flags))
    assert done.returncode == 0, done.stderr


@needs_cuda
def test_too_little_memory_ends_in_one_line(scenes: Path, tmp_path: Path, command: Command) -> None:
    start = "import runpy, sys, torch; whole = torch.cuda.get_device_properties(0).total_memory\n"
    start += "torch.cuda.set_per_process_memory_fraction(3e7 / whole)  # twice the weights\n"
    start += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = command("-c", start, *training(scenes, tmp_path, "--max-steps", 1))
    assert done.returncode == 2 and "out of memory; lower --batch-size" in done.stderr
