"""The study of transferred attacks and of pairs of defences, on the embedded digits."""

from itertools import chain, combinations

import polars as pl
import pytest
import torch
from torch import nn

from command import check_refusal
from demur import REJECT, Classifier, DemurError, data, metrics
from demur.attacks import PGD, Attack
from demur.commands.run import STUDIES, run
from demur.defenses import EitherRejects, MedianBlur
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import PLACE, read_parquet, worst_case
from demur.evaluation.results import read
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.shares import FRONT
from demur.evaluation.store import Store
from demur.evaluation.tables import lookup
from demur.studies.defence_transfer.designs import DEFENCES, Pair, pairs_of
from demur.studies.defence_transfer.plan import sent
from demur.studies.defence_transfer.recipes import Rejection, ThroughBox, reject_together
from demur.studies.defence_transfer.tables import MATRIX, PAIRS, compare
from demur.studies.recipes import SmallNetwork
from demur.threat import ThreatModel

STUDY = "defence-transfer"
TINY = """
data = ["digits"]
train_images = 400
epochs = 1
batch_size = 32
attacked_epochs = 1
attack_steps = 1
box = 12
made_per_kind = 10
per_class = 8
defences = ["median blur", "neural rejection"]
attack = { images = 12, eps = 0.1, steps = 3, ensemble_steps = 2, n_targets = 1, n_queries = 5 }
"""
LINF = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").sample(500, 0), data.load("digits", "test").sample(100, 0)


@pytest.fixture(scope="module")
def network(digits, tmp_path_factory):
    given = TrainingInputs(digits[0], None, None, 0, "cpu", tmp_path_factory.mktemp("a") / "check")
    return SmallNetwork(2, 32).train(given).eval()


def rejecting(machines, network, digits, rate=0.1):
    """The network with machines, and its threshold at that share of the test images."""
    given = TrainingInputs(digits[0], digits[1], network, 0, "cpu", None)
    return Rejection(machines, 10, 10.0, rate).train(given).eval(), given.notes


class _Known(nn.Module):
    """Two classes; the reject margin of an image is its first pixel times a sign."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, images):
        margin = self.sign * images.flatten(1)[:, :1]
        return torch.cat([torch.ones_like(margin), torch.zeros_like(margin), 1 - margin], 1)


def closed(p_values):
    """Holm's procedure as a closed test: a test counts where each set of tests that holds it does,
    by Bonferroni (Marcus, Peritz and Gabriel 1976).
    """
    every = range(len(p_values))
    sets = list(chain.from_iterable(combinations(every, size) for size in range(1, 1 + len(every))))
    local = {one: min(1.0, len(one) * min(p_values[place] for place in one)) for one in sets}
    return [max(value for one, value in local.items() if place in one) for place in every]


def test_holms_correction_is_the_closed_test_of_bonferroni():
    drawn = torch.rand(30, 6, generator=torch.Generator().manual_seed(0)).double() ** 4
    for row in [*drawn.tolist(), [0.01, 0.01, 0.5, 1.0], [0.2], []]:
        assert metrics.holm(row) == pytest.approx(closed(row), abs=1e-12)
    assert max(metrics.holm([0.01] * 6)) > 0.05  # where each alone would be below it
    with pytest.raises(DemurError, match="p-values"):
        metrics.holm([0.5, 1.2])


def test_all_pairs_fit_but_two_trainings_on_attacked_images():
    found = {one.name for one in pairs_of(DEFENCES)}
    both = "adversarial training + localized adversarial training"
    assert len(found) == 7 * 6 / 2 - 1
    assert both not in found
    assert "Gaussian blur + background class" in found
    for one in pairs_of(DEFENCES):
        halves = DEFENCES[one.first], DEFENCES[one.second]
        assert one.design == halves[0].nested(halves[1]) and one.design not in halves


def test_two_rejections_together_reject_no_more_than_one():
    """R17: images at the two ends are rejected, half as many of each as of one end alone."""
    images = (torch.arange(100.0) / 100).reshape(-1, 1, 1, 1)
    low, high = (Classifier(_Known(sign), 2) for sign in (1.0, -1.0))
    assert reject_together([low], images, 0.1) == 0.1
    assert int((low.predict(images) == REJECT).sum()) == 10
    assert reject_together([low, high], images, 0.1) == 0.1
    assert [int((one.predict(images) == REJECT).sum()) for one in (low, high)] == [5, 5]
    whole = EitherRejects(low, high).predict(images) == REJECT
    assert whole.tolist() == [place < 5 or place >= 95 for place in range(100)]
    assert reject_together([low, high], images, 0.0) == 0
    assert not bool((EitherRejects(low, high).predict(images) == REJECT).any())


def test_every_kind_of_rejection_is_set_to_the_same_share(network, digits):
    held_out = digits[1].to_float()
    for machines in ((), (("11",),), (("7", "11"),), (("7", "11"), ("11",))):
        model, notes = rejecting(machines, network, digits)
        rejected = float((model.predict(held_out) == REJECT).double().mean())
        assert rejected == notes["rejected of validation"]
        assert 0.05 <= rejected <= 0.1


def test_a_pair_of_a_defence_and_its_copy_is_not_better(network, digits):
    """Negative control."""
    model, _ = rejecting((("11",),), network, digits)
    twice, _ = rejecting((("11",), ("11",)), network, digits)
    assert isinstance(twice, EitherRejects)
    images, labels = digits[1].to_float()[:40], digits[1].labels[:40]
    broken = {}
    for name, one in (("a", model), ("b", model), ("a + b", twice)):
        found = PGD(steps=10)(one, images, labels, "linf:0.15")
        answers = one.predict(found.candidates)
        broken[name] = pl.Series(((answers != labels) & (answers != REJECT)).tolist())
    assert broken["a"].any()
    compared = compare(Pair("a", "b", DEFENCES["neural rejection"]), broken)
    assert compared.gained == 0
    assert compared.p_value == 1


def test_a_better_pair_is_better_than_both_halves():
    pair = Pair("a", "b", DEFENCES["neural rejection"])
    first = pl.Series([True] * 30 + [False] * 70)
    second = pl.Series([False] * 10 + [True] * 30 + [False] * 60)
    few = pl.Series([False] * 10 + [True] * 5 + [False] * 85)
    better = compare(pair, {"a": first, "b": second, "a + b": few})
    assert better.wrong == (30, 30, 5)
    assert better.p_value == pytest.approx(2.0**-25)
    one = compare(pair, {"a": first, "b": few, "a + b": few})
    assert one.gained == 0 and one.p_value == 1
    worse = compare(pair, {"a": few, "b": few, "a + b": second})
    assert worse.gained == 25 and worse.p_value == pytest.approx(1)


def test_the_gradient_goes_through_a_box_blur_in_place_of_a_median():
    """R24."""
    seen = []

    class Recorded(Attack):
        def __call__(self, classifier, images, labels, threat, **options):
            seen.append(classifier)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model = Classifier(nn.Sequential(MedianBlur(dense, 3, size=3)), 3).eval()
    images = torch.rand(4, 1, 8, 8)
    ThroughBox(Recorded())(model, images, torch.zeros(4).long(), LINF)
    assert torch.equal(seen[0].scores(images), model.scores(images))
    gradients = []
    box = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), dense)
    for one in (seen[0], box, model):
        own = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(own)[:, 0].sum(), own)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])  # the given model keeps its median


def test_what_is_sent_to_the_attacked_model_itself_has_the_outcome_of_the_attack(digits, tmp_path):
    """R13."""
    train = Train(SmallNetwork(1, 32), digits[0], 0, name="plain")
    base = Train(Rejection((("11",),), 8, 10.0, 0.1), digits[0], 0, digits[1], train, name="NR")
    some = digits[1].sample(20, 0)
    attack = PGD(steps=5, keep_maximizing=True)
    own = Evaluate(base, some, LINF, attack, attacker="defence-aware", keep="exact")
    nodes = [own, sent(own, base), sent(own, train)]
    outputs = execute(nodes, Store(tmp_path), Local(), Environment.here("cpu"))
    white, itself, other = (outputs.records([node]) for node in nodes)
    same = ["prediction", "outcome", "stored_outcome", "reject_margin", "class_margin", "linf"]
    assert itself.select(same).equals(white.select(same))
    assert itself["attacker"].unique().to_list() == ["defence-unaware"]
    assert not other.select(same).equals(white.select(same))


def test_a_profile_that_does_not_fit_is_refused(tmp_path):
    for old, new, said in (
        ("box = 12", "box = 40", "a box of 40 pixels"),
        ("box = 12", "box = 12\nwindow = 4", "4"),
        ("median blur", "median", "unknown defence"),
        ("neural rejection", "median blur", "named twice"),
    ):
        check_refusal(STUDY, TINY.replace(old, new), said, tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_load(name):
    profile = load_profile(STUDIES[STUDY], name)
    assert profile.false_rejection == 0.02
    assert set(profile.defences) == set(DEFENCES) or name == "demo"


@pytest.mark.slow
def test_the_study_sends_attacks_to_all_models_and_compares_pairs(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    folder = run(STUDY, str(tmp_path / "own.toml"), out=tmp_path / "run")
    results = read(folder)
    assert [table.title for table in results.tables] == [MATRIX, PAIRS, FRONT]
    singles = ["no defence", "confidence threshold", "median blur", "neural rejection"]
    matrix = lookup(results.tables[0])[""]
    assert list(matrix) == singles and all(list(row) == singles for row in matrix.values())
    assert all(one.low <= one.measured <= one.high for one in results.tables[0].rows)
    records = read_parquet(folder / "records.parquet")
    known = records.filter(pl.col("attacker").is_in(["strongest", "defence-aware"]))
    for name in singles:
        own = worst_case(known.filter(model=name))["outcome"] == "wrong"
        assert matrix[name][name] == pytest.approx(100 * own.mean())
    ((pair, row),) = lookup(results.tables[1])[""].items()
    assert pair == "median blur + neural rejection"
    everything = worst_case(records.filter(model=pair))["outcome"] == "wrong"
    assert row["wrong: pair"] == pytest.approx(100 * everything.mean())
    assert (
        records.filter(model=pair, attacker="defence-unaware")
        .group_by(PLACE)
        .len()["len"]
        .to_list()
        == [2 * len(singles)] * 12
    )
    measured = read_parquet(folder / "measurements.parquet")
    rejected = measured.filter(name="rejected of validation")
    assert rejected["node"].to_list() == [*singles[1:], pair]
    assert rejected["value"].max() <= 0.02
    before = results.tables
    paths = sorted(
        (tmp_path / "demur-store").glob("*.safetensors"), key=lambda one: one.stat().st_mtime
    )
    for path in paths[-3:]:
        path.unlink()
    assert read(run(STUDY, str(tmp_path / "own.toml"), out=folder)).tables == before  # R10
