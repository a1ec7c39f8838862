"""The smoothing study on small plans: the embedded digits, and synthetic photographs."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as architectures

from command import check_interruption, check_refusal, without_pictures
from demur import Classifier, DemurError, Outcome, data, outcomes, seeds
from demur.attacks.base import Attack
from demur.commands.run import STUDIES, run
from demur.defenses import GaussianBlur, MedianBlur
from demur.evaluation import scoring
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import SCHEMA
from demur.evaluation.results import read, read_gallery
from demur.evaluation.shares import ATTACKED_BY, FRONT
from demur.networks import imagenet_network, weights
from demur.report import render
from demur.studies.public import new_head
from demur.studies.reported import beside, read_reported
from demur.studies.smoothing import plan, tables
from demur.studies.smoothing.plan import other_classes
from demur.studies.smoothing.recipes import StandIn, WithoutFilter

NAMES = ("no filter", "Gaussian, sigma 1", "median, 3x3")
TINY = """
gallery = 12
attack = { images = 8, targeted_steps = 12, steps = 2 }
strongest = { images = 5, steps = 1, n_targets = 1, n_queries = 2 }

[[sets]]
name = "digits"
data = ["digits"]
train_images = 200
epochs = 1
batch_size = 32
gaussian = [1.0]
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


@pytest.mark.slow
def test_a_run_ranks_the_filters_both_ways_and_says_whether_smoothing_defends(folder):
    results = read(folder)
    ranked = figures(results, "Filters, ranked")
    for column, rank in (
        ("accuracy x distance", "rank by the product"),
        ("robust accuracy", "rank by robust accuracy"),
    ):
        values = {name: ranked["digits", name, column] or 0 for name in NAMES}
        best = max(values, key=values.get)
        assert ranked["digits", best, rank] == 1
    for name in NAMES:
        distance = ranked["digits", name, "mean L2"]
        if distance is None:
            assert ranked["digits", name, "accuracy x distance"] is None
            continue
        product = ranked["digits", name, "clean accuracy"] / 100 * distance
        assert ranked["digits", name, "accuracy x distance"] == pytest.approx(product)
    assert any("under the defence-unaware attacker" in line for line in results.summary)
    assert results.curves[0].x == [0, 1]
    assert len(results.curves[0].series) == 3
    page = render(folder).read_text()
    assert "demur run smoothing" in page
    assert "NaN" not in without_pictures(page)


@pytest.mark.slow
def test_the_worst_case_counts_whatever_any_attacker_found(folder):
    """R13, R24."""
    found = figures(read(folder), "Wrong answers under each attacker")
    for name in NAMES:
        assert found["digits", name, "worst of all"] >= found["digits", name, "strongest ensemble"]
    assert ("digits", "median, 3x3", "BPDA, box") in found
    assert ("digits", "Gaussian, sigma 1", "BPDA, box") not in found
    assert ("digits", "no filter", "defence-unaware") not in found
    front = figures(read(folder), FRONT)
    assert {group for group, _, _ in front} == set(ATTACKED_BY)
    for name in NAMES:
        assert (
            front["strongest ensemble", f"digits: {name}", "wrong"]
            == (found["digits", name, "worst of all"])
        )


@pytest.mark.slow
def test_every_figure_says_its_number_of_images(folder):
    tables = read(folder).tables
    without = {row.column for table in tables for row in table.rows if row.n is None}
    assert without == {
        "rank by the product",
        "rank by robust accuracy",
        "layers",
        "weights (millions)",
    }


@pytest.mark.slow
def test_the_records_hold_the_target_of_each_image_and_name_the_attackers(folder):
    records = pl.read_parquet(folder / "records.parquet")
    targeted = records.filter(model="digits: no filter", norm="l2")
    target = targeted["goal"].str.extract(r"^Target\((\d+)\)$").cast(pl.Int64)
    assert len(targeted) == 8
    assert (target != targeted["label"]).all()
    reached = targeted["success"]
    assert (targeted["prediction"].filter(reached) == target.filter(reached)).all()
    assert set(records["attacker"]) == {"none", "defence-unaware", "defence-aware", "strongest"}
    kinds = records.filter(model="digits: median, 3x3")["attack"].drop_nulls().unique()
    assert {"PGD(steps=2)", "StandIn(attack=PGD(steps=2), gradient='box')"} < set(kinds)


@pytest.mark.slow
def test_photographs_go_from_network_to_network_and_tuning_is_attacked_both_ways(folder):
    results = read(folder)
    hard = figures(results, "Photographs: which network")
    transfer = figures(results, "Photographs: transfer")
    assert hard["", "squeezenet1_0", "layers"] == 26
    assert 0 < hard["", "squeezenet1_0", "confidence in the target"] < 1
    assert ("", "squeezenet1_0", "squeezenet1_0") in transfer
    tuned = figures(results, "Transfer learning")
    assert {group for group, _, _ in tuned} == {"all layers", "last layer"}
    assert len(tuned) == 2 * 2 * 3
    note = next(one.note for one in results.tables if one.title.startswith("Photographs: which"))
    assert "No weights of vgg16" in note
    pictures, original, attacked = read_gallery(folder)
    assert {picture.model for picture in pictures} >= {"squeezenet1_0", "digits: no filter"}
    assert original.shape == attacked.shape


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_figures(
    profile, root, folder, tmp_path, monkeypatch
):
    """R10."""
    again = tmp_path / "again"
    check_interruption("smoothing", profile, root, folder, again, monkeypatch, scoring, "attack")


@pytest.mark.slow
def test_a_second_run_computes_nothing_anew(profile, root, folder, monkeypatch):
    before = read(folder)

    def never(*given, **named):
        raise AssertionError("it was computed before")

    for name in ("train", "attack", "transfer", "measure"):
        monkeypatch.setattr(scoring, name, never)
    run("smoothing", profile, data_root=root, out=folder)
    assert read(folder).tables == before.tables


def test_the_figure_of_the_paper_stands_beside_data_of_the_papers_kind_alone():
    reported = read_reported("smoothing")
    assert all(figure.source for figure in reported)
    title = reported[0].table

    def rank(group):
        row = tables.Measurement("Gaussian, sigma 1.5", "rank by the product", group, measured=2.0)
        return beside(tables.Table(title, [row]), reported).rows[0].paper

    assert rank("ImageNet") == 1
    assert rank("MNIST") is None


@dataclass(frozen=True, repr=False)
class _Probe(Attack):
    """Keeps the classifier that it would attack."""

    seen: ClassVar[list] = []

    def __call__(self, classifier, images, labels, threat, **options):
        self.seen.append(classifier)


def test_the_defence_unaware_attacker_sees_the_network_behind_the_filter_and_the_others_the_whole():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    whole = MedianBlur(network, 3, 3).eval()
    images = torch.rand(4, 1, 8, 8)
    given = scoring.TrainingInputs(None, None, whole, 0, "cpu", None)
    torch.testing.assert_close(WithoutFilter().train(given)(images), network(images))
    for gradient in ("identity", "box"):
        StandIn(_Probe(), gradient)(whole, images, torch.zeros(4), "linf:0.1")
    gradients = []
    for seen in (whole, *_Probe.seen):
        torch.testing.assert_close(seen(images), whole(images))
        leaf = images.clone().requires_grad_()
        seen(leaf)[:, 0].sum().backward()
        gradients.append(leaf.grad)
    own = network[1].weight[0].detach().view(1, 1, 8, 8).expand(4, -1, -1, -1)
    torch.testing.assert_close(gradients[1], own)
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


def test_only_the_last_layer_changes_where_only_it_is_tuned(root):
    public = imagenet_network("squeezenet1_0", root=root)
    tuned, head = new_head(public, 3, seed=0)
    assert tuned(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert public(torch.rand(2, 3, 64, 64)).shape == (2, 1000)
    assert sum(one.numel() for one in head.parameters()) == 512 * 3 + 3
    again, _ = new_head(public, 3, seed=0)
    pairs = zip(tuned.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with torch.device("meta"):
        dense = architectures.resnet18(weights=None)
    changed, head = new_head(dense, 3, seed=0)
    assert changed.fc is head


def test_the_targets_are_other_classes_drawn_by_image():
    """R10."""
    images = data.load("digits", "test").sample(40, 0)
    keys = seeds.image_keys(images.to_float())
    targets = other_classes(keys, images.labels, 10, 0)
    assert bool((targets != images.labels).all())
    assert len(set(targets.tolist())) > 5
    few = other_classes([keys[7], keys[3]], images.labels[[7, 3]], 10, 0)
    assert torch.equal(few, targets[[7, 3]])


@pytest.mark.parametrize(
    ("with_filter", "without", "said"),
    [
        (range(6, 16), range(5), "not shown to defend"),  # ten of forty against five
        (range(18), range(4), "most images are still broken|helps"),
        (range(38), range(4), "helps"),
        (range(12), (), "most images are still broken"),
        ((), range(10), "not shown to defend"),
    ],
)
def test_the_verdict_goes_by_intervals_over_the_same_images(with_filter, without, said):
    rows = [
        {"row": row, "column": "worst of all", "outcome": "correct" if index in kept else "wrong"}
        | {"dataset": "digits", "split": "test", "repeat": 0, "index": index, "image": str(index)}
        for row, kept in (("Gaussian, sigma 1", with_filter), ("no filter", without))
        for index in range(40)
    ]
    kinds = {"outcome": SCHEMA["outcome"], "repeat": pl.Int64, "index": pl.Int64}
    found = pl.DataFrame(rows, schema_overrides=kinds)
    verdict = tables._verdict(found, "Gaussian, sigma 1", 2)
    assert any(part in verdict for part in said.split("|"))


@pytest.mark.parametrize(
    ("deep", "shallow", "said"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.0, 1.2], "that agrees"),
        ([1.0, 1.0, 1.2], [2.0, 2.1, 2.2], "does not agree"),
        ([1.0, 3.0, 1.2], [2.0, 1.1, 1.5], "does not clearly agree"),
    ],
)
def test_whether_depth_helps_goes_by_an_interval(deep, shallow, said):
    length = {"deep": pl.Series(deep), "shallow": pl.Series(shallow)}
    names = sorted(length, key=lambda name: -length[name].sum())
    assert said in tables._depth(names, length, {"deep": 50, "shallow": 5})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("median = [3]", "median = [4]"), r"profile [^ ]*: sets\.0\.median\.0: must be odd\.$"),
        (
            ("strongest =", "stronger ="),
            r": stronger: there is no such key \(did you mean 'strongest'\?\); "
            r"strongest: it is missing\.$",
        ),
        (("gaussian = [1.0]", "gaussian = [0.0]"), "greater than 0"),
        (("gaussian = [1.0]", "gaussian = [1.0, 11.0]"), "digits: .*sigma 11 reaches 33 pixels"),
        (("median = [3]", "median = [57]"), "must be at most 15"),
        (("images = 5,", "images = 100,"), "cannot be more than attack.images"),
        (("images = 8,", "images = 800,"), "attack.images is 800, but digits has"),
        (("epochs = 1", "epoch = 1"), "did you mean 'epochs'"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(tmp_path, changed, said):
    check_refusal("smoothing", TINY.replace(*changed), said, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("images = 6", "images = 60"), "ask for more than the 12 and 48 images"),
        (('data = ["own.npz"]', 'data = ["digits"]'), "the images of digits are grey"),
        (("size = 40", "size = 40\nsigma = 9.0"), "sigma 9 reaches 27 pixels"),
    ],
)
def test_images_that_do_not_fit_the_tuning_are_refused_before_anything_is_computed(
    root, tmp_path, changed, said
):
    text = TINY + MORE.replace(*changed).replace("own.npz", str(root / "own.npz"))
    (tmp_path / "wrong.toml").write_text(text)
    settings = load_profile(STUDIES["smoothing"], str(tmp_path / "wrong.toml"))
    with pytest.raises(DemurError, match=said):
        plan(settings, root, 0)


def test_what_is_not_there_is_said(root, tmp_path):
    text = TINY + MORE.replace("own.npz", str(root / "own.npz"))
    (tmp_path / "tiny.toml").write_text(text)
    settings = load_profile(STUDIES["smoothing"], str(tmp_path / "tiny.toml"))
    study = plan(settings, tmp_path, 0)
    assert "no photographs" in study.taken
    assert "no weights of squeezenet1_0 to tune" in study.taken


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_that_come_along_fit(name):
    assert load_profile(STUDIES["smoothing"], name).sets


def test_defences_nest():
    """A filter under another defence is part of the classifier for every attacker."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    smooth = GaussianBlur(network, 3, 1.0).eval()  # four columns: the last one rejects
    outer = MedianBlur(Classifier(smooth, 3), 3, 3).eval()
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    assert outer(images).shape == (6, 4)
    assert set(outcomes(outer, images, labels).tolist()) <= {int(one) for one in Outcome}
