"""Parameters and multiply-accumulates against the published ones, and the command that prints
them."""

from collections import Counter

import pytest
import torch

from errors import UserError
from models.info import Options, build, count_macs, executed_macs, main, published_macs
from tests.golden_data import METHODS, PLAIN, load, unseeded

PAPER = {  # parameters, GFLOPs as the paper's tables round them
    "segformer_b2": (27_362_004, "113.84"),
    "segformer_b0": (3_719_284, "13.67"),
    "TransKDBase": (4_563_124, "16.47"),
    "TransKD_GL": (5_219_254, "16.80"),
    "TransKD_EA": (5_534_076, "17.84"),
}


def cityscapes() -> torch.Tensor:
    return torch.empty(1, 3, 512, 1024, device="meta")


@pytest.mark.parametrize("name", [*PLAIN, *METHODS])
def test_macs_are_the_published_ones(name: str) -> None:
    """In all, and of every kind of layer."""
    golden = load("gflops.json")[name]
    with torch.device("meta"):
        module = unseeded(name).eval()
    counts = count_macs(module, cityscapes())
    assert counts.total() == golden["macs_total"]
    kinds: Counter[str] = Counter()
    for layer, macs in counts.items():
        bases = type(module.get_submodule(layer)).__mro__
        kinds[next(base.__name__ for base in bases if base.__module__.startswith("torch"))] += macs
    assert +kinds == golden["by_type"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name: str) -> None:
    with torch.device("meta"):
        module = build(name)
    assert sum(p.numel() for p in module.parameters()) == PAPER[name][0]
    assert f"{published_macs(module, cityscapes()) / 1e9:.2f}" == PAPER[name][1]


def test_the_fast_decode_head_computes_less() -> None:
    """As `AllMLPHead` says, of an image of 512×1024."""
    with torch.device("meta"):
        model = build("segformer_b0")
    count_macs(model, cityscapes())  # which leaves the model as it was
    assert executed_macs(model, cityscapes()) == pytest.approx(9.2e9, rel=0.01)
    model.head.forward = model.head.plain
    assert executed_macs(model, cityscapes()) == pytest.approx(17.8e9, rel=0.01)


def test_a_table_with_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    main(Options(("TransKD_EA",), height=64, width=128, measure=True, batch_size=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    name, count, published, executed, ms, rate, memory = lines[2].split()
    assert (name, count, memory) == ("TransKD_EA", "5,534,076", "–")
    assert 0 < float(executed) < float(published)
    assert float(rate) == pytest.approx(2000 / float(ms), rel=0.05)
    assert lines[-1].endswith("deployed is segformer_b0 alone.")


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no model is called 'segformer_b9'"):
        main(Options(("segformer_b9",)))
    with pytest.raises(UserError, match="--height and --width must be 32 at least"):
        main(Options(("segformer_b0",), height=31))
