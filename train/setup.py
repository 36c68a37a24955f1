"""What happens before the networks are built: the device, the data, the run's folder, the seed."""

import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import count, islice

import torch
from filelock import FileLock

from datasets import Augmentation, Classes, SceneDataset, open_split, use_cache
from datasets.loading import Batch, Batches, training_batches
from errors import UserError
from files import acquire, remove_temporaries
from train import distributed
from train.logger import find_dashboards
from train.options import TrainingOptions

log = logging.getLogger(__name__)

CHECKPOINTS = ("last.pt", "previous.pt")
"""Files from which a run can be resumed, the newer one first."""


@dataclass
class Run:
    """What a run needs before its networks are built."""

    options: TrainingOptions
    device: torch.device
    train_set: SceneDataset
    val_set: SceneDataset
    lock: FileLock | None  # on the run's folder, held as long as this object lives

    @property
    def classes(self) -> Classes:
        return self.train_set.classes

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def micro_batch_size(self) -> int:
        """Images that each process takes at a time.

        Raises UserError if the global batch can't be divided evenly.
        """
        batch_size = self.options.recipe.batch_size
        parts = distributed.world_size() * self.options.hardware.accumulate
        if batch_size % parts:
            raise UserError(
                f"--batch-size {batch_size} can't be divided by {parts} (the number of processes, "
                "times --accumulate); give a multiple of that"
            )
        return batch_size // parts

    def class_weights(self) -> tuple[float, ...] | None:
        """The cross entropy's class weights, one for each output; None weighs all classes alike."""
        kind = self.options.recipe.class_weights
        if kind == "dataset":
            self.use_cache()  # every label is read
            return self.train_set.count_class_weights()
        return self.classes.weights if kind == "published" else None

    def use_cache(self) -> None:
        """From now on read images from a cache of resized ones, which is built if there is none.

        Raises UserError if an image or a label can't be read.
        """
        with distributed.fail_in_all_processes():
            if self.options.data.cache and self.train_set.cache is None:
                use_cache(self.train_set)
                use_cache(self.val_set)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process."""
        return sum(1 for _ in self.batches([1]).keys)

    def epochs(self, epoch: int, steps_done: int = 0) -> Iterator[Iterable[Batch]]:
        """This process's micro-batches, epoch after epoch; of the first, those of the steps to do.

        They are one stream: workers are started once, and read on while the run validates.
        """
        done = steps_done * self.options.hardware.accumulate
        stream = iter(self.batches(count(epoch), done))
        whole = self.batches_per_epoch
        while True:
            yield islice(stream, max(whole - done, 0))
            done = 0

    def batches(self, epochs: Iterable[int], start: int = 0) -> Batches:
        """This process's micro-batches of epochs, of the first one from number `start` on."""
        return training_batches(
            self.train_set,
            batch_size=self.micro_batch_size,
            seed=self.options.recipe.seed,
            epochs=epochs,
            start=start,
            num_workers=self.options.data.num_workers,
            pin_memory=self.is_cuda,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )


def start(options: TrainingOptions) -> Run:
    """Open the data, claim the run's folder, and seed everything.

    Called before the networks are built, which it seeds. No image is read here: a mistake, or
    weights that are missing, show before anything that is long.

    Raises UserError if an option, the device, the folder or the data set can't be used.
    """
    device = distributed.init(options.hardware.device)
    with distributed.fail_in_all_processes():  # a file may be missing on one node alone
        options.validate()
        find_dashboards(options)
        set_up_torch(options, device)
        data, recipe = options.data, options.recipe
        names = [f.name for f in fields(Augmentation)]
        train_set = open_split(
            data.dataset,
            data.datadir,
            "train",
            height=data.height,
            every=data.subset_every,
            list_file=data.train_list,
            augment=Augmentation(**{name: getattr(recipe, name) for name in names}),
            full_labels=recipe.loss_size == "full",
        )
        val_set = open_split(data.dataset, data.datadir, "val", height=data.height)
        lock = claim_folder(options) if distributed.is_main_process() else None
        run = Run(options, device, train_set, val_set, lock)
        micro_batch_size = run.micro_batch_size
    # `auto` was decided by the main process, which has the folder.
    options.run.resume = distributed.broadcast_object(options.run.resume)
    single_image = micro_batch_size == 1 and options.recipe.batch_size > 1
    if single_image and not options.hardware.sync_batchnorm and distributed.is_main_process():
        log.warning(
            "one image at a time: BatchNorm sees a single image, and CSF takes its squeeze for "
            "one; a larger --batch-size comes closer to the recipe"
        )
    torch.manual_seed(options.recipe.seed)
    return run


def claim_folder(options: TrainingOptions) -> FileLock:
    """Lock the run's folder; `--resume auto` is decided here.

    Raises UserError if it can't be written, another process has locked it, or it holds a run
    and `--resume` was not given.
    """
    folder = options.run_dir
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not acquire(lock):
            raise UserError(f"another run writes into {folder}; choose another folder")
    except OSError as error:
        raise UserError(
            f"can't write to {folder} ({error.strerror}); choose another --output-dir"
        ) from error
    remove_temporaries(folder)
    # A folder without a checkpoint holds nothing to lose: a run that ended before it saved.
    begun = any((folder / name).exists() for name in CHECKPOINTS)
    if options.run.resume == ("auto",):
        options.run.resume = () if begun else None
    if begun and options.run.resume is None:
        raise UserError(
            f"{folder} already holds a run; add --resume to continue it, or choose another "
            "--output-dir"
        )
    if options.run.resume is None:
        # Of a run whose checkpoints were removed.
        for name in ("metrics.jsonl", "eval.json", "done.json"):
            (folder / name).unlink(missing_ok=True)
    return lock


def require_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile would find no compiler.

    It needs one of C++ on a CPU, and one of C to launch a GPU's kernels.
    """
    compilers = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if device.type == "cuda":
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(
            f"--compile needs a C++ compiler, and there is no {compilers[0]}; install it, name "
            "another by CXX (with a GPU, CC), or leave --compile out"
        )


def set_up_torch(options: TrainingOptions, device: torch.device) -> None:
    """Set torch up for speed, or for results that repeat bit for bit.

    Raises UserError for what this device can't do.
    """
    hardware = options.hardware
    cuda = device.type == "cuda"
    if hardware.compile:
        require_compiler(device)
    if hardware.sync_batchnorm and not cuda:
        raise UserError("--sync-batchnorm works on CUDA alone; leave it out")
    several = distributed.world_size() > 1
    if hardware.compile_mode != "default" and (several or hardware.accumulate > 1):
        raise UserError(
            f"--compile-mode {hardware.compile_mode} is for one process without --accumulate: the "
            "next replay of a CUDA graph would overwrite gradients that are not used yet"
        )
    if several:
        # One graph, not one for each bucket of gradients: 15 MB are too few to be worth sending
        # early, and the parts' backward passes have failed for an epoch's smaller last batch.
        torch._dynamo.config.optimize_ddp = False
    # TF32 has float32's range with ten bits of precision, and is several times as fast.
    torch.set_float32_matmul_precision("high" if hardware.tf32 and cuda else "highest")
    torch.backends.cudnn.allow_tf32 = hardware.tf32
    torch.backends.cudnn.benchmark = not hardware.deterministic
    torch.use_deterministic_algorithms(hardware.deterministic, warn_only=True)
    if hardware.deterministic:
        # Else cuBLAS, and attention's fast kernels, add up in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if cuda:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
