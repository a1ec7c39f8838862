"""Networks for ImageNet: their preprocessing inside, their weights from files of strangers."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from demur import Classifier, DemurError, Outcome, data, outcomes
from demur.data import to_float
from demur.networks import ARCHITECTURES, CLASSES, Detector, build, imagenet_network, weights

NAME = "squeezenet1_0"  # the smallest


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return models.squeezenet1_0(weights=None).state_dict()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / weights.FOLDER).mkdir(parents=True)
    return tmp_path


def test_preprocessing_is_inside_and_as_the_file_says(state, root):
    save_file(
        {name: value.half() for name, value in state.items()},
        root / weights.FOLDER / f"{NAME}.safetensors",
    )
    network = imagenet_network(NAME, root=root)
    images = torch.rand(2, 3, 64, 64)
    plain = models.squeezenet1_0(weights=None).eval()
    plain.load_state_dict({name: value.half().float() for name, value in state.items()})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(
        network(images), plain((images - mean[:, None, None]) / std[:, None, None])
    )
    assert network.size == 224 and not network.training and len(CLASSES) == 1000
    other = root / "other.safetensors"
    about = {
        "architecture": NAME,
        "input_size": "96",
        "mean": "(0.5, 0.5, 0.5)",
        "std": "(0.5, 0.5, 0.5)",
    }
    save_file(dict(state), other, metadata=about)
    again = imagenet_network(NAME, other)
    plain.load_state_dict(state)
    torch.testing.assert_close(again(images), plain(2 * images - 1))
    assert again.size == 96


def test_weights_as_torchvision_names_them_are_found_in_the_root_and_in_torchs_cache(state, root):
    assert weights.find(NAME, root) is None
    with pytest.raises(DemurError, match=rf"no weights of {NAME}.*demur data download {NAME}"):
        imagenet_network(NAME, root=root)
    downloaded = weights.URLS[NAME].rsplit("/", 1)[1]
    cache = root / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for folder in (cache, root / weights.FOLDER):
        torch.save(state, folder / downloaded)
        assert weights.find(NAME, root) == folder / downloaded
        assert imagenet_network(NAME, root=root)(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


class _Rubbish:
    def __reduce__(self):
        return print, ("run",)


def test_weights_of_another_network_damaged_or_with_code_in_them_are_refused(state, root, capsys):
    with pytest.raises(DemurError, match="squeezenet1_0"):
        imagenet_network("squeezenet1_1")
    with pytest.raises(DemurError, match="no file"):
        imagenet_network(NAME, root / "none.pth")
    whole, cut, other = (
        root / "whole.safetensors",
        root / "cut.safetensors",
        root / "other.safetensors",
    )
    save_file(dict(state), whole)
    cut.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(DemurError, match="as a file of weights"):
        imagenet_network(NAME, cut)
    save_file(dict(state), other, metadata={"architecture": "vgg16"})
    with pytest.raises(DemurError, match="the weights of vgg16, not of squeezenet1_0"):
        imagenet_network(NAME, other)
    with pytest.raises(DemurError, match="does not have the weights of resnet18"):
        imagenet_network("resnet18", whole)
    evil = root / "evil.pth"
    evil.write_bytes(pickle.dumps(_Rubbish()))
    with pytest.raises(DemurError, match="without running code"):
        imagenet_network(NAME, evil)
    assert "run" not in capsys.readouterr().out
    torch.save([1, 2], root / "list.pth")
    with pytest.raises(DemurError, match="not a state dict"):
        imagenet_network(NAME, root / "list.pth")

    torch.save({1: torch.zeros(1)}, root / "numbers.pth")  # D25
    with pytest.raises(DemurError, match="not a state dict"):
        imagenet_network(NAME, root / "numbers.pth")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"input_size": "many"}, "invalid literal"),
        ({"input_size": "-224"}, "size must be at least 1"),
        ({"mean": "(0.5, 0.5)"}, "three numbers"),
        ({"mean": "open('x')"}, "not usable"),
        ({"mean": "[" * 5000}, "not usable"),
        ({"std": "(0.5, 0, 0.5)"}, "positive"),
        ({"std": "(0.5, 1e999, 0.5)"}, "finite"),
    ],
)
def test_d25_strange_metadata_are_one_clear_line(state, root, about, said):
    """D25"""
    save_file(dict(state), root / "strange.safetensors", metadata=about)
    with pytest.raises(DemurError, match=said) as error:
        imagenet_network(NAME, root / "strange.safetensors")
    assert "\n" not in str(error.value) and "strange.safetensors" in str(error.value)


def test_a_network_is_rebuilt_without_its_file(state, root):
    about = {"input_size": "64", "mean": "(0.5, 0.4, 0.3)", "std": "(0.5, 0.6, 0.7)"}
    save_file(dict(state), root / "own.safetensors", metadata=about)
    network = imagenet_network(NAME, root / "own.safetensors")
    (root / "own.safetensors").unlink()
    again = build(json.loads(json.dumps(network.architecture)))
    again.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), network(images)) and not again.training
    assert (again.size, again.resize) == (64, 256)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_inception_is_rebuilt_with_or_without_its_auxiliary_classifier(root, auxiliary):
    plain = models.inception_v3(weights=None, init_weights=False, aux_logits=auxiliary)
    save_file(plain.state_dict(), root / "inception.safetensors")
    network = imagenet_network("inception_v3", root / "inception.safetensors")
    assert network.architecture["arguments"]["aux_logits"] is auxiliary
    again = build(network.architecture)
    again.load_state_dict(network.state_dict())
    assert float(again.mean.max()) == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "resnet19"}, "Did you mean 'resnet18'"),
        ({"aux_logits": True}, "aux_logits"),
        ({"size": 0}, "at least 1"),
        ({"resize": 20}, "at least size"),
        ({"mean": "abc"}, "three numbers"),
        ({"std": [1, -1, 1]}, "positive"),
    ],
)
def test_a_strange_description_is_one_clear_line(change, said):
    arguments = {"name": NAME, "size": 32, "resize": 32, **change}
    with pytest.raises(DemurError, match=said):
        build({"name": "untrained_imagenet_network", "arguments": arguments})


def test_a_download_is_verified_and_nothing_is_left_of_a_wrong_one(state, root, monkeypatch):
    source = root / "source.pth"
    torch.save(state, source)
    monkeypatch.setitem(weights.URLS, NAME, (root / "squeezenet1_0-00000000.pth").as_uri())
    source.rename(root / "squeezenet1_0-00000000.pth")
    with pytest.raises(DemurError, match="cannot download"):
        weights.download(NAME, root)  # its digest is not that of its name
    assert not list((root / weights.FOLDER).iterdir())
    with pytest.raises(DemurError, match="unknown network"):
        weights.download("resnet1", root)


def test_every_architecture_has_weights_to_download_and_inception_is_built_as_it_is_trained():
    assert set(ARCHITECTURES) < set(weights.URLS)
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            network = architecture.build(weights=None, **dict(architecture.options))
        assert sum(parameter.numel() for parameter in network.parameters()) > 1e6, name


def test_the_detector_gives_boxes_in_the_images_pixels(root):
    torch.manual_seed(0)
    network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    save_file(
        network.state_dict(), root / weights.FOLDER / "ssdlite320_mobilenet_v3_large.safetensors"
    )
    images = [torch.rand(3, 90, 120), torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)]
    found = Detector(root=root).boxes(images, threshold=0.99)
    assert len(found) == 2
    for image, boxes in zip(images, found, strict=True):
        assert len(boxes) <= 1
        data.photos.check_boxes(boxes, (image.shape[1], image.shape[2]), "image")
    with pytest.raises(DemurError, match="ssdlite320"):
        Detector(root=root / "elsewhere")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_packed_weights_recognise_the_packed_photographs(data_root, name):
    """The packed README's top-1 on the first hundred: 77 and 80."""
    network = imagenet_network(name, root=data_root)
    photos = [
        data.fitted(photo, network.resize, network.size)
        for photo in data.read_photos(data_root / "imagenet" / "photos", count=9)
    ]
    images = to_float(torch.stack([photo.pixels for photo in photos]))
    found = outcomes(
        Classifier(network, 1000), images, torch.tensor([photo.label for photo in photos])
    )
    assert int((found == Outcome.CORRECT).sum()) >= 5  # these nine are harder than most
