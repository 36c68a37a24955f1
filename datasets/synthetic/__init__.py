"""A small procedural road-scene data set in the layout of Cityscapes or ACDC; nothing to download.

    python -m datasets.synthetic --output data/synthetic --train 400 --val 80
    python -m datasets.synthetic --output data/weather --dataset ACDC

How a picture comes about: a street is laid out in metres (`Street`) and seen through a pinhole camera behind
a windscreen. Its polygons are painted far to near into one buffer of face numbers (`Canvas`). Then all pixels
are shaded at once (`Pixels`): the plane of a pixel's face gives its depth and its place on the surface, those
give texture, windows, light, shadow, fog and snow. Images are drawn at twice their size and averaged down,
labels are every other pixel. Colours are drawn anew for every object and shared between classes, so that
shape, place and texture tell classes apart and colour alone does not.
"""

from datasets.synthetic.writing import Options, draw_dataset, write_dataset

__all__ = ["Options", "main", "write_dataset"]


def main(options: Options) -> None:
    """The command. It stands here because the text above is what its --help shows."""
    draw_dataset(options, progress=True)
