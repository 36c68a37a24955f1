"""How the data sets lie on disk, and which image belongs to which label.

The published code sorts the image list and the label list and zips them, so one missing file shifts
every pair after it. Here a pair has the same subfolder and the same name before the suffix.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets.classes import CITYSCAPES, NYU40, VOC2012, Classes, Encoding
from datasets.samples import Sample, files_below, images_below, restrict
from errors import UserError

SUBSETS = ("train", "val", "test")


@dataclass(frozen=True)
class Layout:
    """Where images and labels lie, and what they are called.

    In the folders and the list, {subset} stands for a split and {condition} for a weather.

    Attributes:
        label_endings: how label files end, by their encoding, the preferred one first; what stands
            before it is the image's name.
        image_suffix: what stands, in an image's name, between that and .png or .jpg.
        list_file: names the images of a split where no folders tell them apart.
    """

    name: str
    classes: Classes
    images: str
    labels: str
    label_endings: dict[Encoding, str]
    image_suffix: str = ""
    list_file: str | None = None
    conditions: tuple[str | None, ...] = (None,)

    def expects(self, subset: str) -> str:
        """What a split's files must be called, in words."""
        text = f"{self.images}/**/*{self.image_suffix}.png (or .jpg)"
        text += f" and {self.labels}/**/*{' or *'.join(self.label_endings.values())}"
        text += f", named in {self.list_file}" if self.list_file else ""
        return text.replace("{subset}", subset)

    def find(self, datadir: Path, subset: str) -> tuple[list[Sample], list[Path]]:
        """The images of a split, sorted and paired with labels by name; labels without an image.

        Raises UserError if there are no images, two have one name, or the list can't be right.
        """
        parts = [self.pair(datadir, subset, condition) for condition in self.conditions]
        samples = [sample for paired, _ in parts for sample in paired]
        if self.list_file is None:
            return samples, [orphan for _, orphans in parts for orphan in orphans]
        list_file = datadir / self.list_file.format(subset=subset)
        if subset == "val" and not list_file.exists():  # NYUv2 comes with a train and a test list
            list_file = list_file.with_name("test.txt")
        return restrict(samples, list_file), []

    def pair(
        self, datadir: Path, subset: str, condition: str | None
    ) -> tuple[list[Sample], list[Path]]:
        """Pair the images and labels of one condition by their paths without endings."""
        images = datadir / self.images.format(subset=subset, condition=condition)
        labels = datadir / self.labels.format(subset=subset, condition=condition)
        label_files: dict[tuple[str, Encoding], Path] = {}
        for path in files_below(labels):
            for encoding, ending in self.label_endings.items():
                if path.name.endswith(ending):
                    key = path.relative_to(labels).as_posix().removesuffix(ending)
                    label_files[key, encoding] = path

        samples: dict[str, Sample] = {}
        for path in images_below(images):
            key = path.relative_to(images).with_suffix("").as_posix()
            key = key.removesuffix(self.image_suffix)
            if key in samples:
                raise UserError(f"{samples[key].image} and {path} have one name; keep one of them")
            encodings = [kind for kind in self.label_endings if (key, kind) in label_files]
            encoding = encodings[0] if encodings else "train_ids"
            name = path.relative_to(datadir).as_posix()
            samples[key] = Sample(path, label_files.get((key, encoding)), name, condition, encoding)
        if not samples:
            raise UserError(f"no .png or .jpg images in {images}; expected {self.expects(subset)}")
        orphans = sorted(path for (key, _), path in label_files.items() if key not in samples)
        return sorted(samples.values(), key=lambda sample: sample.name), orphans


LAYOUTS = {
    layout.name: layout
    for layout in (
        # Cordts et al., CVPR 2016: 2975 train and 500 val images of 1024×2048. For instance
        # frankfurt_000000_000294_leftImg8bit.png, frankfurt_000000_000294_gtFine_labelIds.png
        Layout(
            name="cityscapes",
            classes=CITYSCAPES,
            images="leftImg8bit/{subset}",
            labels="gtFine/{subset}",
            label_endings={
                "train_ids": "_gtFine_labelTrainIds.png",
                "label_ids": "_gtFine_labelIds.png",
            },
            image_suffix="_leftImg8bit",
        ),
        # Sakaridis et al., ICCV 2021: 400 train images of 1080×1920 a condition, and 100 / 106 /
        # 100 / 100 val. The archives' train_ref and val_ref (the same places in fair weather,
        # unlabelled) are no splits. GOPR0475_frame_000041_rgb_anon.png, …_gt_labelTrainIds.png
        Layout(
            name="ACDC",
            classes=CITYSCAPES,
            images="rgb_anon/{condition}/{subset}",
            labels="gt/{condition}/{subset}",
            label_endings={"train_ids": "_gt_labelTrainIds.png", "label_ids": "_gt_labelIds.png"},
            image_suffix="_rgb_anon",
            conditions=("fog", "night", "rain", "snow"),
        ),
        # Silberman et al., ECCV 2012: 795 train and 654 test images of 480×640.
        Layout(
            name="NYUv2",
            classes=NYU40,
            images="images",
            labels="labels40",
            label_endings={"label_ids": ".png"},
            list_file="{subset}.txt",
        ),
        # Everingham et al., IJCV 2010: 1449 val images, and 10582 train images with the labels
        # that Hariharan et al., ICCV 2011, added.
        Layout(
            name="VOC2012",
            classes=VOC2012,
            images="JPEGImages",
            labels="SegmentationClassAugRaw",
            label_endings={"label_ids": ".png"},
            list_file="ImageSets/Segmentation/{subset}.txt",
        ),
        # Yu et al., CVPR 2020: the 10k images. 0004a4c0-d4dff0ad.jpg, 0004a4c0-d4dff0ad.png
        Layout(
            name="BDD100K",
            classes=CITYSCAPES,
            images="images/10k/{subset}",
            labels="labels/sem_seg/masks/{subset}",
            label_endings={"train_ids": ".png"},
        ),
    )
}
DATASETS = tuple(LAYOUTS)
