"""What a run tells the world: a progress line, metrics.jsonl, TensorBoard."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


class Tracker:
    """Collects the losses on the device and fetches them only when they are logged.

    Args:
        run_dir: metrics.jsonl and the TensorBoard files are written here.
        total_steps: steps of the whole run.
        start_step: steps already done; metrics logged after that, by a run that was killed, are dropped.
        log_every: steps between two records.
    """

    LINE_SECONDS = 10.0  # without a terminal, a line at most this often

    def __init__(self, run_dir: Path, total_steps: int, start_step: int, log_every: int, tensorboard: bool) -> None:
        self.total_steps, self.step, self.log_every = total_steps, start_step, log_every
        self.path = run_dir / "metrics.jsonl"
        self._drop_after(start_step)
        self.file = self.path.open("a", buffering=1)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.sums: dict[str, Tensor] = {}
        self.steps_summed = self.images = self.images_total = self.steps_here = 0
        self.clock = self.started = time.perf_counter()
        self.last_line = 0.0
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(20), console=CONSOLE, transient=True)
        self.task: TaskID | None = None

    def __enter__(self) -> "Tracker":
        if CONSOLE.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total_steps, completed=self.step)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def update(self, losses: dict[str, Tensor], epoch: int, lr: float, images: int) -> None:
        """Count one step; every `log_every` steps the mean losses since the last record are logged."""
        self.step += 1
        self.steps_here += 1
        self.steps_summed += 1
        self.images += images
        self.images_total += images
        for name, loss in losses.items():
            detached = loss.detach()
            self.sums[name] = self.sums[name] + detached if name in self.sums else detached
        if self.step % self.log_every == 0 or self.steps_here == 1:
            self.flush(epoch, lr)

    def flush(self, epoch: int, lr: float) -> None:
        """Log what was collected since the last record."""
        if not self.steps_summed:
            return
        values = (torch.stack(list(self.sums.values())) / self.steps_summed).tolist()
        now = time.perf_counter()
        means = dict(zip(self.sums, values, strict=True))
        means["total"] = sum(values)
        rate = self.images / (now - self.clock)
        self.record("train", epoch, lr=lr, losses=means, images_per_second=round(rate, 3))
        if self.writer is not None:
            for name, value in means.items():
                self.writer.add_scalar(f"loss/{name}", value, self.step)
            self.writer.add_scalar("lr", lr, self.step)
        self._show(epoch, lr, means, now)
        self.sums, self.steps_summed, self.images, self.clock = {}, 0, 0, now

    def validated(self, epoch: int, scores: dict[str, Any], event: str = "val") -> None:
        """Log an evaluation's scores."""
        self.record(event, epoch, **scores)
        if self.writer is not None and event == "val" and scores["mean_iou"] is not None:
            self.writer.add_scalar("mIoU/val", scores["mean_iou"], self.step)
        self.clock = time.perf_counter()  # the rate is that of training alone

    def record(self, event: str, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        self.file.write(json.dumps({"event": event, "epoch": epoch, "step": self.step} | values) + "\n")

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        CONSOLE.print(text, markup=False)

    def _show(self, epoch: int, lr: float, means: dict[str, float], now: float) -> None:
        rate = self.images_total / (now - self.started)
        left = (now - self.started) / self.steps_here * (self.total_steps - self.step)
        terms = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        text = (
            f"epoch {epoch}  step {self.step}/{self.total_steps}  {terms}  lr {lr:.2e}  "
            f"{rate:.1f} images/s  {_duration(left)} left"
        )
        if self.task is not None:
            self.bar.update(self.task, description=text, completed=self.step)
        elif now - self.last_line > self.LINE_SECONDS:
            self.last_line = now
            print(text, file=sys.stderr, flush=True)

    def _drop_after(self, step: int) -> None:
        """Forget records beyond the checkpoint that the run goes on from."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the line that a kill cut off
                continue
        self.path.write_text("".join(kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
