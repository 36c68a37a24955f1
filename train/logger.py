"""What a run tells the world: a line on the console, metrics.jsonl, TensorBoard, W&B, visdom.

A training never fails because a dashboard does: its first failure is one warning, and then it is
left alone. metrics.jsonl is different: without it a run's curves have holes.
"""

import json
import logging
import math
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.samples import Sample
from errors import UserError, require
from files import atomic_write, read_records
from progress import progress_line
from train import distributed
from train.options import TrainingOptions

log = logging.getLogger(__name__)


class TensorBoard:
    """Event files in a run's folder; what they held from `purge_step` on is dropped."""

    def __init__(self, options: TrainingOptions, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = options.run_dir / "tensorboard"
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.close = self.writer.close

    def point(self, chart: str, curve: str, step: int, value: float) -> None:
        self.writer.add_scalar(f"{chart}/{curve}", value, step)

    def picture(self, title: str, step: int, pixels: np.ndarray) -> None:
        self.writer.add_image(title, pixels, step, dataformats="HWC")


def start_wandb(options: TrainingOptions) -> None:
    """Let Weights & Biases send on what TensorBoard's writers write from now on."""
    import wandb

    folder = options.run_dir
    wandb.init(
        project=options.run.wandb,
        name=folder.name,
        # The folder's own: a resumed run continues its curves.
        id=f"{folder.name}-{zlib.crc32(bytes(folder.resolve())):08x}",
        dir=str(folder),
        config=options.as_json(),
        resume="allow",
        sync_tensorboard=True,
    )


class Visdom:
    """Windows, in an environment of the run's name, of `python -m visdom.server -bind_local`."""

    def __init__(self, options: TrainingOptions) -> None:
        visdom: Any = import_module("visdom")
        for chatter in ("visdom", "websocket"):  # a traceback for every lost message
            logging.getLogger(chatter).setLevel(logging.CRITICAL)

        class Client(visdom.Visdom):
            def _handle_post(self, url: str, data: Any = None) -> str:
                return self.session.post(url, data=data, timeout=10.0).text  # else for ever

        server: dict[str, Any] = {"server": "http://127.0.0.1", "port": options.run.port}
        quiet = {"raise_exceptions": True, "use_incoming_socket": False}
        self.client = Client(env=options.run_dir.name, **server, **quiet)

    def point(self, chart: str, curve: str, step: int, value: float) -> None:
        opts = {"title": chart, "showlegend": True}
        self.client.line([value], [step], win=chart, name=curve, update="append", opts=opts)

    def picture(self, title: str, step: int, pixels: np.ndarray) -> None:
        self.client.image(pixels.transpose(2, 0, 1), win=title, opts={"title": title})

    def close(self) -> None:
        """The server keeps the windows."""


def find_dashboards(options: TrainingOptions) -> None:
    """Raise UserError for a dashboard that is not installed: before anything long is started."""
    if options.run.visualize:  # its installation needs PIP_BUILD_CONSTRAINT
        require("visdom", "-r requirements/visdom.txt; README.md, Monitoring, has the whole line")
    if options.run.wandb is not None:
        require("wandb", "-r requirements/wandb.txt")


class Logger:
    """Keeps losses on the device and fetches them only when they are logged.

    The main process alone writes and speaks.

    Args:
        samples: the training images, to name those that break a loss.
        total_steps: of the whole run.
        start_step: steps already done; what a killed run logged after that is dropped.
    """

    def __init__(
        self, options: TrainingOptions, samples: Sequence[Sample], total_steps: int, start_step: int
    ) -> None:
        self.options = options
        self.samples = samples
        self.step = self.start_step = start_step
        self.pending: list[tuple[int, dict[str, Tensor], Tensor]] = []
        self.clock = time.perf_counter()
        self.path = options.run_dir / "metrics.jsonl"
        self.line = progress_line(
            "training",
            total_steps,
            "steps",
            initial=start_step,
            disable=not distributed.is_main_process(),
        )
        self.dashboards: dict[str, Any] = {}
        if distributed.is_main_process():
            before = read_records(self.path) if self.path.exists() else []
            # Steps that a killed run logged after its checkpoint are computed and logged once more.
            with atomic_write(self.path) as temporary:
                kept = [json.dumps(record) for record in before if record["step"] <= start_step]
                temporary.write_text("".join(line + "\n" for line in kept))
            if options.run.wandb is not None:
                with self._guard("Weights & Biases"):
                    start_wandb(options)
            if options.run.tensorboard or options.run.wandb is not None:
                with self._guard("TensorBoard") as name:
                    self.dashboards[name] = TensorBoard(options, start_step + 1)
            if options.run.visualize:
                with self._guard(f"the visdom server on port {options.run.port}") as name:
                    self.dashboards[name] = Visdom(options)

    def add(self, step: int, losses: dict[str, Tensor], indices: Tensor) -> None:
        """Remember the losses of one batch; nothing is fetched from the device yet."""
        self.pending.append((step, {k: v.detach() for k, v in losses.items()}, indices))

    def stepped(self, step: int, epoch: int, lr: float) -> None:
        """Count a step; the first one and every `--steps-loss`-th are logged."""
        self.step = step
        self.epoch = epoch
        self.lr = lr
        self.line.update(step - self.line.n)
        if step % self.options.run.steps_loss == 0 or step == self.start_step + 1:
            self.log_losses()

    def log_losses(self) -> None:
        """Log the mean losses since the last record.

        Raises UserError if one of them is NaN or infinite, in any process; it names the step and
        the images.
        """
        if not self.pending:
            return
        names = list(self.pending[0][1])
        # (steps, losses) in one tensor: a single copy from the device fetches all.
        values = torch.stack([torch.stack(list(losses.values())) for _, losses, _ in self.pending])
        # The only moment at which the host waits for the device.
        if distributed.any_process(not values.isfinite().all()):
            self._raise_not_finite(names, values)
        averages = distributed.mean(values.double().mean(0)).tolist()
        means = dict(zip(names, averages, strict=True))
        means["total"] = sum(means.values())
        now = time.perf_counter()
        seconds = now - self.clock
        images = distributed.world_size() * sum(len(indices) for _, _, indices in self.pending)
        rate = round(images / seconds, 3)
        self.record("train", self.epoch, lr=self.lr, losses=means, images_per_second=rate)
        for name, value in means.items():
            self._draw("point", "loss", name, self.step, value)
        self._draw("point", "lr", "lr", self.step, self.lr)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.line.set_description(f"epoch {self.epoch}", refresh=False)
        self.line.set_postfix_str(f"{rate:.1f} images/s  lr {self.lr:.2e}  {shown}", refresh=False)
        self.pending = []
        self.clock = now

    def _raise_not_finite(self, names: list[str], values: Tensor) -> None:
        not_finite = []
        for (step, _, indices), row in zip(self.pending, values.tolist(), strict=True):
            images = ", ".join(self.samples[index].name for index in indices)
            broken = (
                name for name, value in zip(names, row, strict=True) if not math.isfinite(value)
            )
            not_finite += [(step, name, images) for name in broken]
        # The first of all processes, which then raise the same error.
        step, name, images = min(chain(*distributed.all_gather_object(not_finite)))
        raise UserError(
            f"the loss {name} is NaN or infinite at step {step} (images {images}); the last good "
            f"state is kept in {self.path.parent}: look at these images, or try a lower --lr"
        )

    def validated(self, epoch: int, scores: dict[str, Any], event: str) -> None:
        """Log an evaluation's scores, and leave its time out of the images a second."""
        self.record(event, epoch, **scores)
        for key, chart in (("mean_iou", "mIoU"), ("loss", "loss")):
            if scores.get(key) is not None:
                self._draw("point", chart, event, self.step, scores[key])
        self.clock = time.perf_counter()

    def pictures(self, pictures: dict[str, np.ndarray]) -> None:
        """Show pictures (H, W, 3) uint8 by title."""
        for title, pixels in pictures.items():
            self._draw("picture", title, self.step, pixels)

    def record(self, event: str, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl. Raises UserError if it can't be written."""
        if not distributed.is_main_process():
            return
        line = json.dumps({"event": event, "epoch": epoch, "step": self.step} | values) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"can't write {self.path} ({error.strerror}); make room and continue by --resume"
            ) from error

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if distributed.is_main_process():
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the progress line, and write what the dashboards still hold."""
        self.line.close()
        self._draw("close")

    def _draw(self, function: str, *arguments: Any) -> None:
        for name, dashboard in list(self.dashboards.items()):
            with self._guard(name):
                getattr(dashboard, function)(*arguments)

    @contextmanager
    def _guard(self, name: str) -> Iterator[str]:
        """The dashboard of that name is dropped, with a warning, if it fails."""
        try:
            yield name
        except Exception as error:
            self.dashboards.pop(name, None)
            reason = getattr(error, "strerror", None) or repr(error)[:100]
            log.warning("%s fails (%s); training goes on without it", name, reason)
