"""Parameters and multiply-accumulates against the published ones."""

from collections import Counter

import pytest
import torch

from errors import UserError
from models.info import Options, count_macs, main
from tests.golden_data import METHODS, PLAIN, load, unseeded


@pytest.mark.parametrize("name", [*PLAIN, *METHODS])
def test_macs_are_the_published_ones(name: str) -> None:
    """In all, and of every kind of layer."""
    golden = load("gflops.json")[name]
    with torch.device("meta"):
        module = unseeded(name).eval()
        counts = count_macs(module, torch.empty(1, 3, 512, 1024))
    assert counts.total() == golden["macs_total"]
    kinds: Counter[str] = Counter()
    for layer, macs in counts.items():
        bases = type(module.get_submodule(layer)).__mro__
        kinds[next(base.__name__ for base in bases if base.__module__.startswith("torch"))] += macs
    assert +kinds == golden["by_type"]


def test_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    paper = {
        "segformer_b2": ("27,362,004", "113.84"),
        "segformer_b0": ("3,719,284", "13.67"),
        "TransKDBase": ("4,563,124", "16.47"),
        "TransKD_GL": ("5,219,254", "16.80"),
        "TransKD_EA": ("5,534,076", "17.84"),
    }
    main(Options((*paper,)))
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        name, *published, executed = line.split()
        assert paper.pop(name) == (*published,)
        assert 0 < float(executed) < float(published[1])  # by the fast decode head
        if name == "segformer_b0":
            assert float(executed) == pytest.approx(9.2, rel=0.01)  # as `AllMLPHead` says
    assert not paper


def test_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    main(Options(("TransKD_EA",), height=64, width=128, measure=True, batch_size=2, device="cpu"))
    *_, ms, rate, memory = capsys.readouterr().out.splitlines()[2].split()
    assert float(rate) == pytest.approx(2000 / float(ms), rel=0.05) and memory == "–"


def test_mistakes() -> None:
    with pytest.raises(UserError, match="it must be at least 32"):
        main(Options(("segformer_b0",), height=31))
    with pytest.raises(UserError, match="--device meta does not work here"):
        main(Options(("segformer_b0",), measure=True, device="meta"))
