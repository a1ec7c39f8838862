"""The smoothing experiment, end to end on the embedded digits and synthetic photographs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as architectures

from command import check_interruption, check_refusal
from demur import Classifier, Outcome, outcomes
from demur.commands.run import STUDIES, run
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read, read_gallery
from demur.experiments.smoothing import filters, tuning
from demur.networks import imagenet_network, weights
from demur.report import render

TINY = """
gallery = 12
attack = { images = 24, targeted_steps = 40, steps = 5 }
strongest = { images = 10, steps = 3, n_targets = 1, n_queries = 10 }

[[sets]]
name = "digits"
data = ["digits"]
train_images = 500
epochs = 2
batch_size = 32
gaussian = [1.0, 1.5]
median = [3]
eps = 0.1
"""
MORE = """
[photographs]
networks = ["vgg16", "squeezenet1_0"]
images = 3
steps = 3

[tuning]
data = ["own.npz"]
network = "squeezenet1_0"
size = 40
train_images = 20
epochs = 1
batch_size = 10
images = 6
eps = 0.02
steps = 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs with random weights to look at them, and small colour images to tune to."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "imagenet" / "photos"
    folder.mkdir(parents=True)
    (root / weights.FOLDER).mkdir()
    torch.manual_seed(0)
    about = {"input_size": "64"}
    save_file(
        architectures.squeezenet1_0(weights=None).state_dict(),
        root / weights.FOLDER / "squeezenet1_0.safetensors",
        metadata=about,
    )
    entries = {}
    for number, name in enumerate(("one", "two", "three")):
        Image.fromarray(torch.randint(0, 256, (80, 100, 3), dtype=torch.uint8).numpy()).save(
            folder / f"{name}.png"
        )
        entries[f"{name}.png"] = {"class_index": number}
    folder.with_name("photos.json").write_text(json.dumps(entries))
    random = np.random.default_rng(0)
    np.savez(
        root / "own.npz",
        images=random.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8),
        labels=np.arange(60) % 3,
    )
    return root


@pytest.fixture(scope="module")
def profile(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY + MORE.replace("own.npz", str(root / "own.npz")))
    return str(path)


@pytest.fixture(scope="module")
def folder(profile, root, tmp_path_factory):
    return run("smoothing", profile, data_root=root, out=tmp_path_factory.mktemp("runs") / "whole")


def figures(results, title):
    table = next(one for one in results.tables if one.title.startswith(title))
    return {(row.group, row.row, row.column): row.measured for row in table.rows}


def test_a_run_ranks_the_filters_both_ways_and_says_whether_smoothing_defends(folder):
    results = read(folder)
    ranked = figures(results, "Filters, ranked")
    names = ["no filter", "Gaussian, sigma 1", "Gaussian, sigma 1.5", "median, 3x3"]
    for column, rank in (
        ("accuracy x distance", "rank by the product"),
        ("robust accuracy", "rank by robust accuracy"),
    ):
        values = {name: ranked["digits", name, column] for name in names}
        best = max(values, key=values.get)
        assert ranked["digits", best, rank] == 1 and all(
            1 <= ranked["digits", name, rank] <= 4 for name in names
        )
    for name in names:
        product = ranked["digits", name, "clean accuracy"] / 100 * ranked["digits", name, "mean L2"]
        assert ranked["digits", name, "accuracy x distance"] == pytest.approx(product)
    assert any("under the defence-unaware attacker" in line for line in results.summary)
    assert results.curves[0].x == [0, 1, 1.5] and len(results.curves[0].series) == 3
    page = render(folder).read_text()
    assert "demur run smoothing" in page and "NaN" not in page


def test_the_worst_case_counts_whatever_any_attacker_found(folder):
    """R13, R24."""
    found = figures(read(folder), "Wrong answers under each attacker")
    for name in ("no filter", "Gaussian, sigma 1", "Gaussian, sigma 1.5", "median, 3x3"):
        assert found["digits", name, "worst of all"] >= found["digits", name, "strongest ensemble"]
    assert ("digits", "median, 3x3", "BPDA, box") in found and (
        "digits",
        "Gaussian, sigma 1",
        "BPDA, box",
    ) not in found


def test_photographs_go_from_network_to_network_and_tuning_is_attacked_both_ways(folder):
    results = read(folder)
    hard, transfer = (
        figures(results, "Photographs: which network"),
        figures(results, "Photographs: transfer"),
    )
    assert (
        hard["", "squeezenet1_0", "layers"] == 26
        and ("", "squeezenet1_0", "squeezenet1_0") in transfer
    )
    tuned = figures(results, "Transfer learning")
    assert {group for group, _, _ in tuned} == {"all layers", "last layer"} and len(
        tuned
    ) == 2 * 2 * 3
    note = next(one.note for one in results.tables if one.title.startswith("Photographs: which"))
    assert "No weights of vgg16" in note
    pictures, original, attacked = read_gallery(folder)
    assert {picture.model for picture in pictures} >= {
        "squeezenet1_0",
        "digits, no filter",
    } and original.shape == attacked.shape


def test_the_defence_unaware_attacker_sees_the_network_behind_the_filter_and_the_others_the_whole():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    model = filters.Model(
        "median, 3x3", filters.behind("median", 3, network, 3).eval(), network, "key"
    )
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(
        filters.attacked_through(model, filters.IGNORES, 3)(images), network(images)
    )
    for attacker in (filters.THROUGH, filters.IDENTITY, filters.BOX):
        torch.testing.assert_close(
            filters.attacked_through(model, attacker, 3)(images), model.whole(images)
        )
    gradients = []
    for attacker in (filters.THROUGH, filters.IDENTITY, filters.BOX):
        given = images.clone().requires_grad_()
        filters.attacked_through(model, attacker, 3)(given)[:, 0].sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(
        gradients[1], network[1].weight[0].detach().view(1, 1, 8, 8).expand(4, -1, -1, -1)
    )
    assert not torch.allclose(gradients[0], gradients[1]) and not torch.allclose(
        gradients[1], gradients[2]
    )


def test_only_the_last_layer_changes_where_only_it_is_tuned(root):
    public = imagenet_network("squeezenet1_0", root=root)
    tuned = tuning.new_head(public, 3, seed=0)
    assert tuned(torch.rand(2, 3, 64, 64)).shape == (2, 3) and public(
        torch.rand(2, 3, 64, 64)
    ).shape == (2, 1000)
    again = tuning.new_head(public, 3, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True)
    )
    with torch.device("meta"):
        dense = architectures.resnet18(weights=None)
    assert tuning._last(dense)[0] == "fc"


def test_the_targets_are_other_classes_drawn_by_image():
    """R10."""
    from demur import data

    images = data.load("digits", "test").sample(40, 0)
    targets = filters.other_classes(images, 0)
    assert bool((targets != images.labels).all()) and len(set(targets.tolist())) > 5
    index = torch.tensor([7, 3])
    assert torch.equal(filters.other_classes(images.subset(index), 0), targets[index])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("median = [3]", "median = [4]"), r"profile [^ ]*: sets\.0\.median\.0: must be odd\.$"),
        (
            ("strongest =", "stronger ="),
            r": stronger: there is no such key \(did you mean 'strongest'\?\); "
            r"strongest: it is missing\.$",
        ),
        (("gaussian = [1.0, 1.5]", "gaussian = [0.0, 1.5]"), "greater than 0"),
        (("gaussian = [1.0, 1.5]", "gaussian = [1.0, 11.0]"), "sigma 11 reaches 33 pixels"),
        (("median = [3]", "median = [57]"), "must be at most 15"),
        (("images = 10,", "images = 100,"), "cannot be more than attack.images"),
        (("epochs = 2", "epoch = 2"), "did you mean 'epochs'"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(tmp_path, changed, said):
    check_refusal("smoothing", TINY.replace(*changed), said, tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_that_come_along_fit(name):
    assert load_profile(STUDIES["smoothing"], name).sets


def test_an_interrupted_run_ends_with_the_same_figures(
    profile, root, folder, tmp_path, monkeypatch
):
    """R10."""
    check_interruption(
        "smoothing",
        profile,
        root,
        folder,
        tmp_path / "again",
        monkeypatch,
        filters,
        "_targeted_cell",
    )


def test_defences_nest():
    """A filter under another defence is part of the classifier for every attacker."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    smooth = filters.behind(
        "gaussian", 1.0, network, 3
    ).eval()  # four columns: the last one rejects
    outer = filters.behind("median", 3, Classifier(smooth, 3), 3).eval()
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    assert outer(images).shape == (6, 4) and set(outcomes(outer, images, labels).tolist()) <= {
        int(one) for one in Outcome
    }
