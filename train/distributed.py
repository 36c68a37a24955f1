"""One process or many: `torchrun --nproc-per-node N train/TransKDBase.py …` (several nodes by the same command).

Every rank computes its share of a global batch; gradients are averaged by DistributedDataParallel, logged losses
and confusion matrices over all ranks; rank 0 alone reads and writes the run's folder. Tensors travel by the way of
their device (NCCL or gloo), what ranks agree on by gloo, which waits for no GPU.
"""

import gc
import importlib
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cli import find_device
from errors import UserError

LOST = (
    "by peer",
    "Broken pipe",
    "ncclRemoteError",
)  # what gloo and NCCL say of a process that is gone


class Ranks:
    """This process among those that train together.

    Attributes:
        rank, world_size: 0 and 1 for a process of its own.
        device: where this process computes.
    """

    def __init__(self, device: str) -> None:
        try:
            self.rank, self.world_size = (
                int(os.environ.get("RANK", 0)),
                int(os.environ.get("WORLD_SIZE", 1)),
            )
        except ValueError as error:
            raise UserError(
                "RANK and WORLD_SIZE in the environment are no numbers; torchrun sets them"
            ) from error
        if self.world_size > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError(
                "WORLD_SIZE is set but not the rest of what torchrun sets; start by torchrun, or unset it"
            )
        if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"--device {device} is one GPU for all processes; leave it out, and each takes its own"
            )
        gpus = device != "cpu" and torch.cuda.is_available()
        if self.world_size > 1 and device in ("auto", "cuda") and gpus:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if self.world_size > 1 and not dist.is_initialized():
            # If DistributedDataParallel loads it, later, its default arguments hold the group for good (see `leave`)
            importlib.import_module("torch.distributed.nn.functional")
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "cpu:gloo")
        with self.together():
            self.device = find_device(device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int, accumulate: int) -> int:
        """Images of a global batch that each rank takes at a time.

        Raises:
            UserError: they can't be shared out evenly.
        """
        parts = self.world_size * accumulate
        if batch_size % parts:
            raise UserError(
                f"--batch-size {batch_size} can't be shared by {self.world_size} processes with --accumulate "
                f"{accumulate}; it is the global batch, and must be a multiple of {parts}"
            )
        return batch_size // parts

    def wrap(self, module: nn.Module, *, some_idle: bool) -> nn.Module:
        """The module whose gradients are averaged over ranks; `some_idle`: a step may leave parameters unused.

        CSF has two squeezes and uses one of them, according to the batch.
        """
        if self.world_size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Depthwise weights get channels_last gradients, which are copied into the buckets: a note about speed alone
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=some_idle)

    def averaging(self, module: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Whether a backward pass within it averages gradients over ranks, or lets them add up in each."""
        return (
            nullcontext()
            if now or not isinstance(module, DistributedDataParallel)
            else module.no_sync()
        )

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """The first rank's value."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one rank alone ends all of them, instead of leaving the others to wait for it.

        Raises:
            UserError: this rank's, or else another's.
        """
        problem: UserError | None = None
        try:
            yield
        except UserError as error:
            problem = error
        told = self.gather(problem and str(problem))
        if any(told):
            self.leave()
            rank = next(rank for rank, text in enumerate(told) if text)
            raise problem or UserError(f"process {rank}: {told[rank]}")

    def require_same(self, facts: dict[str, Any]) -> None:
        """Compare what must be the same in all ranks, which would otherwise wait for each other, or learn other things.

        Raises:
            UserError: it differs.
        """
        told = self.gather(facts)
        for rank, theirs in enumerate(told):
            if different := [key for key in facts if theirs[key] != told[0][key]]:
                self.leave()
                raise UserError(
                    f"process {rank} has another {', '.join(different)} than process 0; give all nodes the same "
                    "command, data and weights"
                )

    def agree(self, module: nn.Module) -> None:
        """Give every rank the first one's buffers: BatchNorm's statistics differ between ranks after a step."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def leave(self) -> None:
        """Wait for the others and end the process group and its threads; what `wrap` gave must be gone by then.

        A thread of gloo's that is still at work while the interpreter ends can abort the process.
        """
        if self.world_size > 1 and dist.is_initialized():
            gc.collect()  # DistributedDataParallel is a ring that holds the group
            dist.barrier()
            dist.destroy_process_group()


@contextmanager
def until_another_ends() -> Iterator[None]:
    """End in one line where it is another process that has failed: that one says why.

    Raises:
        UserError: the connection to another process broke.
    """
    try:
        yield
    except Exception as error:
        if (
            dist.is_initialized() and dist.get_backend() == "cpu:gloo"
        ):  # as `leave`; NCCL would wait
            traceback.clear_frames(error.__traceback__)  # they hold DistributedDataParallel
            gc.collect()
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
            raise UserError(
                "another process has ended (its own message or torchrun's says why); what was saved before is kept"
            ) from error
        raise
