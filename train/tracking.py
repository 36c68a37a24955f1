"""What a run tells the world: a progress line, metrics.jsonl, TensorBoard, visdom."""

import json
import math
import sys
import time
from io import FileIO
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn

from datasets import SceneDataset
from datasets.transforms import to_float
from errors import UserError
from eval.records import read_records
from eval.rendering import colorize
from files import atomic_write
from train.dashboard import Dashboard, tensorboard_writer
from train.distributed import Ranks
from train.options import TrainingOptions

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


class NotFiniteError(Exception):
    """A loss is NaN or infinite.

    Attributes:
        term, value, step: which, and when.
        indices: the images of that batch.
    """

    def __init__(self, term: str, value: float, step: int, indices: list[int]) -> None:
        super().__init__(term)
        self.term, self.value, self.step, self.indices = term, value, step, indices


class Tracker:
    """Keeps losses on the device and fetches them only when they are logged. Rank 0 alone writes and speaks.

    Args:
        total_steps: steps of the whole run.
        start_step: steps already done; what a killed run logged after that is dropped.
    """

    LINE_SECONDS = 10.0  # without a terminal, a line at most this often

    def __init__(
        self,
        options: TrainingOptions,
        ranks: Ranks,
        total_steps: int,
        start_step: int,
        device: torch.device,
    ) -> None:
        self.ranks, self.device = ranks, device
        self.total_steps, self.step, self.log_every = total_steps, start_step, options.steps_loss
        self.names: list[str] = []
        self.pending: list[
            tuple[int, Tensor, Tensor]
        ] = []  # step, losses on the device, image indices
        self.images = self.steps_here = 0
        self.clock = self.started = time.perf_counter()
        self.training = 0.0  # seconds, without validation
        self.last_line = 0.0
        self.file: FileIO | None = None
        self.writer: Any = None
        self.dashboard: Dashboard | None = None
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(20), console=CONSOLE, transient=True
        )
        self.task: TaskID | None = None
        if ranks.first:
            path = options.run_dir / "metrics.jsonl"
            kept = (
                [record for record in read_records(path) if record["step"] <= start_step]
                if path.exists()
                else []
            )
            with atomic_write(path) as aside:
                aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            self.file = path.open("ab", buffering=0)
            if options.visualize:
                self.dashboard = Dashboard(options.run_dir.name, options.port)
            if options.tensorboard:
                self.writer = tensorboard_writer(options.run_dir / "tensorboard", start_step + 1)

    def __enter__(self) -> "Tracker":
        if self.ranks.first and CONSOLE.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total_steps, completed=self.step)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()

    def add(self, losses: dict[str, Tensor], indices: Tensor) -> None:
        """Remember the losses of one batch."""
        self.names = list(losses)
        self.pending.append(
            (self.step + 1, torch.stack([loss.detach() for loss in losses.values()]), indices)
        )

    def stepped(self, epoch: int, lr: float) -> None:
        """Count a step; the first one and every `--steps-loss`-th are logged."""
        self.step += 1
        self.steps_here += 1
        if self.step % self.log_every == 0 or self.steps_here == 1:
            self.flush(epoch, lr)

    def flush(self, epoch: int, lr: float) -> None:
        """Log the mean losses since the last record.

        Raises:
            NotFiniteError: one of them is not a number, on any rank.
        """
        if not self.pending:
            return
        values = torch.stack([losses for _, losses, _ in self.pending])  # (batches, terms)
        if self.ranks.any(
            not math.isfinite(values.sum().item())
        ):  # the one moment at which the host waits
            self._find_not_finite()
        means = dict(
            zip(self.names, self.ranks.mean(values.double().mean(0)).tolist(), strict=True)
        )
        means["total"] = sum(means.values())
        now = time.perf_counter()
        images = self.ranks.world_size * sum(len(indices) for _, _, indices in self.pending)
        self.images += images
        self.training += now - self.clock
        self.record(
            "train",
            epoch,
            lr=lr,
            losses=means,
            images_per_second=round(images / (now - self.clock), 3),
        )
        if self.writer is not None:
            for name, value in means.items():
                self.writer.add_scalar(f"loss/{name}", value, self.step)
            self.writer.add_scalar("lr", lr, self.step)
        if self.dashboard is not None:
            for name, value in means.items():
                self.dashboard.curve("losses", name, self.step, value)
        self._show(epoch, lr, means, now)
        self.pending, self.clock = [], now

    def _find_not_finite(self) -> None:
        found = [
            (step, name, value, indices.tolist())
            for step, losses, indices in self.pending
            for name, value in zip(self.names, losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        first = min(f[0] for f in self.ranks.gather(found) if f)
        step, name, value, indices = first
        raise NotFiniteError(name, value, step, indices)

    def validated(self, epoch: int, scores: dict[str, Any], event: str = "val") -> None:
        """Log an evaluation's scores."""
        self.record(event, epoch, **scores)
        if self.writer is not None and event == "val" and scores["mean_iou"] is not None:
            self.writer.add_scalar("mIoU/val", scores["mean_iou"], self.step)
        if self.dashboard is not None and scores["mean_iou"] is not None:
            self.dashboard.curve("mIoU", event, self.step, scores["mean_iou"])
        self.clock = time.perf_counter()  # the rate is that of training alone

    def pictures(self, model: nn.Module, dataset: SceneDataset) -> None:
        """Show the first validation image, its prediction and its target."""
        if self.writer is None and self.dashboard is None:
            return
        item = dataset[0]
        with torch.inference_mode():
            logits = model.eval()(to_float(item.image[None].to(self.device))).logits[0]
        for window, picture in {
            "input": item.image.permute(1, 2, 0).numpy(),
            "prediction": np.asarray(colorize(logits.argmax(0).cpu().numpy(), dataset.classes)),
            "target": np.asarray(colorize(item.label.numpy(), dataset.classes)),
        }.items():
            if self.writer is not None:
                self.writer.add_image(window, picture, self.step, dataformats="HWC")
            if self.dashboard is not None:
                self.dashboard.picture(window, picture)

    def record(self, event: str, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl. Raises UserError if it can't be written."""
        if self.file is None:
            return
        line = json.dumps({"event": event, "epoch": epoch, "step": self.step} | values) + "\n"
        try:
            self.file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"can't write {self.file.name} ({error.strerror}); make room and go on by --resume"
            ) from error

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.ranks.first:
            CONSOLE.print(text, markup=False)

    def _show(self, epoch: int, lr: float, means: dict[str, float], now: float) -> None:
        rate = self.images / self.training
        left = (now - self.started) / self.steps_here * (self.total_steps - self.step)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        text = (
            f"epoch {epoch}  step {self.step}/{self.total_steps}  {terms}  lr {lr:.2e}  "
            f"{rate:.1f} images/s  {_duration(left)} left"
        )
        if self.task is not None:
            self.bar.update(self.task, description=text, completed=self.step)
        elif self.ranks.first and now - self.last_line > self.LINE_SECONDS:
            self.last_line = now
            print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
