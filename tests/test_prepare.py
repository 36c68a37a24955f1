"""Tiny archives of the structure of the published ones become folders that the loaders read."""

import io
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from datasets import CITYSCAPES, open_split, prepare
from datasets.classes import colormap
from errors import UserError

RNG = np.random.default_rng(0)
SIZE = (40, 60)  # (H, W), not square: a transposed picture is found out
DOWNLOADS, DATA = Path("downloads"), Path("data")
IMAGES, LABELS = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
FRAMES = "nyu_depth_v2_labeled.mat"


def encode(pixels, kind="PNG", palette=None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(file, kind)
    return file.getvalue()


LABEL = encode((np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 12).astype(np.uint8))


def photograph(kind="PNG") -> bytes:
    return encode(RNG.integers(0, 256, (*SIZE, 3), np.uint8), kind)


def write_zip(name, files) -> None:
    with zipfile.ZipFile(DOWNLOADS / name, "w", zipfile.ZIP_DEFLATED) as packed:
        for member, data in files.items():
            packed.writestr(member, data)


def write_tar(name, files) -> None:
    with tarfile.open(DOWNLOADS / name, "w:gz" if name.endswith(".tgz") else "w") as packed:
        for member, data in files.items():
            header = tarfile.TarInfo(member)
            header.size = len(data)
            packed.addfile(header, io.BytesIO(data))


def run(dataset, *sources) -> None:
    prepare.main(prepare.Options(dataset, sources or (DOWNLOADS,), DATA))


def labels(dataset, subset) -> dict[str, np.ndarray]:
    """What the loaders make of a split: image's stem -> train ids."""
    scenes = open_split(dataset, DATA, subset)
    return {sample.image.stem: scenes.full_label(i) for i, sample in enumerate(scenes.samples)}


def content(root) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    DOWNLOADS.mkdir()


def refuse_half(dataset, name) -> None:
    archive = DOWNLOADS / name
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"^.*{name} can't be read .*download it again$"):
        run(dataset)
    assert not DATA.exists()
    archive.write_bytes(whole)


def test_cityscapes(capsys) -> None:
    """Also after a member with a wrong check sum: those before it are there, whole, and stay."""
    images, truth = {}, {}
    for key in ("train/a/0", "train/a/1", "train/a/2", "val/b/0", "val/b/1", "test/c/0"):
        images[f"leftImg8bit/{key}_leftImg8bit.png"] = photograph()
        truth[f"gtFine/{key}_gtFine_labelIds.png"] = LABEL
    # Nobody wants the rest; the second is as ACDC has the same places in fair weather.
    write_zip(IMAGES, images | {"license.txt": b"terms", "fog/train_ref/1_rgb_anon.png": b"fair"})
    write_zip(LABELS, truth | {"gtFine/train/a/0_gtFine_polygons.json": b"{}"})
    refuse_half("cityscapes", LABELS)

    whole = (DOWNLOADS / IMAGES).read_bytes()
    with zipfile.ZipFile(DOWNLOADS / IMAGES) as packed:
        entry = packed.getinfo("leftImg8bit/train/a/1_leftImg8bit.png")
    spoiled = bytearray(whole)
    spoiled[entry.header_offset + 200] ^= 255
    (DOWNLOADS / IMAGES).write_bytes(spoiled)
    with pytest.raises(UserError, match=rf"{entry.filename} can't be read .*CRC.*; download it"):
        run("cityscapes")
    first = "leftImg8bit/train/a/0_leftImg8bit.png"
    written = (DATA / first).stat().st_mtime_ns
    assert content(DATA) == {first: images[first]}

    (DOWNLOADS / IMAGES).write_bytes(whole)
    run("cityscapes", DOWNLOADS / IMAGES, DOWNLOADS / LABELS)
    assert content(DATA) == images | truth and (DATA / first).stat().st_mtime_ns == written
    assert len(labels("cityscapes", "train")) == 3
    assert "40×60 (3)" in capsys.readouterr().out


def test_camvid() -> None:
    """11 classes, and 11 for unlabelled, become train ids. Another edition has more."""
    with pytest.raises(UserError, match=r"no CamVid in downloads; --help says where"):
        run("CamVid")
    for subset in ("train", "val", "test"):
        for folder, picture in ((subset, photograph()), (f"{subset}annot", LABEL)):
            path = DOWNLOADS / "CamVid" / folder / f"0001TP_{subset}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture)
    run("CamVid")
    label = labels("cityscapes", "test")["0001TP_test_leftImg8bit"]
    assert [CITYSCAPES.output_names[i] for i in label.ravel()[:12]] == [
        "sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence",
        "car", "person", "bicycle", "ignore",
    ]  # fmt: skip
    assert len(content(DATA)) == 6
    (DOWNLOADS / "CamVid/valannot/2.png").write_bytes(encode(np.full(SIZE, 21, np.uint8)))
    with pytest.raises(UserError, match=r"gtFine/val/.*2_gtFine.*index 21 is out of bounds"):
        run("CamVid")


def test_nyuv2() -> None:
    images = RNG.integers(0, 256, (5, *SIZE, 3), np.uint8)
    classes = RNG.integers(0, 895, (5, *SIZE))
    mapping = RNG.integers(1, 41, 894)
    with h5py.File(DOWNLOADS / FRAMES, "w", userblock_size=512) as file:
        file.create_dataset("images", data=images.transpose(0, 3, 2, 1), compression="gzip")
        file.create_dataset("labels", data=classes.transpose(0, 2, 1), compression="gzip")
    scipy.io.savemat(DOWNLOADS / "classMapping40.mat", {"mapClass": mapping[None]})
    scipy.io.savemat(DOWNLOADS / "splits.mat", {"trainNdxs": [1.0, 4.0, 5.0], "testNdxs": [2, 3]})
    refuse_half("NYUv2", FRAMES)
    run("NYUv2")
    found = labels("NYUv2", "train") | labels("NYUv2", "test")
    assert list(found) == ["0001", "0004", "0005", "0002", "0003"]
    for name, label in found.items():
        raw = classes[int(name) - 1]
        np.testing.assert_array_equal(label, np.where(raw == 0, 40, mapping[raw - 1] - 1))
        image = np.asarray(Image.open(DATA / "images" / f"{name}.png"))
        np.testing.assert_array_equal(image, images[int(name) - 1])


def test_voc2012() -> None:
    """VOC has labels of a and b to train and of v to validate, SBD of a, c and v.

    Trained on is all but what validates, with VOC's own label where there are two.
    """
    own, added = ({name: RNG.integers(0, 21, SIZE, np.uint8) for name in x} for x in ("abv", "acv"))
    photographs = {f"JPEGImages/{name}.jpg": photograph("JPEG") for name in "abcvz"}
    files = photographs | {"ImageSets/Segmentation/val.txt": b"v\n"}
    for name, label in own.items():
        label[0] = 255
        files[f"SegmentationClass/{name}.png"] = encode(label, palette=colormap(256))
    truth = np.array([[(0, 0)]], dtype=[("Boundaries", object), ("Segmentation", object)])
    more = {}
    for name, label in added.items():
        truth[0, 0] = (0, label)
        file = io.BytesIO()
        scipy.io.savemat(file, {"GTcls": truth})
        more[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = file.getvalue()
    write_tar(VOC, {f"VOCdevkit/VOC2012/{name}": data for name, data in files.items()})
    write_tar(SBD, more)
    refuse_half("VOC2012", SBD)
    run("VOC2012")
    found = {subset: labels("VOC2012", subset) for subset in ("train", "val")}
    assert ["".join(names) for names in found.values()] == ["abc", "v"]
    for name, label in (found["train"] | found["val"]).items():
        raw = (added | own)[name]
        np.testing.assert_array_equal(label, np.where(raw == 255, 21, raw))
        photo = f"JPEGImages/{name}.jpg"
        assert (DATA / photo).read_bytes() == photographs[photo]
    assert len(content(DATA / "JPEGImages")) == 4


@pytest.mark.parametrize("name", ["a/train/../../../x_leftImg8bit.png", "/x/val/y_labelIds.png"])
def test_a_member_outside_the_folder(name) -> None:
    write_zip(IMAGES, {name: b"evil"})
    write_zip(LABELS, {})
    with pytest.raises(UserError, match="leads out of the folder"):
        run("cityscapes")
    assert not DATA.exists()
