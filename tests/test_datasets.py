"""Pairing, reading, augmentation, cache and batches, on tiny trees in the layouts of Cityscapes and ACDC."""

import errno
import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets import Augmentation, evaluation_batches, open_split, training_batches
from datasets.cache import Cache
from datasets.classes import CITYSCAPES, Classes, colormap
from datasets.samples import files_below, pair_folders
from datasets.scenes import SceneDataset
from datasets.transforms import Draw, quarter, resize_label, resized_size, shift
from errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IGNORE = CITYSCAPES.ignore


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def write_scene(
    root: Path, name: str, size=(64, 96), *, subset="train", kind="labelTrainIds", extension="png"
) -> Path:
    """One random image with its label in the Cityscapes layout; returns the label's path."""
    rng = np.random.default_rng(list(name.encode()))
    city = name.split("_")[0]
    write(
        root / f"leftImg8bit/{subset}/{city}/{name}_leftImg8bit.{extension}",
        rng.integers(0, 256, (*size, 3)),
    )
    values = rng.integers(0, 19, size) if kind == "labelTrainIds" else rng.integers(0, 34, size)
    return write(root / f"gtFine/{subset}/{city}/{name}_gtFine_{kind}.png", values)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for i in range(9):
        write_scene(tmp_path / "data", f"town_{i:02}", extension="jpg" if i % 2 else "png")
    return tmp_path / "data"


def open_tree(root: Path, **options) -> SceneDataset:
    return open_split("cityscapes", root, "train", **{"height": 32, "cache": False, **options})


# --- classes


def test_classes_agree_with_cityscapes_own_table():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    train_ids, label_ids = CITYSCAPES.table("train_ids"), CITYSCAPES.table("label_ids")
    for label in labels:
        assert label_ids[label.id % 256] == (
            label.trainId if 0 <= label.trainId < 19 else IGNORE
        ), label.name
        if 0 <= label.trainId < 19:
            assert CITYSCAPES.names[label.trainId] == label.name
            assert tuple(CITYSCAPES.palette[label.trainId]) == label.color
            assert CITYSCAPES.label_ids[label.trainId] == label.id
            assert train_ids[label.trainId] == label.trainId
    assert (
        train_ids[255] == IGNORE
        and CITYSCAPES.label_ids[IGNORE] == 0
        and not CITYSCAPES.palette[IGNORE].any()
    )
    assert len(CITYSCAPES.weights) == CITYSCAPES.num_outputs and CITYSCAPES.weights[IGNORE] == 0


def test_another_number_of_classes(tmp_path: Path):
    """Three classes numbered from 1, 0 is ignored: NYUv2's way of counting."""
    classes = Classes(
        "three", ("a", "b", "c"), np.zeros((4, 3), np.uint8), None, (1, 2, 3, 0), (0,)
    )
    write(tmp_path / "images/x.png", np.zeros((32, 32, 3)))
    write(tmp_path / "labels/x_labelIds.png", np.arange(32)[:, None].repeat(32, 1) // 8)
    pairing = pair_folders(tmp_path, "images", "labels", image_suffix="", label_suffix="")
    dataset = SceneDataset(pairing.samples, classes, height=32)
    assert dataset[0].label[:, 0].tolist() == [3, 3, 0, 0, 1, 1, 2, 2]


# --- pairing


@settings(max_examples=25, deadline=None)
@given(
    images=st.sets(st.sampled_from(["a_1", "a_2", "a_10", "b_1", "b_2"])),
    train_ids=st.sets(st.sampled_from(["a_1", "a_2", "a_10", "b_1", "c_1"])),
    label_ids=st.sets(st.sampled_from(["a_1", "a_2", "b_2", "b_1", "c_2"])),
)
def test_pairing_is_by_name(tmp_path_factory, images, train_ids, label_ids):
    root = tmp_path_factory.mktemp("pairs")
    folders = {name: name.split("_")[0] for name in images | train_ids | label_ids}
    for names, pattern in (
        (images, "i/{}/{}_leftImg8bit.png"),
        (train_ids, "l/{}/{}_gtFine_labelTrainIds.png"),
        (label_ids, "l/{}/{}_gtFine_labelIds.png"),
    ):
        for name in names:
            path = root / pattern.format(folders[name], name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    pairing = pair_folders(root, "i", "l", image_suffix="_leftImg8bit", label_suffix="_gtFine")
    found = {
        sample.image.name.removesuffix("_leftImg8bit.png"): sample for sample in pairing.samples
    }
    assert set(found) == images and [s.name for s in pairing.samples] == sorted(
        s.name for s in pairing.samples
    )
    for name, sample in found.items():
        kind = "labelTrainIds" if name in train_ids else "labelIds" if name in label_ids else None
        assert (sample.label.name if sample.label else None) == (
            f"{name}_gtFine_{kind}.png" if kind else None
        )
        assert sample.encoding == ("label_ids" if kind == "labelIds" else "train_ids")
    assert len(pairing.orphans) == len(train_ids - images) + len(label_ids - images)


def test_cityscapes_split(tree: Path):
    dataset = open_tree(tree)
    assert [sample.name for sample in dataset.samples[:2]] == [
        "leftImg8bit/train/town/town_00_leftImg8bit.png",
        "leftImg8bit/train/town/town_01_leftImg8bit.jpg",
    ]
    assert [s.name for s in open_tree(tree, every=4).samples] == [
        dataset.samples[i].name for i in (0, 4, 8)
    ]


def test_list_file(tree: Path, tmp_path: Path):
    listing = tmp_path / "some.txt"
    listing.write_text(
        "# three\ntown_05_leftImg8bit\n\ntown/town_02_leftImg8bit.png\ntown_00_leftImg8bit.png\n"
    )
    chosen = open_tree(tree, list_file=listing).samples
    assert [sample.image.name[:7] for sample in chosen] == ["town_00", "town_02", "town_05"]
    listing.write_text("town_05_leftImg8bit\ntown_77\n")
    with pytest.raises(UserError, match=r"not in the split: 1 of 2 names \(town_77\)"):
        open_tree(tree, list_file=listing)


def test_acdc_conditions(tmp_path: Path):
    for condition, subset in itertools.product(
        ("fog", "night", "rain", "snow"), ("val", "val_ref")
    ):
        stem = f"{condition}/{subset}/GOPR1/GOPR1_frame_000001"
        write(tmp_path / f"rgb_anon/{stem}_rgb_anon.png", np.zeros((54, 96, 3)))
        if subset == "val":
            write(tmp_path / f"gt/{stem}_gt_labelIds.png", np.full((54, 96), 7))
    dataset = open_split("acdc", tmp_path, "val", height=32, cache=False)
    assert [sample.condition for sample in dataset.samples] == ["fog", "night", "rain", "snow"]
    assert dataset.samples[0].name == "rgb_anon/fog/val/GOPR1/GOPR1_frame_000001_rgb_anon.png"
    assert dataset[3].image.shape == (3, 32, 56) and (dataset[3].label == 0).all()
    assert (
        len(
            open_split("ACDC", tmp_path, "val", conditions=["rain", "rain"], height=32, cache=False)
        )
        == 1
    )
    for wrong, words in (
        ({"subset": "val_ref"}, "no subset 'val_ref'"),
        ({"subset": "train"}, r"no folder .*rgb_anon/fog/train; --datadir must hold rgb_anon/"),
        ({"subset": "val", "conditions": ["hail"]}, "no condition 'hail'"),
    ):
        with pytest.raises(UserError, match=words):
            open_split("ACDC", tmp_path, **wrong, cache=False)


def test_missing_partners_are_reported_and_can_be_allowed(tree: Path):
    next((tree / "gtFine").rglob("town_03*")).unlink()
    next((tree / "leftImg8bit").rglob("town_08*")).unlink()
    with pytest.raises(UserError) as caught:
        open_tree(tree)
    assert "images without label: 1 of 8 (town_03_leftImg8bit.jpg)" in str(caught.value)
    assert "labels without image: 1 (town_08_gtFine_labelTrainIds.png)" in str(caught.value)
    item = open_tree(tree, require_labels=False)[3]
    assert item.label.shape == (8, 12) and (item.label == IGNORE).all()


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no folder .*nowhere; --datadir must hold leftImg8bit/train"
    ):
        open_tree(tmp_path / "nowhere")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no .png or .jpg images in .*leftImg8bit/train"):
        open_tree(tmp_path)
    with pytest.raises(
        UserError, match="no data set is called 'kitti'; choose one of cityscapes, ACDC"
    ):
        open_split("kitti", tmp_path, "train")


# --- reading


@settings(max_examples=100, deadline=None)
@given(source=st.integers(1, 250), target=st.integers(1, 300), across=st.booleans())
def test_label_is_resized_to_the_nearest_source_pixel(source, target, across):
    ramp = np.arange(source, dtype=np.uint8).reshape(-1, 1)
    taken = resize_label(ramp.T if across else ramp, (1, target) if across else (target, 1)).ravel()
    position = (np.arange(quarter(target)) + 0.5) * source / quarter(target)
    # Pillow adds the step up from pixel to pixel, and may end just below a whole number
    assert ((taken == np.floor(position)) | (taken == np.floor(position - 1e-9))).all()


def test_sizes_of_the_paper():
    assert resized_size(512, (1024, 2048)) == (512, 1024)
    assert resized_size(512, (1080, 1920)) == (512, 910)
    assert resized_size(512, (1920, 1080)) == (910, 512)
    label = np.arange(1024, dtype=np.uint16).reshape(1024, 1).astype(np.uint8)
    assert (resize_label(label, (512, 512))[:, 0] == label[4::8, 0]).all()


def test_image_at_the_right_size_is_untouched(tmp_path: Path):
    write_scene(tmp_path, "town_1", (33, 50), kind="labelIds")
    dataset = open_tree(tmp_path, height=33)
    original = np.asarray(Image.open(dataset.samples[0].image))
    assert (dataset[0].image.permute(1, 2, 0).numpy() == original).all()
    assert dataset[0].label.shape == (9, 13)
    raw = np.asarray(Image.open(dataset.samples[0].label))
    assert (dataset.full_label(0) == CITYSCAPES.table("label_ids")[raw]).all()
    assert dataset.photograph(0).size == (50, 33)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            np.full((64, 96), 26),
            "no train ids .*: 26; these look like label ids: .*encoding='label_ids'",
        ),
        (np.full((64, 96), 200), "no train ids .*: 200; is this a colour map"),
        (np.full((64, 96, 3), 0), "looks like a colour map"),
        (np.zeros((32, 48)), "is 64×96 pixels .* is 32×48"),
    ],
)
def test_labels_that_cannot_be_right(tmp_path: Path, array, words):
    label = write_scene(tmp_path, "town_1")
    write(label, array)
    with pytest.raises(UserError, match=words) as caught:
        open_tree(tmp_path)[0]
    assert str(label) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_images_are_named(tmp_path: Path, monkeypatch):
    write_scene(tmp_path, "town_1")
    dataset = open_tree(tmp_path)
    image = dataset.samples[0].image
    whole = image.read_bytes()
    for damage in (
        whole[: len(whole) // 2],
        b"",
        b"not an image",
        whole[:40] + bytes(60) + whole[100:],
    ):
        image.write_bytes(damage)
        with pytest.raises(UserError, match=f"{image} cannot be read as an image"):
            dataset[0]
    image.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        dataset[0]
    image.unlink()
    with pytest.raises(UserError, match="is gone"):
        dataset[0]


# --- augmentation


def coded_scene(h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every 4×4 block of the image holds its label + 1, and every label occurs; nothing is black."""
    label = torch.arange(h * w).reshape(h, w).remainder(19).to(torch.uint8)
    image = (label + 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return image.expand(3, -1, -1).contiguous(), label


@settings(max_examples=150, deadline=None)
@given(
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    draw=st.tuples(st.booleans(), st.integers(-14, 14), st.integers(-14, 14)).map(
        lambda draw: Draw(*draw)
    ),
)
def test_image_and_label_stay_aligned(h, w, draw):
    image, label = coded_scene(h, w)
    moved, moved_label = Augmentation()(image, label, draw, IGNORE)
    assert moved.shape == image.shape and moved_label.shape == label.shape
    blocks = moved.reshape(3, h, 4, w, 4).permute(1, 3, 0, 2, 4).reshape(h, w, -1)
    assert (blocks == blocks[..., :1]).all()
    seen = blocks[..., 0].long()
    assert ((moved_label == IGNORE) == (seen == 0)).all()
    assert (moved_label[seen > 0] == seen[seen > 0] - 1).all()
    assert int((seen > 0).sum()) == max(h - abs(draw.ty), 0) * max(w - abs(draw.tx), 0)
    mirrored = label.flip(-1) if draw.flip else label
    assert torch.equal(moved_label, shift(mirrored, draw.tx, draw.ty, IGNORE))


@pytest.mark.parametrize(("tx", "ty"), list(itertools.product(range(-2, 3), range(-2, 3))))
def test_published_shift_is_pads_then_crop(tx, ty):
    """Against Pillow: a border (cut off where negative) filled with 255, then a crop that fills with 0."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (3, 24, 32), dtype=np.uint8)
    label = rng.integers(1, 19, (6, 8), dtype=np.uint8)

    def published(array: np.ndarray, fill: int) -> np.ndarray:
        height, width = array.shape
        bordered = ImageOps.expand(Image.fromarray(array), (tx, ty, 0, 0), fill)
        return np.asarray(bordered.crop((0, 0, width, height)))

    augment = Augmentation(published_shift=True)
    moved, moved_label = augment(
        torch.tensor(image), torch.tensor(label), Draw(False, tx, ty), IGNORE
    )
    assert (moved.numpy() == np.stack([published(channel, 0) for channel in image])).all()
    expected = published(label, 255)
    assert (moved_label.numpy() == np.where(expected == 255, IGNORE, expected)).all()


def test_draws_depend_on_seed_epoch_and_index_alone():
    augment = Augmentation(seed=3)
    draws = [augment.draw(epoch, index) for epoch in range(20) for index in range(100)]
    assert draws == [
        Augmentation(seed=3).draw(epoch, index) for epoch in range(20) for index in range(100)
    ]
    assert draws != [
        Augmentation(seed=4).draw(epoch, index) for epoch in range(20) for index in range(100)
    ]
    assert draws[:100] != draws[100:200]
    counts = Counter(draws)
    assert (
        len(counts) == 50 and min(counts.values()) > 15 and max(counts.values()) < 75
    )  # 40 on average
    assert {augment.draw(1, i).flip for i in range(30)} == {False, True}
    assert {Augmentation(flip=False, shift=0).draw(1, i) for i in range(30)} == {Draw(False, 0, 0)}


# --- batches


def content(batches) -> list:
    return [
        (b.indices.tolist(), b.images.numpy().tobytes(), b.labels.numpy().tobytes())
        for b in batches
    ]


def test_epoch_holds_every_image_and_ignores_the_number_of_workers(tree: Path):
    dataset = open_tree(tree, augment=Augmentation(seed=1))
    state = torch.get_rng_state()
    whole = content(training_batches(dataset, batch_size=2, seed=1, epoch=3))
    assert torch.equal(state, torch.get_rng_state()), "reading must not disturb dropout"
    assert [len(indices) for indices, _, _ in whole] == [2, 2, 2, 2, 1]
    assert sorted(index for indices, _, _ in whole for index in indices) == list(range(9))
    assert content(training_batches(dataset, batch_size=2, seed=1, epoch=3, num_workers=2)) == whole
    assert content(training_batches(dataset, batch_size=2, seed=1, epoch=3, start=3)) == whole[3:]
    assert content(training_batches(dataset, batch_size=2, seed=1, epoch=4)) != whole
    assert len(training_batches(dataset, batch_size=2, seed=1, epoch=3, start=3)) == 2
    plain, drawn = dataset[4], [dataset[epoch, 4] for epoch in range(9)]
    assert any(not torch.equal(plain.image, item.image) for item in drawn)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 4), start=st.integers(0, 3)
)
def test_ranks_share_every_global_batch(n, batch, world, start):
    dataset = SceneDataset([None] * n, CITYSCAPES)  # type: ignore[list-item]
    if n < world:
        with pytest.raises(UserError, match="too few"):
            training_batches(dataset, batch_size=batch, seed=0, epoch=1, world_size=world)
        return
    options = {"batch_size": batch, "seed": 0, "epoch": 1}
    ranks = [
        training_batches(dataset, **options, start=start, rank=r, world_size=world).keys
        for r in range(world)
    ]
    assert len({len(keys) for keys in ranks}) == 1
    together = [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]
    (order,) = training_batches(dataset, **{**options, "batch_size": n}).keys
    assert [key for step in together for key in step] == order[start * batch * world :] or len(
        together
    ) == 0
    for step in zip(*ranks, strict=True):
        assert min(map(len, step)) >= 1 and max(map(len, step)) - min(map(len, step)) <= 1
    shares = [
        evaluation_batches(dataset, batch_size=batch, rank=r, world_size=world).keys
        for r in range(world)
    ]
    assert sorted(key for keys in shares for step in keys for key in step) == list(range(n))


def test_mixed_sizes(tmp_path: Path):
    for i, size in enumerate([(32, 40), (32, 40), (32, 64), (32, 40)]):
        write_scene(tmp_path, f"town_{i}", size)
    dataset = open_tree(tmp_path)
    batches = list(evaluation_batches(dataset, batch_size=3))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [2], [3]]
    assert [tuple(batch.labels.shape) for batch in batches] == [(2, 8, 10), (1, 8, 16), (1, 8, 10)]
    (batch,) = training_batches(dataset, batch_size=4, seed=0, epoch=1)
    assert batch.images.shape == (4, 3, 32, 64) and batch.labels.shape == (4, 8, 16)
    for image, label, index in zip(*batch, strict=True):
        item = dataset[int(index)]
        width = item.image.shape[-1]
        assert torch.equal(image[..., :width], item.image) and not image[..., width:].any()
        assert (
            torch.equal(label[:, : width // 4], item.label)
            and (label[:, width // 4 :] == IGNORE).all()
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_users_errors_arrive_from_workers_in_one_line(tree: Path, workers: int):
    dataset = open_tree(tree)
    dataset.samples[5].image.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"town_05_leftImg8bit.jpg cannot be read") as caught:
        list(evaluation_batches(dataset, batch_size=2, num_workers=workers))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


class Deadly(SceneDataset):
    """Kills the process that reads sample 3, as long as the file `fuse` exists."""

    fuse: Path
    burns_once = True

    def __getitem__(self, key):
        if key == 3 and self.fuse.exists():
            if self.burns_once:
                self.fuse.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_dead_worker_is_replaced(tree: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,)
    )  # seconds; else 5
    dataset = Deadly(open_tree(tree).samples, CITYSCAPES, height=32)
    dataset.fuse = tmp_path / "fuse"
    expected = content(evaluation_batches(dataset))
    dataset.fuse.touch()
    assert content(evaluation_batches(dataset, num_workers=2)) == expected
    assert "a data-loading worker died" in capsys.readouterr().err
    dataset.fuse.touch()
    dataset.burns_once = False
    with pytest.raises(UserError, match="workers keep dying"):
        list(evaluation_batches(dataset, num_workers=2))


class Buggy(SceneDataset):
    error: type[Exception]

    def __getitem__(self, key):
        raise self.error("a bug")


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_stays_one(tree: Path, error, workers):
    dataset = Buggy(open_tree(tree).samples, CITYSCAPES, height=32)
    dataset.error = error
    with pytest.raises(error, match="a bug"):
        list(evaluation_batches(dataset, num_workers=workers))


# --- cache


def cached(tree: Path, folder: Path, **options) -> SceneDataset:
    return open_tree(tree, cache=True, cache_dir=folder, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(sizes, min_size=1, max_size=4),
    height=st.integers(32, 48),
    kind=st.sampled_from(["Train", ""]),
)
def test_cache_equals_direct_reading(tmp_path_factory, sizes, height, kind):
    root = tmp_path_factory.mktemp("cache")
    for i, size in enumerate(sizes):
        write_scene(
            root, f"town_{i}", size, kind=f"label{kind}Ids", extension="jpg" if i % 2 else "png"
        )
    augment = Augmentation(seed=height)
    direct = open_tree(root, height=height, augment=augment)
    stored = cached(root, root / "cache", height=height, augment=augment)
    assert stored.cache and len(stored.cache) == len(sizes)
    for i in range(len(sizes)):
        for key in (i, (1, i), (2, i)):
            assert all(
                torch.equal(a, b) for a, b in zip(direct[key][:2], stored[key][:2], strict=True)
            )
        assert direct[i].image.shape == (3, *direct.size(i))


def test_cache_is_reused_until_a_file_or_a_setting_changes(tree: Path, tmp_path: Path, capsys):
    folder = tmp_path / "cache"
    first = cached(tree, folder)
    assert "keeping 9 resized images" in capsys.readouterr().err
    (name,) = names(folder)
    before = (folder / name).stat().st_ino
    assert torch.equal(cached(tree, folder)[4].image, first[4].image)
    assert (folder / name).stat().st_ino == before and "keeping" not in capsys.readouterr().err

    image = first.samples[4].image
    stat = image.stat()
    write(image, np.full((64, 96, 3), 50))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = cached(tree, folder)
    assert (changed[4].image == 50).all()
    assert len(names(folder)) == 1 and names(folder) != [name], "the outdated cache is replaced"
    assert first[4].image.float().std() > 1, "who still reads the outdated one may go on"

    (name,) = names(folder)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    cached(tree, folder)
    assert names(folder) != [name], "the time alone makes a file another"

    cached(tree, folder, height=48)
    cached(tree, folder, every=2)
    assert len(names(folder)) == 3


def test_truncated_cache_is_built_again(tree: Path, tmp_path: Path):
    dataset = cached(tree, tmp_path)
    path = dataset.cache.path
    whole = path.read_bytes()
    empty = whole[:8] + bytes(8) + whole[16:]
    for damage in (whole[:-1], whole + b"x", whole[:30], whole[:10], b"", b"x" * len(whole), empty):
        path.unlink()
        path.write_bytes(damage)
        with pytest.raises(ValueError):
            Cache(path)
        assert cached(tree, tmp_path).cache.path.read_bytes() == whole


@pytest.mark.parametrize("full", [False, True])
def test_a_worker_maps_the_same_cache(tree: Path, tmp_path: Path, full: bool):
    """As macOS starts workers: the data set is pickled, its images are not."""
    dataset = cached(tree, tmp_path, full_labels=full)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000 < dataset.cache.path.stat().st_size
    other = pickle.loads(pickled)
    assert isinstance(other.cache._bytes.base, np.memmap)
    for found, expected in zip(other[3][:2], dataset[3][:2], strict=True):
        assert found.dtype == torch.uint8 and torch.equal(found, expected)
    assert dataset[3].label.shape[-2:] == (dataset[3].image.shape[-2:] if full else (8, 12))


def test_full_disk_falls_back_to_the_files(tree: Path, tmp_path: Path, capsys):
    """A real write error: the process may not write files over 20 000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        dataset = cached(tree, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert dataset.cache is None and dataset[0].image.shape == (3, 32, 48)
    error = capsys.readouterr().err
    assert os.strerror(errno.EFBIG) in error and "reading the image files directly" in error
    assert names(tmp_path / "cache") == []


def test_too_little_space_and_a_folder_that_cannot_be_made(
    tree: Path, tmp_path: Path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    assert cached(tree, tmp_path / "file/cache").cache is None
    assert "Not a directory" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    assert cached(tree, tmp_path / "cache").cache is None
    assert "and 2.0 MB are free" in capsys.readouterr().err
    assert names(tmp_path / "cache") == []


def test_broken_file_stops_the_build_and_leaves_nothing(tree: Path, tmp_path: Path):
    label = next((tree / "gtFine").rglob("town_06*"))
    write(label, np.full((64, 96), 77))
    with pytest.raises(UserError, match="town_06"):
        cached(tree, tmp_path / "cache")
    assert names(tmp_path / "cache") == []


BUILD = """
import sys, time
from pathlib import Path
from datasets import open_split
from datasets.scenes import SceneDataset

tree, folder, gate = map(Path, sys.argv[1:])
read = SceneDataset.read

def read_once_the_gate_is_open(self, index):
    while not gate.exists():
        time.sleep(0.01)
    return read(self, index)

SceneDataset.read = read_once_the_gate_is_open
dataset = open_split("cityscapes", tree, "train", height=32, cache_dir=folder)
print(dataset.cache.path.stat().st_ino)
"""


@pytest.fixture
def start_build(tree: Path, tmp_path: Path):
    """Starts processes that build a cache of `tree` in tmp_path/cache, once tmp_path/gate exists."""
    processes = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, tree, tmp_path / "cache", tmp_path / "gate"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_killed_build_leaves_nothing_that_counts(tree: Path, tmp_path: Path, start_build):
    folder = tmp_path / "cache"
    process = start_build()
    assert "keeping 9 resized images" in process.stderr.readline()
    process.kill()
    process.communicate()
    assert [name.rsplit(".", 1)[1] for name in names(folder)] == ["part"]
    stored, direct = cached(tree, folder), open_tree(tree)
    assert [name.rsplit(".", 1)[1] for name in names(folder)] == ["bin"], "the remains are gone"
    assert all(torch.equal(stored[i].image, direct[i].image) for i in range(9))


def test_two_builders_at_once_make_one_cache(tmp_path: Path, start_build):
    processes = start_build(), start_build()
    notes = [process.stderr.readline() for process in processes]
    assert sorted(note.split()[1] for note in notes) == ["keeping", "waiting"]
    (tmp_path / "gate").touch()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and len(names(tmp_path / "cache")) == 1


def test_files_below_a_folder(tmp_path: Path) -> None:
    """Through links, but not round and round; hidden ones are none of ours."""
    for name in ("a.png", ".b.png", ".hidden/c.png", "one/d.png", "two/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "one/ring").symlink_to(tmp_path)
    (tmp_path / "one/link").symlink_to(tmp_path / "two")
    (tmp_path / "two/back").symlink_to(tmp_path / "one")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path))
    assert found == ["a.png", "one/d.png", "one/link/e.png", "two/back/d.png", "two/e.png"]
    assert list(files_below(tmp_path / "nowhere")) == []


def test_own_names_and_classes(tmp_path: Path) -> None:
    for name in ("photos/a.jpg", "masks/a_mask.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name)
    (sample,) = pair_folders(
        tmp_path, "photos", "masks", image_suffix="", label_suffix="_mask", encoding="label_ids"
    ).samples
    assert sample.label == tmp_path / "masks/a_mask.png" and sample.encoding == "label_ids"
    with pytest.raises(ValueError, match="2 palette for 2 classes and ignore"):
        Classes("mine", ("road", "sky"), colormap(2), None, (0, 1, 255))
    for ids, ignored in (((0, 256, 255), ()), ((0, 1, 255), (-1,))):
        with pytest.raises(ValueError, match=r"mine: label id .* does not fit into a byte"):
            Classes("mine", ("road", "sky"), colormap(3), None, ids, ignored)


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are UTF-8")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """As archives of old have them."""
    label = write_scene(tmp_path, "town_0")
    (image,) = tmp_path.rglob("*_leftImg8bit.png")
    name = os.fsdecode(b"caf\xe9")
    label.rename(label.with_name(f"{name}_gtFine_labelTrainIds.png"))
    image.rename(image.with_name(f"{name}_leftImg8bit.png"))
    found = open_tree(tmp_path, cache=True, cache_dir=tmp_path / "cache")
    assert found.cache is not None and len(found.identity()) == 20
