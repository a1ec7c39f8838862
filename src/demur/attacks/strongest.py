"""The strongest answer that demur has: an ensemble of attacks, of which the worst counts, image by
image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from demur.attacks.apgd import APGD
from demur.attacks.base import Attack
from demur.attacks.book import Regularizer
from demur.attacks.carlini_wagner import CarliniWagnerL2
from demur.attacks.checks import check_regularizer, check_request, warn
from demur.attacks.engine import GradientPrecision
from demur.attacks.fast_minimum_norm import DDN, FMN
from demur.attacks.frozen import frozen, kernel_machines
from demur.attacks.pgd import PGD
from demur.attacks.result import AttackResult
from demur.attacks.sampling import SquareSample, attack_in_stages
from demur.attacks.sigma_zero import SigmaZero
from demur.attacks.square import Square
from demur.attacks.tally import Tally, margins_of
from demur.attacks.wrappers import WithWiderKernels
from demur.classifier import Classifier, check_counts, device_of, raising_module_errors
from demur.errors import DemurError
from demur.masks import check_mask
from demur.threat import ThreatModel, as_threat

WIDER = (0.3, 0.1)
"""Factors of gamma that help on neural rejection of MNIST and of the embedded digits."""
TRIES = 3
"""Runs toward a target that came near: few images have one, and chance decides about these."""
SCORES_ONLY = (
    "the classifier gives no gradient: of the ensemble, Square alone attacks it, by its scores. It "
    "finds fewer errors than attacks with gradients. Call the network without torch.no_grad."
)


@dataclass(frozen=True, eq=False, repr=False)
class EnsembleResult(AttackResult):
    """The result of `Strongest`.

    Attributes
    ----------
    by : tuple of str
        For each image, the repr of the attack that broke it, or that changed it least; "" if none
        broke it.
    sampled : SquareSample or None
        On how many images Square ran, and what that says of the others. None if Square is no member
        of the ensemble, or if no image was left for it.
    scores_only : bool
        The classifier gave no gradient, so Square was the only attack. Success is then rarer than
        with gradients, and says less about robustness.
    """

    by: tuple[str, ...]
    sampled: SquareSample | None = None
    scores_only: bool = False


@dataclass(frozen=True, repr=False)
class Strongest(Attack):
    """The ensemble: one attack after another, each on the images that are still unbroken.

    With an eps, the order is: one step of eps and PGD in 10 steps, which break most images of an
    undefended model; then

    - in Linf and L2: APGD by margin and by cross-entropy, APGD toward each of the `n_targets`
      nearest wanted classes by margin and by scaled margin, FMN (in L2 DDN), and Square, which sees
      what gradients hide;
    - in L1: PGD by margin and by cross-entropy from random starts, FMN;
    - in L0: SigmaZero, FMN, PGD.

    Without an eps every attack meets every image, and the smallest change counts: in L2 DDN, FMN
    and CarliniWagnerL2, in Linf and L1 FMN with long and with short steps, in L0 SigmaZero and FMN.
    A classifier without gradients meets Square alone. A classifier with kernel machines meets most
    attacks three times, twice with gradients through wider kernels (R20). `attacks_for` lists the
    members.

    Parameters
    ----------
    steps : int, default 100
        Steps of each attack. DDN and FMN take twice as many, except in Linf and L2 with an eps;
        SigmaZero and CarliniWagnerL2 take ten times as many.
    n_queries : int, default 5000
        Queries of Square.
    n_targets : int, default 9
        Targets of APGD.
    square_sample : int or None, default 128
        Square attacks a random sample of so many images, and half as many of those that came
        nearest to an error; after a success it attacks more. The sample is one of the images of
        this call that are left: an image may be broken in one call and be left out in a call with
        other images. The result says what was left out, and with which bound. None attacks all.
    give_up : bool, default True
        Whether targeted APGD leaves a target that it will hardly reach, and Square an image; see
        there. Not where Square is the only attack.

    Notes
    -----
    `strongest.PROFILES` holds the ensembles "quick", "standard" (the defaults) and "thorough",
    which leaves out nothing.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> clf = Classifier(module, 3)
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> ensemble = attacks.Strongest(steps=20, n_queries=100)
    >>> [type(attack).__name__ for attack in ensemble.attacks_for("linf:0.5", clf, images)]
    ['PGD', 'PGD', 'APGD', 'APGD', 'APGD', 'APGD', 'FMN', 'Square']
    >>> ensemble(clf, images, labels, "linf:0.5").success.tolist()
    [True, True]
    """

    steps: int = 100
    n_queries: int = 5000
    n_targets: int = 9
    square_sample: int | None = 128
    give_up: bool = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, n_queries=self.n_queries, n_targets=self.n_targets)
        if self.square_sample is not None:
            check_counts(square_sample=self.square_sample)

    def attacks_for(
        self, threat: ThreatModel | str, classifier: Classifier, images: Tensor
    ) -> list[Attack]:
        """List the members of the ensemble, in their order.

        Parameters
        ----------
        threat : ThreatModel or str
        classifier : Classifier
            Whether it has gradients and kernel machines decides which attacks take part.
        images : Tensor of shape (N, C, H, W) or (N, F)
            Vectors have no squares. One image is used to look for a gradient.

        Returns
        -------
        list of Attack

        Raises
        ------
        DemurError
            If the classifier has no gradients and the threat is not one for Square.
        """
        threat = as_threat(threat)
        if not _has_gradient(classifier, images):
            if threat.eps is None or threat.norm not in Square.norms:
                raise DemurError(
                    "the classifier gives no gradient: only linf and l2, with an eps, "
                    "can be attacked by its scores (Square)."
                )
            return [Square(n_queries=self.n_queries)]
        members = self._members(threat)
        if images.ndim != 4:
            members = [one for one in members if not isinstance(one.attack, Square)]
        if not kernel_machines(classifier):
            return [one.attack for one in members]
        return [attack for one in members for attack in one.with_wider_kernels()]

    def _members(self, threat: ThreatModel) -> list["_Member"]:
        norm = threat.norm
        walk = _Member(FMN(steps=2 * self.steps))
        decoupled = _Member(DDN(steps=2 * self.steps))
        fewest = _Member(SigmaZero(steps=10 * self.steps))
        if threat.eps is None:
            other = _Member(FMN(steps=2 * self.steps, step_size=1.0 if norm == "linf" else 10.0))
            wagner = _Member(CarliniWagnerL2(steps=10 * self.steps), widen=False)
            smallest = {
                "l2": [decoupled, walk, wagner],
                "linf": [walk, other],
                "l1": [walk, other],
                "l0": [fewest, walk],
            }
            return smallest[norm]
        quick = [_Member(PGD(steps=1), widen=False), _Member(PGD(steps=10))]
        random = PGD(steps=self.steps, random_start=True, restarts=2)
        if norm == "l1":
            by_entropy = replace(random, loss="cross_entropy")
            return [*quick, _Member(random), _Member(by_entropy), walk]
        if norm == "l0":
            return [*quick, fewest, walk, _Member(random)]
        targeted = APGD(
            steps=self.steps, n_targets=self.n_targets, give_up=self.give_up, tries=TRIES
        )
        return [
            *quick,
            _Member(APGD(steps=self.steps)),
            _Member(APGD(steps=self.steps, loss="cross_entropy")),
            _Member(targeted, widen=False),
            _Member(replace(targeted, loss="scaled_margin"), widen=False),
            _Member(DDN(steps=self.steps) if norm == "l2" else FMN(steps=self.steps)),
            _Member(Square(n_queries=self.n_queries, give_up=self.give_up), widen=False),
        ]

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        precision: GradientPrecision = "auto",
        regularizer: Regularizer | None = None,
    ) -> EnsembleResult:
        """Attack with the whole ensemble; see `Attack.__call__` for the other parameters.

        Parameters
        ----------
        regularizer : Regularizer, optional
            A term that is added to the loss of the attacks with an eps.

        Returns
        -------
        EnsembleResult
            Passes are summed over the members.
        """
        threat = as_threat(threat)
        check_request(classifier, images, labels, threat.goal)
        threat = replace(threat, mask=check_mask(threat.mask, images))
        batch_size = 128 if batch_size is None else batch_size
        check_counts(batch_size=batch_size)
        check_regularizer(regularizer, len(images), threat.eps is None)
        labels = labels.to(images.device)
        tally = Tally.of(images)

        def meet(attack: Attack, rows: Tensor) -> None:
            here = threat.select(rows, images)
            extra = None
            if regularizer is not None and not attack.minimum_norm:
                extra = regularizer.select(rows)
            found = attack(
                classifier,
                images[rows],
                labels[rows],
                here,
                seed=seed,
                batch_size=batch_size,
                precision=precision,
                regularizer=extra,
            )
            margins = margins_of(classifier, here.goal, found, labels[rows], batch_size)
            tally.add(rows, found, margins, repr(attack))

        members = self.attacks_for(threat, classifier, images)
        sampled = None
        scores_only = not _has_gradient(classifier, images)
        if scores_only:
            warn(SCORES_ONLY)
        for attack in members:
            left = tally.left(bounded=threat.eps is not None)
            if not len(left):
                break
            if isinstance(attack, Square):
                size = self.square_sample if len(members) > 1 else None
                sampled = attack_in_stages(partial(meet, attack), tally, images, size, seed)
            else:
                meet(attack, left)
        by = tuple(tally.by)
        return EnsembleResult(**vars(tally.best), by=by, sampled=sampled, scores_only=scores_only)


@dataclass(frozen=True)
class _Member:
    """An attack of the ensemble, and whether it follows gradients from so far that wider kernels
    help.
    """

    attack: Attack
    widen: bool = True

    def with_wider_kernels(self) -> list[Attack]:
        """Give the attack, and the attack through wider kernels."""
        wider = [WithWiderKernels(self.attack, factor) for factor in WIDER] if self.widen else []
        return [self.attack, *wider]


def _has_gradient(classifier: Classifier, images: Tensor) -> bool:
    image = images[:1].detach().clone()  # a tensor of inference mode takes no gradient
    image = image.to(device_of(classifier, images.device)).requires_grad_()
    with frozen(classifier), torch.enable_grad(), torch.random.fork_rng():
        scores = classifier(image)
        if not scores.requires_grad:
            return False
        with raising_module_errors(image):
            (gradient,) = torch.autograd.grad(scores.sum(), image, allow_unused=True)
        return gradient is not None


PROFILES: Final[Mapping[str, Strongest]] = {
    "quick": Strongest(steps=40, n_queries=2000, n_targets=3, square_sample=32),
    "standard": Strongest(),
    "thorough": Strongest(n_queries=10_000, square_sample=None, give_up=False),
}
"""Ensembles for an audit: minutes on a CPU; the figure to defend; everything on every image."""
