"""Attacks as values: equality, text, plain dicts, sweeps, and what an eps means to each attack."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, ThreatModel, attacks
from demur.attacks import (
    APGD,
    DDN,
    FGM,
    FGSM,
    FMN,
    PGD,
    AnyError,
    Attack,
    CarliniWagnerL0,
    CarliniWagnerL2,
    CarliniWagnerLinf,
    NormalizedGradient,
    RandomNoise,
    SigmaZero,
    Square,
    Strongest,
    Target,
    Transfer,
    WithBPDA,
    WithWiderKernels,
    sizes,
)
from models import images_of, linear

EXACT = {"precision": "float32"}
# Every attack of the library with fields that differ from their defaults.
EXAMPLES = [
    PGD(10, 0.5, "hinge", True, 2, True, 0.01, 0.5),
    APGD(10, 3, restarts=2, keep_maximizing=True),
    APGD(10, 3, "scaled_margin", restarts=2, give_up=True, tries=2),
    FGSM("cross_entropy", True),
    FGM("cross_entropy", True),
    RandomNoise(7),
    DDN(10, 0.5, 0.1),
    FMN(10, 2.0, 0.1),
    SigmaZero(10, 0.5, 0.01, 0.2, 0.02),
    Square(10, 0.5, "cross_entropy", 2),
    Square(10, 0.5, "scaled_margin", 2, give_up=True),
    CarliniWagnerL2(1.0, 3, 10, 0.1, 0.5),
    CarliniWagnerL0(1.0, 10, 0.1, 0.5, 100.0),
    CarliniWagnerLinf(1.0, 10, 0.1, 0.5, 100.0, 0.95),
    NormalizedGradient(0.5, 10, 0.5),
    Strongest(10, 20, 3, square_sample=5, give_up=False),
    Transfer(PGD(steps=10)),
    Transfer(WithWiderKernels(CarliniWagnerL2(confidence=2.0), 0.3)),
    WithWiderKernels(PGD(steps=10), 0.1),
    WithBPDA(PGD(steps=10)),
]
AROUND = {Transfer, WithWiderKernels, WithBPDA}
"""Attacks that hold another attack."""
KINDS = {type(one) for one in EXAMPLES}
BASES = {attacks.Attack, attacks.SearchAttack, attacks.MinimumNormAttack}
DEFAULTS = [kind() for kind in sorted(KINDS - AROUND, key=repr)]
KEY = next(key for key, value in FGSM().to_dict().items() if value == "FGSM")
every_attack = pytest.mark.parametrize("attack", EXAMPLES + DEFAULTS, ids=repr)


def test_the_examples_are_all_attacks_of_the_library():
    public = {getattr(attacks, name) for name in attacks.__all__}
    found = {one for one in public if isinstance(one, type) and issubclass(one, Attack)}
    assert found - BASES == KINDS
    for kind in KINDS:
        same = [one for one in EXAMPLES if type(one) is kind]
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING and field.name not in ("loss", "n_targets"):
                assert any(getattr(one, field.name) != field.default for one in same)


@every_attack
def test_an_attack_compares_by_value(attack):
    copy = dataclasses.replace(attack)
    assert copy is not attack
    assert copy == attack
    assert hash(copy) == hash(attack)
    others = [one for one in EXAMPLES + DEFAULTS if one is not attack]
    assert all(one != attack for one in others)
    assert len({*others, attack, copy}) == len(EXAMPLES + DEFAULTS)


@every_attack
def test_the_repr_is_python_that_makes_the_attack_again(attack):
    text = repr(attack)
    assert "\n" not in text
    assert eval(text, {one.__name__: one for one in KINDS}) == attack
    for field in dataclasses.fields(attack):
        same = field.default == getattr(attack, field.name)
        assert (f"{field.name}=" in text) != same or type(attack) in AROUND


@every_attack
def test_an_attack_round_trips_through_json(attack):
    described = attack.to_dict()
    assert described[KEY] == type(attack).__name__
    assert len(described) == 1 + len(dataclasses.fields(attack))
    again = Attack.from_dict(json.loads(json.dumps(described)))
    assert again == attack
    assert type(again) is type(attack)
    assert described == attack.to_dict()  # from_dict leaves its argument alone


def test_a_dict_with_some_fields_takes_the_defaults_of_the_others():
    assert Attack.from_dict({KEY: "PGD"}) == PGD()
    assert Attack.from_dict({KEY: "PGD", "steps": 3}) == PGD(steps=3)
    inner = {KEY: "PGD", "steps": 3}
    nested = Attack.from_dict({KEY: "Transfer", "attack": inner})
    assert nested == Transfer(PGD(steps=3))
    assert inner == {KEY: "PGD", "steps": 3}


@every_attack
def test_an_attack_is_frozen_and_holds_plain_values_alone(attack):
    for field in dataclasses.fields(attack):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(attack, field.name, getattr(attack, field.name))
        value = getattr(attack, field.name)
        assert isinstance(value, int | float | str | bool | None | Attack)
        assert "Tensor" not in str(field.type)
        assert "Module" not in str(field.type)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.anything = 1


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({KEY: "PDG"}, "unknown attack 'PDG'. Did you mean 'PGD'"),
        ({KEY: "apgd"}, "Did you mean 'APGD'"),
        ({"steps": 3}, "unknown attack 'None'"),
        ({KEY: "PGD", "step": 3}, "unknown field of PGD 'step'. Did you mean 'steps'"),
        ({KEY: "PGD", "steps": 0}, "steps must be at least 1"),
        ({KEY: "PGD", "loss": "margn"}, "Did you mean 'margin'"),
        ({KEY: "WithWiderKernels"}, "WithWiderKernels cannot be made"),
        ({KEY: "WithWiderKernels", "factor": 0.1}, "WithWiderKernels cannot be made"),
        ({KEY: "SearchAttack"}, "unknown attack 'SearchAttack'"),
        ({KEY: "Attack"}, "unknown attack 'Attack'"),
        ({KEY: ["PGD"]}, "unknown attack"),
        ("PGD", "an attack is described as"),
    ],
)
def test_unknown_attacks_and_fields_offer_the_nearest(description, said):
    with pytest.raises(DemurError, match=said) as caught:
        Attack.from_dict(description)
    assert "\n" not in str(caught.value)


def test_the_known_attacks_of_a_message_are_those_that_can_be_made():
    with pytest.raises(DemurError) as caught:
        Attack.from_dict({KEY: "?"})
    known = str(caught.value).partition("Known: ")[2].removesuffix(".").split(", ")
    others = {name for name, kind in Attack._kinds.items() if not is_public(kind)}
    assert set(known) - others == {kind.__name__ for kind in KINDS}


def is_public(kind):
    """Say whether an attack belongs to `demur.attacks`: tests and studies have their own."""
    return kind.__module__.startswith("demur.attacks.")


class Counting(nn.Module):
    """A linear classifier that counts forward passes of images, and backward passes."""

    def __init__(self, outputs=3):
        super().__init__()
        self.plain = linear(outputs, 64, 3)
        self.forwards = 0
        self.backwards = 0

    def forward(self, images):
        self.forwards += len(images)
        if images.requires_grad:
            images.register_hook(self._count)
        return self.plain(images)

    def _count(self, gradient):
        self.backwards += len(gradient)


def problem(count=8):
    module = Counting()
    images = images_of(count)
    labels = module.plain.predict(images)
    return Classifier(module, 3), images, labels


def assert_equal(one, other):
    """The results are equal in every field."""
    for field in dataclasses.fields(other):
        mine = getattr(one, field.name)
        theirs = getattr(other, field.name)
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, field.name


SWEPT = {"linf": [0.0, 0.02, 0.1, math.inf], "l2": [0.0, 0.2, 1.0, math.inf]}
SWEPT |= {"l1": [0.0, 1.0, 8.0, math.inf], "l0": [0.0, 1.0, 8.0, math.inf]}


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        (FGSM(), "linf"),
        (FGM(), "l2"),
        (PGD(steps=5), "linf"),
        (PGD(steps=5, restarts=2), "l1"),
        (PGD(steps=5), "l0"),
        (APGD(steps=5), "l2"),
        (RandomNoise(draws=3), "l0"),
        (Square(n_queries=10), "linf"),
        (NormalizedGradient(steps=20), "l2"),
        (Strongest(steps=5, n_queries=10), "linf"),
        (Transfer(PGD(steps=5)), "linf"),
    ],
    ids=repr,
)
def test_a_sweep_of_an_attack_with_an_eps_is_one_call_for_each_eps(attack, norm):
    classifier, images, labels = problem()
    options = {"seed": 3, "batch_size": 5, **EXACT}
    if isinstance(attack, Transfer):
        options["surrogate"] = linear(3, 64, 3, seed=1)
    results = attack.sweep(classifier, images, labels, norm, eps=SWEPT[norm], **options)
    assert len(results) == len(SWEPT[norm])
    for eps, result in zip(SWEPT[norm], results, strict=True):
        threat = ThreatModel(norm, eps)
        assert_equal(result, attack(classifier, images, labels, threat, **options))
        assert bool((result.distance[result.success] <= eps * (1 + 1e-6)).all())


SMALLEST = [
    (DDN(steps=20), "l2"),
    *((FMN(steps=20), norm) for norm in SWEPT),
    (SigmaZero(steps=20), "l0"),
    (CarliniWagnerL2(steps=20, search_steps=3), "l2"),
    pytest.param(
        CarliniWagnerL0(steps=20, initial_const=1.0, largest_const=1e2),
        "l0",
        marks=pytest.mark.slow,
    ),
    (CarliniWagnerLinf(steps=20, learning_rate=0.1, initial_const=1.0), "linf"),
]


@pytest.mark.parametrize(("attack", "norm"), SMALLEST, ids=repr)
def test_a_sweep_of_a_minimum_norm_attack_runs_once(attack, norm):
    classifier, images, labels = problem()
    module = classifier.module
    smallest = attack(classifier, images, labels, norm, **EXACT)
    spent = module.forwards, module.backwards
    assert spent[1] > 0
    median = float(smallest.distance.median())
    every_eps = [0.0, 0.5 * median, median, 2 * median, math.inf]
    results = attack.sweep(classifier, images, labels, norm, eps=every_eps, **EXACT)
    assert (module.forwards, module.backwards) == (2 * spent[0], 2 * spent[1])
    for eps, result in zip(every_eps, results, strict=True):
        called = attack(classifier, images, labels, ThreatModel(norm, eps), **EXACT)
        assert_equal(result, called)
    successes = [int(result.success.sum()) for result in results]
    assert successes == sorted(successes)
    assert 0 < successes[2] < successes[-1]


def test_a_sweep_keeps_goal_and_mask_and_ignores_the_eps_of_the_threat():
    classifier, images, labels = problem()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    threat = ThreatModel("l2", 0.01, AnyError(), mask)
    for attack in (PGD(steps=5), DDN(steps=10)):
        (result,) = attack.sweep(classifier, images, labels, threat, eps=[2.0], **EXACT)
        wider = dataclasses.replace(threat, eps=2.0)
        assert_equal(result, attack(classifier, images, labels, wider, **EXACT))
        assert result.success.any()
        assert torch.equal(result.candidates[..., 4:], images[..., 4:])
    assert PGD().sweep(classifier, images, labels, "l2", eps=[]) == []
    with pytest.raises(DemurError, match="negative"):
        PGD().sweep(classifier, images, labels, "l2", eps=[0.1, -0.1])


def test_a_transferred_minimum_norm_attack_sweeps_as_it_is_called():
    """R9 too: the classifier answers some clean images wrongly, which costs no change."""
    classifier, images, labels = problem(12)
    surrogate = linear(3, 64, 3, seed=1)
    attack = Transfer(DDN(steps=20))
    options = {"surrogate": surrogate, **EXACT}
    for given in (labels, surrogate.predict(images), (labels + 1) % 3):
        every_eps = [0.0, 0.1, 0.5, math.inf]
        results = attack.sweep(classifier, images, given, "l2", eps=every_eps, **options)
        for eps, result in zip(every_eps, results, strict=True):
            called = attack(classifier, images, given, ThreatModel("l2", eps), **options)
            assert torch.equal(result.success, called.success)
            assert torch.equal(result.images, called.images)
            assert torch.equal(result.distance, called.distance)


@pytest.mark.parametrize(
    ("attack", "norm"), [*SMALLEST, (NormalizedGradient(steps=50), "l2")], ids=repr
)
def test_with_an_eps_a_minimum_norm_attack_succeeds_where_its_distance_is_at_most_eps(attack, norm):
    classifier, images, labels = problem(10)
    labels[:2] = (labels[:2] + 1) % 3  # wrong already: a distance of 0
    smallest = attack(classifier, images, labels, norm, **EXACT)
    hit = smallest.success
    assert int(hit.sum()) >= 9
    assert smallest.distance[:2].tolist() == [0.0, 0.0]
    assert torch.allclose(smallest.distance[hit], sizes(images, smallest.images)[norm][hit])
    limits = smallest.distance.clone()
    limits[::2] *= 0.9
    within = attack(classifier, images, labels, ThreatModel(norm, limits), **EXACT)
    expected = hit & (smallest.distance <= limits)
    assert 2 < int(expected.sum()) < 9
    assert torch.equal(within.success, expected)
    assert torch.equal(within.images[expected], smallest.images[expected])
    assert torch.equal(within.images[~expected], images[~expected])
    taken_back = hit & ~expected
    assert torch.equal(within.candidates[taken_back], images[taken_back])
    assert bool(within.distance[~expected].isinf().all())
    assert torch.equal(within.forwards, smallest.forwards)
    unbounded = attack(classifier, images, labels, ThreatModel(norm, math.inf), **EXACT)
    assert_equal(unbounded, smallest)


@pytest.mark.parametrize("attack", [PGD(steps=20), NormalizedGradient(steps=200)], ids=repr)
def test_confidence_asks_for_a_margin(attack):
    classifier, images, labels = problem(10)
    threat = ThreatModel("l2", 1.0)
    margins = []
    for confidence in (0.0, 0.5):
        sure = dataclasses.replace(attack, confidence=confidence)
        result = sure(classifier, images, labels, threat, **EXACT)
        assert bool(result.success.any())
        scores = classifier.scores(result.images)
        margin = AnyError().margin(scores, labels, 3)[result.success]
        assert bool((margin >= confidence).all())
        margins.append(float(margin.min()))
    assert margins[0] < 0.5  # without the confidence, the attack stops earlier
    with pytest.raises(DemurError, match="confidence"):
        dataclasses.replace(attack, confidence=-1.0)


@pytest.mark.parametrize("norm", SWEPT)
@pytest.mark.parametrize(
    "attack",
    [FGSM(), FGM(), PGD(), APGD(), RandomNoise(), Square(), Strongest(steps=3, n_queries=3)],
    ids=repr,
)
def test_an_attack_works_in_the_norms_that_it_names_and_refuses_the_others(attack, norm):
    classifier, images, labels = problem(2)
    known = getattr(attack, "norms", ("linf", "l2", "l1", "l0"))
    if norm not in known:
        with pytest.raises(DemurError, match=f"{type(attack).__name__} works in .* not '{norm}'"):
            attack(classifier, images, labels, ThreatModel(norm, 1.0))
    elif isinstance(attack, Strongest):
        assert attack(classifier, images, labels, norm).success.all()
    else:
        message = f"{type(attack).__name__} needs an eps .* DDN, FMN"
        with pytest.raises(DemurError, match=message):
            attack(classifier, images, labels, norm)
        with pytest.raises(DemurError, match=message):
            attack.maximize(classifier, images, labels, norm)


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        (DDN(), "linf"),
        (SigmaZero(), "l2"),
        (CarliniWagnerL2(), "l0"),
        (CarliniWagnerL0(), "l1"),
        (CarliniWagnerLinf(), "l2"),
        (NormalizedGradient(), "linf"),
    ],
    ids=repr,
)
def test_minimum_norm_attacks_refuse_norms_that_they_do_not_know(attack, norm):
    classifier, images, labels = problem(2)
    with pytest.raises(DemurError, match=f"{type(attack).__name__} works in .* not '{norm}'"):
        attack(classifier, images, labels, norm)


@pytest.mark.parametrize("norm", SWEPT)
@pytest.mark.parametrize(
    "attack", [PGD(steps=30), RandomNoise(), FGSM(), FGM(), APGD(steps=30), Square(n_queries=30)]
)
def test_an_infinite_eps_allows_every_image(attack, norm):
    if norm not in attack.norms:
        pytest.skip("the attack does not know the norm")
    classifier, images, labels = problem(6)
    result = attack(classifier, images, labels, ThreatModel(norm, math.inf), **EXACT)
    assert bool(((result.candidates >= 0) & (result.candidates <= 1)).all())
    if isinstance(attack, PGD | APGD):
        assert result.success.all()
    largest = {"linf": 1.0, "l2": 8.0, "l1": 64.0, "l0": 64.0}[norm]
    limited = attack(classifier, images, labels, ThreatModel(norm, largest), **EXACT)
    assert_equal(result, limited)


def test_a_threat_may_be_text():
    classifier, images, labels = problem(4)
    for attack, text in (
        (PGD(steps=3), "linf:8/255"),
        (Strongest(steps=3, n_queries=3), "l2:0.1"),
        (WithWiderKernels(PGD(steps=3), 0.5), "linf:0.1"),
        (DDN(steps=3), "l2"),
    ):
        one = attack(classifier, images, labels, text, **EXACT)
        other = attack(classifier, images, labels, ThreatModel.parse(text), **EXACT)
        assert_equal(one, other)
    given = PGD(steps=3)
    candidates = given.maximize(classifier, images, labels, "linf:8/255", **EXACT)
    threat = ThreatModel("linf", 8 / 255)
    assert torch.equal(candidates, given.maximize(classifier, images, labels, threat, **EXACT))


def test_transfer_attacks_the_surrogate_and_counts_the_answers_of_the_classifier():
    classifier, images, labels = problem(6)
    surrogate = Classifier(Counting(), 3)
    threat = ThreatModel("linf", 0.2, Target((labels + 1) % 3))
    attack = PGD(steps=10, keep_maximizing=True)
    sent = attack(surrogate, images, labels, threat, **EXACT)
    before = surrogate.module.forwards
    result = Transfer(attack)(classifier, images, labels, threat, surrogate=surrogate, **EXACT)
    assert surrogate.module.forwards == 2 * before
    assert torch.equal(result.candidates, sent.candidates)
    assert classifier.module.backwards == 0
    assert not result.backwards.any()
    assert bool((result.forwards <= 2).all())
    decided = classifier.predict(result.images)
    assert torch.equal(decided[result.success], ((labels + 1) % 3)[result.success])
    with pytest.raises(TypeError):
        Transfer(attack)(classifier, images, labels, threat, surrogate)


NAMES = {
    ("linf", 0.1): ["PGD", "PGD", "APGD", "APGD", "APGD", "APGD", "FMN", "Square"],
    ("l2", 0.1): ["PGD", "PGD", "APGD", "APGD", "APGD", "APGD", "DDN", "Square"],
    ("l1", 0.1): ["PGD", "PGD", "PGD", "PGD", "FMN"],
    ("l0", 0.1): ["PGD", "PGD", "SigmaZero", "FMN", "PGD"],
    ("linf", None): ["FMN", "FMN"],
    ("l2", None): ["DDN", "FMN", "CarliniWagnerL2"],
    ("l1", None): ["FMN", "FMN"],
    ("l0", None): ["SigmaZero", "FMN"],
}


@pytest.mark.parametrize(("norm", "eps"), NAMES)
def test_the_ensemble_lists_its_members(norm, eps):
    classifier, images, labels = problem(4)
    ensemble = Strongest(steps=7, n_queries=11, n_targets=2)
    members = ensemble.attacks_for(ThreatModel(norm, eps), classifier, images)
    assert [type(one).__name__ for one in members] == NAMES[norm, eps]
    assert all(isinstance(one, Attack) for one in members)
    assert members == [Attack.from_dict(one.to_dict()) for one in members]
    assert len(set(members)) == len(members)
    assert members == ensemble.attacks_for(str(ThreatModel(norm, eps)), classifier, images)
    result = ensemble(classifier, images, labels, ThreatModel(norm, eps))
    names = {repr(one) for one in members}
    assert all((name in names) == bool(hit) for name, hit in zip(result.by, result.success))
    assert all((name == "") != bool(hit) for name, hit in zip(result.by, result.success))
    assert isinstance(result, attacks.AttackResult)


class Machine(attacks.KernelMachine):
    """A linear layer that counts as a kernel machine."""

    def __init__(self):
        super().__init__()
        self.plain = linear(3, 64, 3)
        self.factors = []

    def forward(self, images):
        self.factors.append(self.wider_kernels)
        return self.plain(images)


def test_the_ensemble_meets_kernel_machines_with_wider_kernels_too():
    """R20."""
    classifier = Classifier(Machine(), 3)
    images = images_of(4)
    labels = classifier.predict(images)
    ensemble = Strongest(steps=5, n_queries=5)
    members = ensemble.attacks_for("linf:0.1", classifier, images)
    wider = [one for one in members if isinstance(one, WithWiderKernels)]
    assert {one.factor for one in wider} == {0.3, 0.1}
    assert {type(one.attack) for one in wider} == {PGD, APGD, FMN}
    classifier.module.factors.clear()
    result = ensemble(classifier, images, labels, "linf:0.001")
    assert not result.success.any()
    assert set(classifier.module.factors) == {1.0, 0.3, 0.1}
    assert classifier.module.wider_kernels == 1.0
    with pytest.raises(DemurError, match="factor"):
        WithWiderKernels(PGD(), 1.5)
    with pytest.raises(DemurError, match="kernels are widened by a factor"):
        attacks.wider_kernels(classifier, 2.0).__enter__()
