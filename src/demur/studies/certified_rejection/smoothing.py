"""The part in L2: certified consistency by randomized smoothing."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from demur import seeds
from demur.attacks import PGD
from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.attacks.transfer import tried
from demur.certificates import Prover
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import CertifiedConsistency
from demur.evaluation.nodes import Node, Train
from demur.evaluation.on_images import Certify, Evaluate
from demur.studies.certified_rejection.profile import SmoothingProfile
from demur.studies.certified_rejection.recipes import Noisy, Smoothed
from demur.threat import ThreatModel, as_threat

SPLIT = "smoothed"
"""The records of attacks in L2."""
AT_ONCE = 16
"""Images that are attacked at once: each has 64 noisy copies."""


@dataclass(frozen=True, repr=False)
class OnExpectation(Attack):
    """Attack the expectation over some draws, and score the result with all draws.

    Backward passes and zero gradients of the result are those of the expectation: an attack that
    was blind is visible (R14).

    Parameters
    ----------
    attack : Attack
    draws : int, default 64
    common : bool, default False
        Whether all images have the same noise at every step.
    """

    attack: Attack
    draws: int = 64
    common: bool = False

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        **options: Any,
    ) -> AttackResult:
        """Attack the surrogate of certified consistency by smoothing."""
        assert isinstance(classifier, CertifiedConsistency)
        surrogate = classifier.surrogate(self.draws, self.common)
        threat = as_threat(threat)
        sent = self.attack(surrogate, images, labels, threat, **options)
        shared = {key: options[key] for key in ("seed", "batch_size") if key in options}
        found = tried(classifier, images, labels, threat, sent, **shared)
        return replace(found, backwards=sent.backwards, zero_gradients=sent.zero_gradients)


def smoothed(
    profile: SmoothingProfile,
    batch_size: int,
    train: ImageSet,
    held: ImageSet,
    test: ImageSet,
    seed: int,
) -> list[Node]:
    """Plan the models of each case, what is proven of them, and attacks.

    Parameters
    ----------
    profile : SmoothingProfile
    batch_size : int
        Of the training.
    train, held, test : ImageSet
    seed : int
    """
    certified = test.sample(profile.images, seeds.derive(seed, "smoothed"))
    attacked = certified.sample(profile.attacked, seeds.derive(seed, "smoothed, attacked"))
    # Fresh noise from the image itself; common noise from a random point.
    walks = [
        OnExpectation(
            PGD(steps=profile.steps, random_start=common, keep_maximizing=True), common=common
        )
        for common in (False, True)
    ]
    prover = Prover(steps=0)
    nodes: list[Node] = []
    for case in profile.cases:
        noisy = Noisy(profile.epochs, batch_size, case.sigma, case.weight)
        base = Train(noisy, train, seed, name=f"trained with noise, sigma {case.sigma:g}")
        recipe = Smoothed(case.sigma, case.delta, profile.draws, profile.alpha)
        model = Train(recipe, held, seed, base=base, name=case.name)
        threat = ThreatModel("l2", case.eps)
        nodes += [base, model, Certify(model, certified, threat, prover)]
        nodes += [
            Evaluate(
                model,
                attacked,
                threat,
                walk,
                seed=seed,
                batch_size=AT_ONCE,
                attacker="defence-aware",
                split=SPLIT,
            )
            for walk in walks
        ]
    return nodes
