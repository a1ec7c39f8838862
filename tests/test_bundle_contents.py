"""Bundles are complete: networks of libraries, class names, preprocessing, provenance."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from demur import Classifier, DemurError, wrap
from demur.classifier import Preprocess, Provenance
from demur.data.images import ImageSet
from demur.data.splits import without
from demur.defenses import ConfidenceThreshold, DeepNeuralRejection, GaussianBlur
from demur.defenses.descriptions import leaf_of
from demur.defenses.saving import CONFIG, WEIGHTS
from demur.files import file_digest
from demur.loading import fingerprint_of, load_model, save_model
from demur.networks import timm_network, torchvision_network
from demur.networks.heads import find_head, replace_head

TINY = "test_resnet.r160_in1k"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PREPROCESS = Preprocess((64, 64), 70, "bicubic", MEAN, STD)


def library_classifier(tmp_path, source):
    """A model of a library with random weights, from a file of them."""
    prefix, _, name = source.partition(":")
    builder = timm_network if prefix == "timm" else torchvision_network
    network = builder(name, 5, {})
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    given = replace(PREPROCESS, size=(160, 160), resize=None)
    return load_model(source, checkpoint=tmp_path / "weights.safetensors", preprocess=given)


def images(count=4, side=160, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("source", [f"timm:{TINY}", "torchvision:shufflenet_v2_x0_5"])
def test_a_bundle_of_a_librarys_network_loads_without_it(tmp_path, source):
    classifier = library_classifier(tmp_path, source)
    classifier.class_names = tuple("abcde")
    defended = ConfidenceThreshold(GaussianBlur(classifier, 5, 1.0), 5, threshold=0.21)
    scores = defended.scores(images())
    defended.save(tmp_path / "b")
    again = load_model(tmp_path / "b")
    assert torch.equal(again.scores(images()), scores)
    assert again.class_names == tuple("abcde")  # those of the classifier inside
    assert again.preprocess == classifier.preprocess and again.preprocess.mean == MEAN
    assert again.threshold == defended.threshold
    assert fingerprint_of(again) == fingerprint_of(load_model(tmp_path / "b"))
    save_model(again, tmp_path / "c")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


def test_normalisation_and_a_moved_reject_column_are_in_the_bundle(tmp_path):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    made = wrap(network, num_classes=3, preprocess=PREPROCESS, class_names=tuple("abc"))
    made.module.reject_column = 1
    made._columns.value = True
    save_model(made, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["network"]["adapted"]["reject_column"] == 1
    again = load_model(tmp_path, network)
    assert torch.equal(again.scores(images(side=64)), made.scores(images(side=64)))
    assert again.rejects and again.class_names == tuple("abc") and again.preprocess == PREPROCESS


def test_a_bundle_of_the_users_code_loads_with_that_code(tmp_path):
    text = "from torch import nn\n\ndef make(width=3):\n    return nn.Sequential(nn.Flatten(), "
    (tmp_path / "net.py").write_text(text + "nn.Linear(12, width))\n")
    source = f"py:{tmp_path / 'net.py'}:make"
    made = load_model(source, num_classes=3)
    save_model(made, tmp_path / "b")
    again = load_model(tmp_path / "b", arch=source)
    assert torch.equal(again.scores(images(side=2)), made.scores(images(side=2)))
    with pytest.raises(DemurError, match="do not fit"):
        load_model(tmp_path / "b", arch=source, model_kwargs={"width": 4})
    with pytest.raises(DemurError, match="--arch py:"):
        load_model(tmp_path / "b")
    with pytest.raises(DemurError, match="arch of a bundle is py:"):
        load_model(tmp_path / "b", arch="timm:resnet18")


def test_a_changed_head_is_in_the_bundle(tmp_path):
    for network in (torchvision_network("squeezenet1_1", 5, {}), nn.Sequential(nn.Linear(3, 5))):
        known = hasattr(network, "architecture")
        shown = images(1, 64) if known else torch.rand(1, 3)
        head = {"path": find_head(network, shown, 5), "outputs": 6}
        before = network.eval()(shown)
        replace_head(network, head)
        assert torch.equal(network.eval()(shown)[:, :5], before)
        assert network(shown).shape == (1, 6)
        fresh = None
        if known:
            network.architecture = {**network.architecture, "head": head}
        else:
            network.changed_head = head
            fresh = nn.Sequential(nn.Linear(3, 5))
        save_model(Classifier(network, 5), tmp_path)
        again = load_model(tmp_path, fresh)
        assert torch.equal(again(shown), network(shown))


def test_provenance_comes_back_and_its_images_are_known(tmp_path):
    """R17."""
    pixels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(-1, 3, 2, 2)
    data = ImageSet(pixels.clone(), torch.tensor([0, 1, 2] * 4), tuple("abc"))
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 3)
    classifier.provenance = Provenance(
        "py:x", "0" * 32, "photos", "1" * 32, "2" * 32, {"with": ["a"]}, data.hashes[:5]
    )
    before = fingerprint_of(classifier)
    save_model(classifier, tmp_path)
    again = load_model(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    assert again.provenance == classifier.provenance
    rest, left_out = without(data, again.provenance.images)
    assert left_out == 5 and len(rest) == 7
    classifier.provenance = None  # it changes no score
    assert fingerprint_of(classifier) == before


def spoiled(folder, change, tensors=None):
    config = json.loads((folder / CONFIG).read_text())
    if tensors is not None:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file(stored, folder / WEIGHTS)
        config["sha256"] = file_digest(folder / WEIGHTS)
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("class_names", ["a"], "must be 5 names"),
        ("class_names", [1, 2, 3, 4, 5], "must be 5 names"),
        ("preprocess", {"size": [8, 8]}, "must have the parts"),
        ("preprocess", "size", "sizes between 1 and 16,384"),
        ("provenance", {"base": "x"}, "other parts"),
        ("network", {"name": "timm_network", "arguments": {}}, "cannot be built"),
    ],
)
def test_contents_that_do_not_fit_are_refused_in_one_line(tmp_path, key, value, said):
    classifier = library_classifier(tmp_path, "torchvision:shufflenet_v2_x0_5")
    save_model(classifier, tmp_path / "b")

    def change(config):
        if value == "size":
            config["preprocess"]["size"] = [10**9, 10**9]
        elif key == "network":
            config["network"]["network"] = value
        else:
            config[key] = value

    spoiled(tmp_path / "b", change)
    with pytest.raises(DemurError, match=said) as error:
        load_model(tmp_path / "b")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_outputs": 10**9}, "above the limit of 65,536"),
        ({"num_outputs": 60_000}, "do not fit"),  # refused before there is memory for them
        ({"options": {"width": [1e12]}}, "above the limit"),
        ({"options": {"weights": "DEFAULT"}}, "no option 'weights'"),
        ({"options": {"norm_layer": {"x": 1}}}, "no option 'norm_layer'"),
        ({"name": "../../x"}, "no classifier"),
        ({"name": "fcn_resnet50"}, "no classifier"),
    ],
)
def test_networks_that_a_stranger_describes_are_bounded(tmp_path, arguments, said):
    classifier = library_classifier(tmp_path, "torchvision:shufflenet_v2_x0_5")
    save_model(classifier, tmp_path / "b")
    spoiled(
        tmp_path / "b", lambda config: config["network"]["network"]["arguments"].update(arguments)
    )
    with pytest.raises(DemurError, match=said):
        load_model(tmp_path / "b")


def test_the_leaf_is_the_network_inside_all_wrappers():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    classifier = wrap(network, num_classes=3)
    deep = DeepNeuralRejection(GaussianBlur(classifier, 3), 3, ["module.network.module.network.1"])
    assert leaf_of(deep) is network
