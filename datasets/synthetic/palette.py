"""The numbers of the classes, and the colours that things may have."""

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN = (
    range(10)
)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
IGNORE = 255

Colour = tuple[float, float, float]  # RGB in 0..1


def rgb(text: str) -> tuple[Colour, ...]:
    """Colours from hexadecimal numbers."""
    return tuple(
        (int(t[:2], 16) / 255, int(t[2:4], 16) / 255, int(t[4:], 16) / 255) for t in text.split()
    )


def scaled(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return (red * factor, green * factor, blue * factor)


# What a thing's colour is drawn from.
PLASTER = rgb("bfb399 99543f 9e9991 ccb880 736b66 d9d6cc 8c99a8 b8856b a86850 c9a88c 8f8a70")
ROOFS = rgb("733d2e 4d4747 5c4d42")
GLASSES = rgb("29303b 475461 66788a")
METALS = rgb("6b7073 333b38 99998f")
PAINTS = rgb(
    "16171e 2a2c30 4d4f54 8a8d91 b0b2b5 dcdcd8 f0efea 8c1c1c 1d3a6e 2f5d8c 1f4a33 7a6a4f 5e1f2b b5651d"
)
CLOTHES = rgb("1a1a20 2b3350 4a4a4a 7a6a58 8c2f2f 2f5a44 c8c4b8 3f5f8a b08040 6a4a6a d0d0d4 25303a")
LEAF = rgb("42692b 58732d 325428 486440 8a702a 7c4a2a 50783a")
BARK = rgb("4d4033 5e5548")
SKIN = rgb("d9a88c b38061 6b4733")
GRASS = rgb("4d662e 616b33 73664c 80735c")
SLABS = rgb("807d78 948070 6b6b6b 9e9989")
FENCES = rgb("333833 735438 999999 d9d9d1 244733")
SIGNALS = rgb("ff1f1a ffb31a 26f273")  # of a traffic light, from the top

WHITE, RED, BLUE, YELLOW, GREEN, BLACK = rgb("eceae6 c21a1f 1a409e ebb81a 146640 17181a")
AMBER, LAMP, TYRE, GLASS, STEEL, HAZE = rgb("ff991a ffd999 121214 21282f 6b6e70 80858c")
