"""Gradients through steps: the same values, and attacks that see through them (R14, R20)."""

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, DemurWarning, attacks
from demur.attacks import PGD, Attack, Square, WithBPDA

IMAGES = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(20, dtype=torch.int64)


class Front(nn.Module):
    """A linear classifier behind a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.linear = nn.Linear(16, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
            self.linear.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))

    def forward(self, images):
        return self.linear(self.step(images).flatten(1))


STEPS = {
    "round": lambda x: torch.round(16 * x) / 16,
    "method": lambda x: (16 * x).round() / 16,
    "decimals": lambda x: torch.round(x, decimals=1),
    "in place": lambda x: (16 * x).round_() / 16,
    "floor": lambda x: torch.floor(16 * x) / 16,
    "detach": lambda x: 1.0 * x.detach(),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_attack_sees_through_the_step_and_breaks_what_the_undefended_twin_loses(step):
    blind = Classifier(Front(STEPS[step]), 3)
    twin = Classifier(Front(lambda x: x), 3)
    broken = PGD(steps=20)(twin, IMAGES, LABELS, "linf:0.3").success
    if step == "detach":
        with pytest.raises(DemurError, match="no gradient"):
            PGD(steps=20)(blind, IMAGES, LABELS, "linf:0.3")
    else:
        with pytest.warns(DemurWarning, match="blind"):
            found = PGD(steps=20)(blind, IMAGES, LABELS, "linf:0.3")
        assert int(found.success.sum()) < int(broken.sum())
    seen = WithBPDA(PGD(steps=20))(blind, IMAGES, LABELS, "linf:0.3")
    assert int(seen.success.sum()) >= int(broken.sum()) - 1
    assert int(seen.zero_gradients.sum()) == 0


def test_values_do_not_change_by_a_bit_and_success_is_the_classifiers_own():
    blind = Classifier(Front(STEPS["decimals"]), 3)
    found = WithBPDA(PGD(steps=20))(blind, IMAGES, LABELS, "linf:0.3")
    assert torch.equal(blind.predict(found.images) != LABELS, found.success)


def test_it_is_an_attack_by_value():
    attack = WithBPDA(attacks.Strongest(steps=5))
    assert Attack.from_dict(attack.to_dict()) == attack
    assert WithBPDA(attacks.FMN()).minimum_norm
    with pytest.raises(DemurError, match="takes an attack such as"):
        WithBPDA("PGD")


def test_where_there_is_no_step_nothing_changes():
    """Negative control."""
    twin = Classifier(Front(lambda x: x), 3)
    plain = Square(n_queries=50)(twin, IMAGES, LABELS, "linf:0.1")
    straight = WithBPDA(Square(n_queries=50))(twin, IMAGES, LABELS, "linf:0.1")
    assert torch.equal(plain.images, straight.images)
