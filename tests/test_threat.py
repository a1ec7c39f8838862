"""Threat models: text, values, selections, and what they refuse."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from demur import DemurError, ThreatModel
from demur.attacks import AnyError, Evade, ForceReject, Target
from demur.norms import BALLS
from demur.threat import as_threat, eps_text

norms = st.sampled_from(sorted(BALLS))
levels = st.integers(0, 255).map(lambda level: level / 255)
every_eps = st.one_of(
    levels, st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-30, 5e-324, math.inf]), st.none()
)


@given(norms, every_eps)
@example("linf", 0.1 + 0.2)
@example("l2", 1e-17)
@example("linf", -0.0)
def test_text_and_threat_are_the_same(norm, eps):
    threat = ThreatModel(norm, eps)
    again = ThreatModel.parse(str(threat))
    assert again == threat
    assert hash(again) == hash(threat)
    assert str(again) == str(threat)
    assert again.eps == eps  # to the last bit
    assert as_threat(str(threat)) == threat
    assert as_threat(threat) is threat


@given(norms, st.floats(0, 1e6))
def test_large_eps_round_trip_outside_linf(norm, eps):
    if norm == "linf" and eps > 1:
        with pytest.raises(DemurError, match="write 8 levels of 255 as 8 / 255"):
            ThreatModel(norm, eps)
    else:
        assert ThreatModel.parse(str(ThreatModel(norm, eps))).eps == eps


@given(st.integers(0, 255))
def test_levels_of_8_bits_print_as_fractions_of_255_or_as_short_decimals(level):
    text = eps_text(level / 255)
    assert text == f"{level}/255" or len(text) <= 6
    assert ThreatModel.parse(f"linf:{level}/255").eps == level / 255


@pytest.mark.parametrize(
    ("text", "norm", "eps", "printed"),
    [
        ("linf:8/255", "linf", 8 / 255, "linf:8/255"),
        ("linf:0.03137254901960784", "linf", 8 / 255, "linf:8/255"),
        ("l2:1.5", "l2", 1.5, "l2:1.5"),
        ("l2:3/2", "l2", 1.5, "l2:1.5"),
        ("l2", "l2", None, "l2"),
        ("linf:inf", "linf", math.inf, "linf:inf"),
        ("l0:12", "l0", 12.0, "l0:12"),
        ("l1:1e2", "l1", 100.0, "l1:100"),
        (" LINF : 2 / 255 ", "linf", 2 / 255, "linf:2/255"),
        ("linf:0", "linf", 0.0, "linf:0"),
        ("linf:1", "linf", 1.0, "linf:1"),
    ],
)
def test_texts_and_what_they_mean(text, norm, eps, printed):
    threat = ThreatModel.parse(text)
    assert (threat.norm, threat.eps, threat.goal, threat.mask) == (norm, eps, Evade(), None)
    assert str(threat) == printed
    assert eps is None or isinstance(threat.eps, float)


def test_threats_compare_by_value():
    mask = torch.tensor([[0.0, 1.0]])
    threat = ThreatModel.parse("linf:8/255")
    assert threat == ThreatModel.parse("linf:0.03137254901960784")
    assert threat == ThreatModel("linf", torch.tensor(8 / 255, dtype=torch.float64))
    different = [
        ThreatModel("l2", 8 / 255),
        ThreatModel("linf"),
        ThreatModel("linf", math.inf),
        ThreatModel("linf", 8 / 255, AnyError()),
        ThreatModel("linf", 8 / 255, Target(1)),
        ThreatModel("linf", 8 / 255, mask=mask),
        ThreatModel("linf", 8 / 255, mask=1 - mask),
        ThreatModel("linf", 8 / 255, mask=mask[None]),
        ThreatModel("linf", torch.tensor([8 / 255])),
        ThreatModel("linf", torch.tensor([0.1, 0.2])),
        ThreatModel("linf", torch.tensor([0.2, 0.1])),
    ]
    for number, one in enumerate(different):
        assert one != threat
        for other in different[number + 1 :]:
            assert one != other
        copy = dataclasses.replace(one)
        assert copy == one
        assert hash(copy) == hash(one)
    assert len({threat, ThreatModel("linf", 8 / 255), *different}) == 1 + len(different)
    assert threat != "linf:8/255"
    assert ThreatModel("linf", 0.1, mask=mask) == ThreatModel("linf", 0.1, mask=mask.clone())


def test_a_threat_is_frozen_and_replace_gives_another():
    threat = ThreatModel("linf", 8 / 255, ForceReject())
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 0.1
    wider = dataclasses.replace(threat, eps=0.1)
    assert wider == ThreatModel("linf", 0.1, ForceReject())
    assert threat.eps == 8 / 255
    with pytest.raises(DemurError, match="negative"):
        dataclasses.replace(threat, eps=-0.1)


@pytest.mark.parametrize("eps", [1, 0, True, torch.tensor(1), torch.tensor([1, 0])])
def test_eps_becomes_a_float_or_a_float64_tensor(eps):
    checked = ThreatModel("l2", eps).eps
    if isinstance(checked, torch.Tensor):
        assert checked.dtype == torch.float64
        assert checked.ndim == 1
    else:
        assert isinstance(checked, float)
    assert torch.equal(torch.as_tensor(checked), torch.as_tensor(eps).double())


def test_an_eps_for_each_image_prints_its_range_and_needs_no_gradient():
    eps = torch.tensor([0.25, 0.5, 0.125], requires_grad=True)
    threat = ThreatModel("l2", eps)
    assert str(threat) == "l2:0.125..0.5"
    assert not threat.eps.requires_grad


def test_a_selection_takes_eps_goal_and_mask_of_the_images():
    masks = torch.arange(12.0).reshape(3, 1, 2, 2) / 12
    index = torch.tensor([2, 0])
    threat = ThreatModel("linf", torch.tensor([0.1, 0.2, 0.3]), Target(torch.tensor([4, 5, 6])))
    threat = dataclasses.replace(threat, mask=masks)
    part = threat.select(index, torch.zeros(3, 1, 2, 2))
    expected = ThreatModel(
        "linf", torch.tensor([0.3, 0.1]), Target(torch.tensor([6, 4])), masks[[2, 0]]
    )
    assert part == expected
    one = ThreatModel("linf", 0.1, Target(4), masks[:1])
    assert one.select(index, torch.zeros(3, 1, 2, 2)) == one  # one value for all images


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ThreatModel("l_inf"), "Did you mean 'linf'"),
        (lambda: ThreatModel("Linf", 0.1), "unknown norm 'Linf'"),
        (lambda: ThreatModel(2, 0.1), "unknown norm"),
        (lambda: ThreatModel(None), "unknown norm"),
        (lambda: ThreatModel(["l2"]), "unknown norm"),
        (lambda: ThreatModel("linf", -0.1), "eps must not be negative"),
        (lambda: ThreatModel("linf", math.nan), "eps must not be negative or NaN"),
        (lambda: ThreatModel("linf", torch.tensor([0.1, math.nan])), "NaN"),
        (lambda: ThreatModel("linf", 8), "write 8 levels of 255 as 8 / 255"),
        (lambda: ThreatModel("linf", torch.tensor([0.1, 8.0])), "not 8: write"),
        (lambda: ThreatModel("linf", "8/255"), "eps must be a number, or a tensor"),
        (lambda: ThreatModel("linf", [0.1, "a"]), "eps must be a number, or a tensor"),
        (lambda: ThreatModel("linf", torch.zeros(2, 2)), r"not of shape \(2, 2\)"),
        (lambda: ThreatModel("linf", 0.1, "evade"), r"a goal is Evade\(\)"),
        (lambda: ThreatModel("linf", 0.1, None), r"a goal is Evade\(\)"),
        (lambda: ThreatModel.parse(""), "unknown norm ''"),
        (lambda: ThreatModel.parse("linf:"), "'linf:' is not a threat model"),
        (lambda: ThreatModel.parse("linf:8/0"), "not a threat model"),
        (lambda: ThreatModel.parse("linf:8/255/2"), "not a threat model"),
        (lambda: ThreatModel.parse("linf:eight"), "write NORM or NORM:EPS"),
        (lambda: ThreatModel.parse("linf:0.1:0.2"), "not a threat model"),
        (lambda: ThreatModel.parse("linf=0.1"), "Did you mean 'linf'"),
        (lambda: ThreatModel.parse("linf:nan"), "NaN"),
        (lambda: ThreatModel.parse("linf:-8/255"), "negative"),
        (lambda: as_threat(0.1), "a threat is ThreatModel"),
        (lambda: as_threat(None), "a threat is ThreatModel"),
        (lambda: as_threat(ThreatModel), "a threat is ThreatModel"),
    ],
)
def test_bad_texts_and_values_are_refused_in_one_line(make, said):
    with pytest.raises(DemurError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
