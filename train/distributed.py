"""One process or many: `torchrun --nproc-per-node N train/TransKDBase.py …`, on one node or more.

Every process computes its share of a global batch; gradients are averaged by
DistributedDataParallel; the main process alone reads and writes the run's folder. Tensors travel by
the way of their device (NCCL or gloo), Python objects by gloo, which waits for no GPU. With one
process these functions do nothing.
"""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cli
from errors import UserError


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process reads and writes the run's folder, and speaks."""
    return rank() == 0


def init(device: str) -> torch.device:
    """Join the other processes, if torchrun started some; returns the device of this one.

    Raises UserError if one of the processes can't have its device.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these variables
    gpus = device != "cpu" and torch.cuda.is_available()
    if started > 1 and device in ("auto", "cuda") and gpus:
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process of a node
    # One process of torchrun's is a group as well: what works with it works with several.
    in_group = started > 1 or dist.is_torchelastic_launched()
    if in_group and not dist.is_initialized():
        # If DistributedDataParallel loads it, later, its default arguments hold the group for good.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "cpu:gloo")
    with fail_in_all_processes():
        return cli.find_device(device)


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over processes; its values are overwritten."""
    if world_size() > 1:
        dist.all_reduce(values)  # their sum, in place
        values = values / world_size()
    return values


def any_process(flag: bool) -> bool:
    """Whether a flag is true in at least one process."""
    return bool(mean(torch.tensor(float(flag))) > 0)


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The main process's value."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the main one's BatchNorm statistics, which differ after a step."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def require_same(facts: dict[str, Any]) -> None:
    """Raise UserError where processes, which would learn other things, were not given the same."""
    gathered = all_gather_object(facts)
    for number, theirs in enumerate(gathered):
        different = [key for key in facts if theirs[key] != gathered[0][key]]
        if different:
            shutdown()
            raise UserError(
                f"process {number} has another {', '.join(different)} than process 0; give all "
                "nodes the same command, data and weights"
            )


@contextmanager
def fail_in_all_processes() -> Iterator[None]:
    """A UserError in one process ends all of them: the others would wait for it for ever.

    Raises UserError: this process's, or else another's.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    # Everybody gets here, and learns what went wrong elsewhere.
    problems = all_gather_object(problem and str(problem))
    for number, text in enumerate(problems):
        if text:
            shutdown()
            raise problem or UserError(f"process {number}: {text}")


def shutdown() -> None:
    """Wait for the others and end the group; DistributedDataParallel must be deleted by then."""
    if dist.is_initialized():
        # A thread of gloo's that still works while the interpreter ends can abort the process. A
        # DistributedDataParallel that was deleted still holds the group, by a reference cycle.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
