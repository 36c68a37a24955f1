"""Every architecture: recognised by its keys, loaded from published files, taught by any other."""

from pathlib import Path

import pytest
import torch

from datasets.classes import CITYSCAPES
from errors import UserError
from models import MODELS, create_model, load_model, start_from
from models.distillation.methods import METHODS
from models.factory import recognise
from tests.golden_data import seed

State = dict[str, torch.Tensor]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recognised_by_its_keys(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
    lacking = {key: v for key, v in state.items() if not key.startswith(("norm1.", "neck."))}
    assert recognise(state) == recognise(lacking) == name


@pytest.mark.parametrize("name", ["pvt_v2_b0", "lvt"])
def test_published_files_load(name: str, tmp_path: Path) -> None:
    expected = seed(create_model(name, 12)).eval()
    state = {f"module.student.{key}": value for key, value in expected.state_dict().items()}
    beside = {"module.skfs.0.conv1.0.weight": torch.zeros(64, 256, 1, 1)}
    torch.save({"state_dict": state | beside}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth")
    assert (model.name, model.num_classes) == (name, 12)
    images = torch.rand(1, 3, 65, 98)
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected(images).logits)


HEAD = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
LAST_NORM = {"norm.weight": torch.zeros(256), "norm.bias": torch.zeros(256)}


@pytest.mark.parametrize(
    ("name", "prefix", "others"),
    [
        ("segformer_b0", "", HEAD),
        ("segformer_b0", "", {}),
        ("pvt_v2_b0", "", HEAD),
        ("lvt", "backbone.", HEAD | LAST_NORM),
    ],
)
def test_imagenet_encoders(name: str, prefix: str, others: State, tmp_path: Path) -> None:
    """As their authors publish them, with ImageNet's classifier, and LVT's last norm."""
    path, heads = tmp_path / "w.pth", ("linear_", "neck.", "head.")
    source, target = seed(create_model(name)).state_dict(), create_model(name)
    encoder = {key: value for key, value in source.items() if not key.startswith(heads)}
    bare = {prefix + key.removeprefix("backbone."): value for key, value in encoder.items()}
    torch.save({"model": bare | others}, path)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    assert start_from(target, path) is False
    for key, value in target.state_dict().items():
        assert torch.equal(value, encoder.get(key, before[key])), key
    with pytest.raises(UserError, match=f"{name}'s encoder without a decode head"):
        load_model(path)
    with pytest.raises(UserError, match=f"it looks like {name}"):
        start_from(create_model("segformer_b1"), path)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("segformer_b0", "pvt_v2_b1"), ("pvt_v2_b0", "segformer_b1"), ("lvt", "pvt_v2_b1")],
)
def test_any_pair_is_distilled(student: str, teacher: str) -> None:
    """On an odd size, with the method that needs most of the student; every parameter learns."""
    network = create_model(teacher).eval()
    build = METHODS["transkd_ea"].build
    distiller = build(create_model(student), network.channels, CITYSCAPES.weights).train()
    images, labels = torch.rand(2, 3, 65, 98), torch.randint(0, 19, (2, 17, 25))
    with torch.no_grad():
        taught = network(images, logits=distiller.needs_teacher_logits)
    losses = distiller(images, labels, taught)
    assert list(losses) == ["ce", "hcl", "embed1", "embed2", "embed3", "embed4"]
    sum(losses.values()).backward()
    for key, parameter in distiller.named_parameters():
        unused = ".fc1.0." in key and "skfs" in key  # CSF's squeeze for a batch of one
        assert (parameter.grad is None) == unused, key
        assert unused or torch.isfinite(parameter.grad).all(), key
