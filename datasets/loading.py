"""Batches, in an order that depends on (seed, epoch) alone.

However many workers read, and wherever a run was interrupted, an epoch holds the same batches.
Nothing here draws from torch's global random state, so dropout doesn't depend on it either.
"""

import ctypes
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.scenes import SceneDataset
from errors import UserError

Key = tuple[int, int]  # (epoch, image): an image as training sees it in that epoch


class Batch(NamedTuple):
    """Images (B, 3, H, W) uint8 RGB; labels (B, ceil(H/4), ceil(W/4)) or (B, H, W), uint8 train
    ids; indices (B,), positions in `dataset.samples`."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a worker as arrays, which go through a pipe.

        Tensors would go through /dev/shm, which is small in containers: a worker that finds it
        full, or has no file descriptor left, hangs for ever.
        """
        return batch_of_arrays, tuple(tensor.numpy() for tensor in self)


def batch_of_arrays(*arrays: np.ndarray) -> Batch:
    return Batch(*map(torch.from_numpy, arrays))


def stack(maps: Sequence[Tensor], fill: int) -> Tensor:
    """N maps (…, H, W) as (N, …, largest H, largest W); `fill` lies at the right and bottom."""
    height = max(x.shape[-2] for x in maps)
    width = max(x.shape[-1] for x in maps)
    missing = [(0, width - x.shape[-1], 0, height - x.shape[-2]) for x in maps]
    return torch.stack([F.pad(x, m, value=fill) for x, m in zip(maps, missing, strict=True)])


@dataclass(frozen=True)
class Reader:
    """What workers do: the batch of some keys."""

    dataset: SceneDataset

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UserError:
        try:
            items = [self.dataset[key] for key in keys]
        except UserError as error:
            return error  # raised, it would have the worker's traceback in its message
        images, labels, indices = zip(*items, strict=True)
        padded = stack(labels, self.dataset.classes.ignore)
        return Batch(stack(images, 0), padded, torch.tensor(indices))


@dataclass(frozen=True)
class Batches:
    """The `Batch` of each list of keys, which are gone through once.

    Raises UserError if an image or label can't be read, or a worker died.
    """

    dataset: SceneDataset
    keys: Iterable[list[Key]]
    num_workers: int = 0
    pin_memory: bool = False

    def __iter__(self) -> Iterator[Batch]:
        try:
            for result in self._start():
                if isinstance(result, UserError):
                    raise result
                yield result
        except Exception as error:
            # The frames of the error hold the workers, which would live until garbage is collected.
            # In a process that is forked meanwhile this can hang.
            traceback.clear_frames(error.__traceback__)
            # Either torch says that a worker died, or the connection to it broke. An error within a
            # worker, a bug, is "Caught …".
            died = "DataLoader worker (pid" in str(error)
            broken = isinstance(error, OSError | EOFError) and "Caught " not in str(error)
            if not self.num_workers or not (died or broken):
                raise
            raise UserError(
                f"a data-loading worker died ({error}); lower --num-workers, or raise what ran "
                "out (a container's memory, /dev/shm by --shm-size, files by ulimit -n)"
            ) from error

    def _start(self) -> Iterator[Any]:
        """Start the workers."""
        # Python 3.14 starts workers as new interpreters, which takes seconds.
        context = "fork" if self.num_workers and sys.platform == "linux" else None
        loader = DataLoader[Any](
            Reader(self.dataset),  # type: ignore[arg-type]
            sampler=self.keys,
            batch_size=None,  # the keys are a batch's already
            num_workers=self.num_workers,
            multiprocessing_context=context,
            pin_memory=self.pin_memory,
            worker_init_fn=follow_main_process,
            generator=torch.Generator(),  # else each pass would advance the global random state
        )
        # torch sets a handler that raises in the midst of whatever the main process does when a
        # worker dies. Without it, fetching the next batch raises.
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return iterator


def follow_main_process(worker: int) -> None:
    """Let the main process alone end a worker: terminals and schedulers signal every process."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first alone
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        # Else, where the main process is killed, a worker waits for ever at a full pipe.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def training_batches(
    dataset: SceneDataset,
    *,
    batch_size: int,
    seed: int,
    epochs: Iterable[int],
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """The batches of epochs, augmented; of the first one from batch `start` on.

    An epoch holds every image once, in random order. Workers read on from one epoch to the next.
    Images of different sizes are padded at the right and bottom, with black and ignore. With
    several processes, `batch_size` is each one's, and rank r gets its share of every global batch:
    all ranks get equally many batches, none of them empty, whose sizes differ by one image at most
    (the images left over, if fewer than ranks, join the batch before). The last may be smaller.

    Raises UserError if there are fewer images than processes.
    """
    if len(dataset) < world_size:
        raise UserError(f"{len(dataset)} training images are too few for {world_size} processes")
    cuts = list(range(0, len(dataset), batch_size * world_size))
    if len(cuts) > 1 and len(dataset) - cuts[-1] < world_size:
        cuts.pop()

    def keys() -> Iterator[list[Key]]:
        skipped = start
        for epoch in epochs:
            order = np.random.default_rng((seed, epoch)).permutation(len(dataset)).tolist()
            bounds = list(zip(cuts, [*cuts[1:], len(order)], strict=True))
            for begin, end in bounds[skipped:]:
                own = np.array_split(order[begin:end], world_size)[rank]
                yield [(epoch, int(index)) for index in own]
            skipped = 0

    return Batches(dataset, keys(), num_workers, pin_memory)
