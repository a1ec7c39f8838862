"""How often an attack waits for the device, and when it hashes images.

The tests run on the CPU and count what would make the program wait for a GPU: see `waiting.py`. A
problem without a solution keeps all images until the end. Then twice the steps may add one wait for
each additional forward pass.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from demur import Classifier, ThreatModel, attacks, seeds
from demur.attacks import (
    APGD,
    DDN,
    FGM,
    FGSM,
    FMN,
    PGD,
    AnyError,
    CarliniWagnerL0,
    CarliniWagnerL2,
    CarliniWagnerLinf,
    Evade,
    NormalizedGradient,
    RandomNoise,
    SearchAttack,
    SigmaZero,
    Square,
    Strongest,
    Target,
    Transfer,
    WithBPDA,
    WithWiderKernels,
)
from models import images_of, linear
from waiting import Waiting

FIRST = 6
SECOND = 12


class Fort(nn.Module):
    """A linear classifier whose first class is ahead by a wall; it counts its forward passes."""

    def __init__(self, wall=1000.0):
        super().__init__()
        self.plain = linear(3, 64, 3)
        self.register_buffer("bias", torch.tensor([wall, 0.0, 0.0]))
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        return self.plain(images) + self.bias


@dataclass
class Spent:
    """Waits for results, tensors made on the CPU, and forward passes."""

    reads: int
    uploads: int
    passes: int

    def __sub__(self, other):
        return Spent(
            self.reads - other.reads, self.uploads - other.uploads, self.passes - other.passes
        )


def spent(attack, threat, wall, **options):
    classifier = Classifier(Fort(wall), 3)
    images = images_of(4)
    labels = torch.zeros(4, dtype=torch.int64)
    if isinstance(attack, Transfer):
        options["surrogate"] = Classifier(classifier.module, 3)
    with Waiting() as waiting:
        result = attack(classifier, images, labels, threat, **options)
    assert wall < 1000 or not result.success.any()
    return Spent(waiting.reads, waiting.uploads, classifier.module.passes)


def added(attack, threat, wall=1000.0, **options):
    """What twice the steps cost more."""
    names = {"steps", "n_queries", "draws"} & set(vars(attack))
    inner = attack
    if isinstance(attack, Transfer | WithBPDA | WithWiderKernels):
        inner = attack.attack
        names = {"steps"}
    costs = []
    for steps in (FIRST, SECOND):
        longer = replace(inner, **dict.fromkeys(names, steps))
        longer = longer if inner is attack else replace(attack, attack=longer)
        costs.append(spent(longer, threat, wall, **options))
    return costs[1] - costs[0]


STEPPED = [
    (PGD(), "linf:0.1"),
    (PGD(random_start=True, restarts=2, tolerance=1e-9), "l2:1"),
    (PGD(loss="hinge"), "linf:0.1"),
    (PGD(keep_maximizing=True), "linf:0.1"),
    (PGD(), "l1:3"),
    (PGD(), "l0:3"),
    (APGD(), "linf:0.1"),
    (APGD(restarts=2), "l2:1"),
    (APGD(n_targets=2), "linf:0.1"),
    (APGD(n_targets=2, loss="scaled_margin", tries=2), "linf:0.1"),
    (Square(), "linf:0.1"),
    (Square(), "l2:1"),
    (NormalizedGradient(), "l2"),
    (Strongest(), "linf:0.1"),
    (Strongest(), "l0:3"),
    (Transfer(PGD()), "linf:0.1"),
    (WithWiderKernels(PGD(), 0.1), "linf:0.1"),
    (WithBPDA(PGD()), "linf:0.1"),
]
SMALLEST = [
    (DDN(), "l2"),
    (FMN(), "linf"),
    (FMN(), "l2"),
    (FMN(), "l1"),
    (FMN(), "l0"),
    (SigmaZero(), "l0"),
    (CarliniWagnerL2(search_steps=3), "l2"),
    (CarliniWagnerL0(initial_const=1.0, largest_const=1e2), "l0"),
    (CarliniWagnerLinf(initial_const=1.0), "linf"),
]
ONE_STEP = [(FGSM(), "linf:0.1"), (FGM(), "l2:1")]
DRAWS = (RandomNoise(), "linf:0.1")
HALF = [
    (PGD(), "linf:0.1"),  # without a tolerance, whose stopping rule waits once more in bfloat16
    (PGD(random_start=True, restarts=2), "l2:1"),
    (APGD(), "linf:0.1"),
    (APGD(n_targets=2), "l2:1"),
    (DDN(), "l2"),
    (FMN(), "linf"),
    (FMN(), "l2"),
    (FMN(), "l0"),
    (SigmaZero(), "l0"),
    (NormalizedGradient(), "l2"),
    (CarliniWagnerL2(search_steps=3), "l2"),
]


def test_every_attack_is_counted():
    public = {getattr(attacks, name) for name in attacks.__all__}
    found = {one for one in public if isinstance(one, type) and issubclass(one, attacks.Attack)}
    bases = {attacks.Attack, attacks.SearchAttack, attacks.MinimumNormAttack}
    counted = {type(one) for one, _ in [*STEPPED, *SMALLEST, *ONE_STEP, DRAWS]}
    assert found - bases == counted


@pytest.mark.parametrize(("attack", "threat"), [*STEPPED, *SMALLEST], ids=repr)
def test_a_step_waits_at_most_once(attack, threat):
    more = added(attack, threat, precision="float32")
    assert more.passes >= SECOND - FIRST
    assert more.reads <= more.passes


@pytest.mark.parametrize(("attack", "threat"), HALF, ids=repr)
def test_a_step_with_bfloat16_gradients_waits_at_most_once(attack, threat):
    more = added(attack, threat, precision="bfloat16")
    assert more.passes >= SECOND - FIRST
    assert more.reads <= more.passes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("attack", "threat"), SMALLEST, ids=repr)
@pytest.mark.slow
def test_a_step_waits_at_most_once_where_every_image_is_solved(attack, threat, precision):
    """Successes that bfloat16 gradients find are checked by a pass of their own."""
    more = added(attack, threat, wall=10.0, precision=precision)
    assert more.reads <= max(more.passes, 0)


@pytest.mark.parametrize(("attack", "threat"), ONE_STEP, ids=repr)
def test_a_single_step_waits_once_for_each_batch(attack, threat):
    """The rest of the waits are checks of a call, which do not depend on the number of batches."""
    costs = [spent(attack, threat, 1000.0, batch_size=size) for size in (4, 2)]
    more = costs[1] - costs[0]
    assert more.passes == 3  # step, gradient and clean image of one more batch
    assert more.reads <= more.passes


def test_a_draw_of_noise_reads_lists_of_images_alone():
    """A draw is a restart: the unsolved images are found, and their keys, in tensors of the CPU."""
    more = added(*DRAWS)
    assert more.passes == SECOND - FIRST
    assert more.reads <= 2 * more.passes


@pytest.mark.parametrize(("attack", "threat"), [*STEPPED, *SMALLEST], ids=repr)
@pytest.mark.slow
def test_no_step_makes_a_tensor_on_the_cpu(attack, threat):
    """Its copy to a GPU would wait, too."""
    added(attack, threat, precision="float32")  # makes the patterns that an attack keeps
    assert added(attack, threat, precision="float32").uploads == 0


@pytest.mark.parametrize("goal", [Target(1), Target(torch.tensor([1, 2, 1, 2])), AnyError()])
@pytest.mark.parametrize("attack", [PGD(), APGD(), FMN()], ids=repr)
def test_no_goal_makes_a_tensor_on_the_cpu_in_every_step(attack, goal):
    more = added(attack, ThreatModel("linf", 0.1, goal), precision="float32")
    assert more.uploads == 0
    assert more.reads <= more.passes


@dataclass(frozen=True, repr=False)
class Curious(SearchAttack):
    """A negative control: it asks the device twice in each step."""

    steps: int = 1
    how: str = "item"

    def search(self, state):
        for _ in range(self.steps):
            loss = state.evaluate(state.images).loss
            if self.how == "item":
                loss[0].item()
                loss[1].item()
            elif self.how == "flags":
                loss[loss > 0]
                loss[loss > 0] = loss[loss > 0] + 1
            elif self.how == "truth":
                assert loss.max() >= loss.min()
                assert (loss == loss).all()
            elif self.how == "copy":
                loss.cpu().numpy()
                loss.tolist()
            elif self.how == "nonzero":
                loss.nonzero()
                torch.equal(loss, loss)
            else:
                state.drop_solved()


@pytest.mark.parametrize("how", ["item", "flags", "truth", "copy", "nonzero"])
def test_an_attack_that_asks_twice_in_a_step_is_caught(how):
    more = added(Curious(how=how), "linf:0.1")
    assert more.passes == SECOND - FIRST
    assert more.reads >= 2 * more.passes


def test_an_attack_that_asks_once_in_a_step_is_not_caught():
    more = added(Curious(how="drop"), "linf:0.1")
    assert more.reads <= more.passes == SECOND - FIRST


@pytest.fixture
def hashed(monkeypatch):
    """The numbers of images that were hashed, call by call."""
    calls = []
    original = seeds.image_keys

    def image_keys(images):
        calls.append(len(images))
        return original(images)

    monkeypatch.setattr(seeds, "image_keys", image_keys)
    return calls


def attack_once(attack, threat, wall=1000.0, batch_size=None, **options):
    classifier = Classifier(Fort(wall), 3)
    images = images_of(4)
    labels = torch.zeros(4, dtype=torch.int64)
    return attack(classifier, images, labels, threat, batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (FGSM(), "linf:0.1"),
        (FGM(), "l2:1"),
        (PGD(steps=3), "linf:0.1"),
        (PGD(steps=3, keep_maximizing=True), "l1:3"),
        (PGD(steps=3, loss="hinge"), "l0:3"),
        (FMN(steps=3), "linf"),
        (FMN(steps=3), "l0"),
        (DDN(steps=3), "l2"),
        (SigmaZero(steps=3), "l0"),
        (CarliniWagnerL2(steps=3, search_steps=2), "l2"),
        (CarliniWagnerL0(steps=3, initial_const=1.0, largest_const=10.0), "l0"),
        (CarliniWagnerLinf(steps=3, initial_const=1.0), "linf"),
        (NormalizedGradient(steps=3), "l2"),
        (WithWiderKernels(PGD(steps=3), 0.1), "linf:0.1"),
        (Strongest(steps=2), "l2"),
        (Strongest(steps=2), "linf"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("wall", [10.0, 1000.0])
def test_attacks_that_draw_nothing_hash_no_image(hashed, attack, threat, wall):
    attack_once(attack, threat, wall)
    assert hashed == []


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(steps=3, random_start=True), "linf:0.1"),
        (PGD(steps=3, restarts=3), "linf:0.1"),
        (APGD(steps=3), "linf:0.1"),
        (APGD(steps=3, n_targets=2), "l2:1"),
        (RandomNoise(draws=3), "l2:1"),
        (Square(n_queries=3), "linf:0.1"),
        (Square(n_queries=3, restarts=2), "l2:1"),
    ],
    ids=repr,
)
def test_attacks_that_draw_hash_each_image_once(hashed, attack, threat):
    """Not again for each restart, target or query."""
    attack_once(attack, threat)
    assert hashed == [4]
    hashed.clear()
    attack_once(attack, threat, batch_size=3)
    assert hashed == [3, 1]


def test_starting_points_for_every_run_need_no_draw(hashed):
    points = torch.stack([images_of(4, seed=1), images_of(4, seed=2)])
    attack_once(PGD(steps=3, restarts=2), "linf:0.1", starting_points=points)
    assert hashed == []
    attack_once(APGD(steps=3), "linf:0.1", starting_points=points[0])
    assert hashed == []


def test_ddn_hashes_images_once_where_it_is_blind(hashed):
    """R14: it steps at random there."""

    class Flat(nn.Module):
        def forward(self, images):
            total = images.flatten(1).sum(1)
            return torch.stack([total * 0 + 2, total * 0], 1)

    classifier = Classifier(Flat(), 2)
    with pytest.warns(UserWarning, match="blind"):
        DDN(steps=3)(classifier, images_of(2), torch.zeros(2, dtype=torch.int64), "l2")
    assert hashed == [2]


def test_adversarial_training_draws_and_hashes_once_a_batch(hashed):
    classifier = Classifier(Fort(), 3)
    labels = torch.zeros(4, dtype=torch.int64)
    threat = ThreatModel("linf", 0.1, Evade())
    PGD(steps=3).maximize(classifier, images_of(4), labels, threat)
    assert hashed == []
    PGD(steps=3, random_start=True).maximize(classifier, images_of(4), labels, threat)
    assert hashed == [4]
