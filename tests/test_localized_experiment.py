"""The localized-training experiment, end to end on embedded digits and synthetic photographs."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as architectures

from command import check_interruption, check_refusal
from demur import Outcome
from demur.commands.run import STUDIES, run
from demur.evaluation import Store
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read, read_gallery
from demur.experiments.cells import Run
from demur.experiments.localized_training import sets
from demur.experiments.localized_training.tables import (
    PAPER_LOSS,
    PAPER_PHOTOGRAPHS,
    _paper_averages,
    worst_of,
)
from demur.networks import weights
from demur.report import render
from demur.studies import album
from demur.studies.material import gather_part

TINY = """
gallery = 14
strongest = { images = 10, steps = 4, n_targets = 1, n_queries = 10 }

[attack]
images = 20
calibration_images = 12
steps = 6
step_share = 0.3
curve = [0.0, 1.0, 3.4]

[[sets]]
name = "digits"
data = ["digits"]
paper = "MNIST"
train_images = 600
steps = 60
learning_rate = 1e-3
eps = 0.3
attack_steps = 3
step_size = 0.2
boxes = [4, 16, 28]
"""
PHOTOGRAPHS = """
[photographs]
networks = ["inception_v3", "squeezenet1_0"]
images = 3
listed = 2
steps = 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three photographs, one without a box and one too small, and a network of random weights."""
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
    for number, (name, size) in enumerate(
        {"triceratops": 90, "snail": 80, "hen": 70, "tiny": 40}.items()
    ):
        pixels = torch.randint(0, 256, (size, 100, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
        entries[f"{name}.png"] = {
            "class_index": number,
            "label": name,
            "box": [10, 10, 60, 35] if name != "hen" else [],
        }
    folder.with_name("photos.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY + PHOTOGRAPHS)
    return str(path)


@pytest.fixture(scope="module")
def folder(profile, root, tmp_path_factory):
    return run(
        "localized-training", profile, data_root=root, out=tmp_path_factory.mktemp("runs") / "whole"
    )


def table(results, title):
    return next(one for one in results.tables if one.title.startswith(title))


def figures(results, title):
    return {(row.group, row.row, row.column): row for row in table(results, title).rows}


def test_a_run_leaves_the_papers_tables_with_its_figures_beside(folder):
    results = read(folder)
    losses = figures(results, "Loss of each model")
    assert losses["digits", "natural", "standard attack"].paper == 68.19 and len(losses) == 9
    assert losses["digits", "natural", "natural images"].paper == pytest.approx(0.0414)
    assert figures(results, "Accuracy of each")["digits", "natural", "background"].paper == 0.08
    assert {row.row for row in table(results, "The natural model").rows} == {
        "4x4",
        "16x16",
        "28x28",
    }
    assert results.curves[0].x == [0.0, 0.3, 1.0] and len(results.curves[0].series) == 6
    assert any(
        "of 9 differences of Figure 2 have the paper's sign" in line for line in results.summary
    )
    page = render(folder).read_text()
    assert "demur run localized-training" in page and "NaN" not in page and "triceratops" in page


def test_photographs_are_attacked_around_their_boxes_and_what_is_missing_is_said(folder):
    results = read(folder)
    before, after = (
        figures(results, "Unattacked photographs"),
        figures(results, "Photographs attacked around the object, eps 2/255"),
    )
    assert before["squeezenet1_0", "triceratops", "confidence"].measured is not None
    lacking = after["inception_v3", "triceratops", "confidence"]
    assert lacking.measured is None and lacking.paper == 0.000377
    assert after["inception_v3", "snail", "guess"].note == "no weights at hand [bakery]"
    assert "No weights of inception_v3" in table(results, "Unattacked photographs").note
    everything = figures(results, "All photographs")
    regions = {row for _, row, _ in everything}
    assert len(regions) == 1 + 1 + 4 and "no attack" in regions
    altered = {row: everything["squeezenet1_0", row, "altered"].measured for row in regions}
    around, control = (altered[f"{name}, eps 8/255"] for name in (sets.AROUND, sets.RANDOM))
    assert (
        altered["no attack"] == 0
        and around == pytest.approx(control, abs=3)
        and around < altered[f"{sets.EVERYWHERE}, eps 8/255"]
    )


def test_the_papers_averages_follow_from_its_rows():
    """Tables 1 and 2 print them."""
    assert _paper_averages(PAPER_PHOTOGRAPHS, 0)["confidence"] == pytest.approx(0.710243, abs=1e-6)
    after = _paper_averages(PAPER_PHOTOGRAPHS, 2)
    # The column's mean is what the paper prints, .000169.
    assert after["altered"] == pytest.approx(49.08, abs=0.01) and after[
        "confidence"
    ] == pytest.approx(0.000169, abs=5e-7)
    mnist, cifar = PAPER_LOSS["MNIST"], PAPER_LOSS["CIFAR-10"]
    assert 100 * (1 - mnist["background"][0] / mnist["natural"][0]) == pytest.approx(4.35, abs=0.01)
    assert 100 * (1 - cifar["background"][0] / cifar["natural"][0]) == pytest.approx(1.63, abs=0.01)


def test_nothing_outside_a_region_changes_bit_for_bit(profile, root, folder):
    """R26, on stored images."""
    pictures, original, attacked = read_gallery(folder)
    assert {picture.attacker for picture in pictures} == {sets.AROUND, sets.EVERYWHERE}
    inside = (
        sets.mask_of(sets.OBJECT, read_box(folder), original[:1, :1, ::8, ::8], 0)
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
    )
    seen = 0
    for picture, before, after in zip(pictures, original, attacked, strict=True):
        if picture.attacker == sets.AROUND and picture.model.startswith("digits"):
            assert (
                torch.equal(before[:, inside[0, 0] > 0], after[:, inside[0, 0] > 0])
                and picture.l2 > 0
            )
            seen += 1
    assert seen >= 3


def read_box(folder):
    note = table(read(folder), "Loss of each model").note
    return int(note.rsplit("box ", 1)[1].split("x")[0])


def test_an_interrupted_run_ends_with_the_same_figures(
    profile, root, folder, tmp_path, monkeypatch
):
    """R10."""
    check_interruption(
        "localized-training",
        profile,
        root,
        folder,
        tmp_path / "again",
        monkeypatch,
        sets,
        "_pgd_cell",
    )


def test_no_attack_breaks_an_image_that_the_worst_case_does_not_count(profile, root):
    """R13: the worst case is at least as bad as each attack, and everywhere as in a region."""
    generator = torch.Generator().manual_seed(0)

    def cell(count):
        wrong = torch.rand(count, generator=generator) < 0.5
        return SimpleNamespace(
            tensors={"outcomes": torch.where(wrong, int(Outcome.WRONG), int(Outcome.CORRECT))}
        )

    pgd = {("natural", region): cell(20) for region in sets.REGIONS}
    found = SimpleNamespace(
        pgd=pgd,
        strongest={("natural", region): cell(10) for region in (sets.EVERYWHERE, sets.AROUND)},
    )
    everywhere, around = (
        worst_of(found, "natural", region) for region in (sets.EVERYWHERE, sets.AROUND)
    )
    assert bool((everywhere >= around).all()) and bool(
        (around >= found.pgd["natural", sets.AROUND].tensors["outcomes"][:10]).all()
    )


def test_a_training_in_stages_goes_on_with_the_stage_it_was_in(tmp_path, monkeypatch):
    """R10: and ends with the same bits."""
    ramped = TINY.replace("eps = 0.3\n", "eps = 0.3\nramp = [0.5, 1.0]\n").replace(
        "steps = 60", "steps = 12"
    )
    (tmp_path / "ramped.toml").write_text(ramped)
    settings = load_profile(STUDIES["localized-training"], str(tmp_path / "ramped.toml")).sets[0]
    part = gather_part(settings, 20, None, 0)

    def train(folder):
        current = Run(Store(tmp_path / folder), "cpu", 0, SimpleNamespace(advance=lambda *_: None))
        return sets._trained(part, sets.STANDARD, None, current).classifier.state_dict()

    whole, fit, calls = train("whole"), sets.AdversarialTraining.fit, []

    def interrupt(self, *given, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(self, *given, **options)

    monkeypatch.setattr(sets.AdversarialTraining, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train("again")
    again = train("again")
    assert len(calls) == 3 and calls[1] == calls[2]  # the first stage was not repeated
    assert all(torch.equal(whole[name], again[name]) for name in whole) and not list(
        (tmp_path / "again").glob("*.stage")
    )


@pytest.mark.parametrize(
    ("ramp", "steps", "count"),
    [((1.0,), 83, 600), ((0.5, 1.0), 40, 2000), ((0.4, 0.7, 1.0), 90, 500)],
)
def test_the_stages_of_a_training_come_to_the_steps_that_were_asked_for(
    profile, ramp, steps, count
):
    settings = (
        load_profile(STUDIES["localized-training"], profile)
        .sets[0]
        .model_copy(update={"ramp": ramp, "steps": steps})
    )
    stages = list(sets._stages(settings, sets.STANDARD, count, seed=0))
    assert tuple(factor for factor, _, _ in stages) == ramp
    taken = sum(len(index) // settings.batch_size * passes for _, index, passes in stages)
    assert taken == pytest.approx(steps, rel=0.1)
    assert all(
        len(set(index.tolist())) == len(index) and int(index.max()) < count
        for _, index, _ in stages
    )
    ((factor, index, passes),) = sets._stages(settings, sets.NATURAL, count, seed=0)
    assert factor == 1 and len(index) // settings.batch_size * passes == pytest.approx(
        steps, rel=0.1
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("boxes = [4, 16, 28]", "boxes = [4, 40]"), "a box of 40 pixels a side does not lie"),
        (("boxes = [4, 16, 28]", "boxes = [16, 4]"), "must increase"),
        (("eps = 0.3", "eps = -0.3"), "sets.0.eps"),
        (("eps = 0.3", "eps = nan"), "sets.0.eps"),
        (("eps = 0.3", "eps = 0.3\nramp = [0.5]"), "must end at 1"),
        (("train_images = 600", "train_images = 6000"), "train_images is 6000"),
        (("images = 20", "images = 2000"), "attack.images is 2000"),
        (("images = 10,", "images = 100,"), "cannot be more than attack.images"),
        (("learning_rate", "learning_rat"), "did you mean 'learning_rate'"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(tmp_path, changed, said):
    check_refusal("localized-training", TINY.replace(*changed), said, tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_that_come_along_fit(name):
    profile = load_profile(STUDIES["localized-training"], name)
    assert all(one.step_size <= one.eps <= 1 for one in profile.sets)
    if name == "paper":
        assert (profile.sets[0].steps, profile.sets[0].attack_steps, profile.sets[0].eps) == (
            100_000,
            100,
            0.3,
        )


def test_without_photographs_or_networks_there_is_nothing_to_attack_and_the_rest_goes_on(
    profile, tmp_path
):
    assert (
        album.gather(load_profile(STUDIES["localized-training"], profile).photographs, tmp_path)
        is None
    )
