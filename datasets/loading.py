"""Batches, in an order that depends on (seed, epoch) alone.

However many workers read, and wherever a run was interrupted, the same epoch holds the same
batches. Nothing here draws from torch's global random state, so dropout doesn't depend on it
either.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datasets.scenes import Item, SceneDataset
from errors import UserError

Key = int | tuple[int, int]


class Batch(NamedTuple):
    images: Tensor
    """(B, 3, H, W) uint8 RGB"""
    labels: Tensor
    """(B, ceil(H/4), ceil(W/4)) or, from a data set with full labels, (B, H, W); uint8 train ids, ignore = n"""
    indices: Tensor
    """(B,) int64, positions in `dataset.samples`"""


@dataclass(frozen=True)
class Batches:
    """An iterable of `Batch`; `len` is their number, before the evaluation's split by size."""

    dataset: SceneDataset
    keys: list[list[Key]]
    pad: bool
    num_workers: int = 0
    pin_memory: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        done, died_at = 0, -1
        wrong: UserError | None = None
        while done < len(self.keys) and not wrong:
            try:
                for result in self._results(done):
                    if isinstance(result, UserError):
                        wrong = result
                        break
                    done += 1
                    yield from result
            except Exception as error:
                if not self.num_workers:
                    raise
                if not _worker_died(error):
                    raise error.with_traceback(None) from None  # the message holds the worker's own
                if died_at == done:
                    raise UserError(
                        "the data-loading workers keep dying; if memory ran out, use fewer --num-workers"
                    ) from error
                died_at = done
                print(
                    "a data-loading worker died; starting again where it stopped", file=sys.stderr
                )
        if wrong:  # only now, when the workers have ended
            raise wrong

    def _results(self, start: int) -> Iterator[list[Batch] | UserError]:
        loader = DataLoader(
            _Reader(self.dataset, self.pad),
            sampler=self.keys[start:],
            batch_size=None,  # what is read is a batch already
            num_workers=self.num_workers,
            # Python 3.14 starts them as new interpreters, which takes seconds an epoch
            multiprocessing_context="fork"
            if self.num_workers and sys.platform == "linux"
            else None,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            generator=torch.Generator(),  # else each pass would advance the global random state
        )
        handler = signal.getsignal(signal.SIGCHLD)
        results = iter(loader)
        # torch has set a handler that raises in the midst of whatever the main process does when a worker
        # dies; without it, fetching the next batch does.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return results


def training_batches(
    dataset: SceneDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """The batches of one epoch, augmented, from batch `start` on: every image once, in random order.

    The last batch may be smaller. Where images of one batch differ in size, they are padded at the
    right and bottom to the largest, images with black and labels with ignore.
    With several processes, `batch_size` is each one's, and rank r gets its share of every global
    batch of `batch_size · world_size` images: all ranks get equally many batches, none of them
    empty, whose sizes differ by one image at most (the images left over, if fewer than ranks, join
    the batch before). Raises UserError if there are fewer images than processes.
    """
    if len(dataset) < world_size:
        raise UserError(f"{len(dataset)} training images are too few for {world_size} processes")
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset)).tolist()
    step = batch_size * world_size
    cuts = list(range(0, len(order), step))
    if len(cuts) > 1 and len(order) - cuts[-1] < world_size:
        cuts.pop()
    keys: list[list[Key]] = []
    for begin, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        share = np.array_split(order[begin:end], world_size)[rank]
        keys.append([(epoch, int(index)) for index in share])
    return Batches(dataset, keys[start:], True, num_workers, pin_memory)


def evaluation_batches(
    dataset: SceneDataset,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Every image once and in order, not augmented. All images of a batch have one size: where the
    size changes, a new batch begins. With several processes, rank r gets the samples r, r +
    world_size, … and no other.
    """
    mine = range(rank, len(dataset), world_size)
    keys = [list[Key](mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    return Batches(dataset, keys, False, num_workers, pin_memory)


class _Reader(Dataset):
    """Reads a batch at a time, in the worker. Hands a UserError over as a value, because
    DataLoader would put the worker's traceback into its message.
    """

    def __init__(self, dataset: SceneDataset, pad: bool) -> None:
        self.dataset = dataset
        self.pad = pad

    def __getitem__(self, keys: Sequence[Key]) -> list[Batch] | UserError:
        try:
            items = [self.dataset[key] for key in keys]
        except UserError as error:
            return error
        if self.pad:
            return [_stack(_padded(items, self.dataset.classes.ignore))]
        return [
            _stack(list(batch)) for _, batch in groupby(items, key=lambda item: item.image.shape)
        ]


def _padded(items: list[Item], ignore: int) -> list[Item]:
    height = max(item.image.shape[-2] for item in items)
    width = max(item.image.shape[-1] for item in items)
    h, w = max(item.label.shape[-2] for item in items), max(item.label.shape[-1] for item in items)
    return [
        Item(_pad(image, height, width, 0), _pad(label, h, w, ignore), index)
        for image, label, index in items
    ]


def _pad(x: Tensor, height: int, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)


def _stack(items: list[Item]) -> Batch:
    images, labels, indices = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), torch.tensor(indices))


def _worker_died(error: Exception) -> bool:
    """Whether DataLoader says so, or the connection to a worker broke; an error passed on is "Caught …"."""
    if isinstance(error, OSError | EOFError):
        return not str(error).startswith("Caught ")
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
