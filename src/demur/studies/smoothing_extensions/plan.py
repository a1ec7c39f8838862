"""Does training that separates embeddings help behind a filter? Measured."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from demur import seeds
from demur.attacks import PGD, AnyError, NormalizedGradient, Strongest, Target
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.tables import Case
from demur.studies.material import Part, describe_parts, gather_part
from demur.studies.recipes import SmallNetwork
from demur.studies.smoothing.plan import other_classes
from demur.studies.smoothing_extensions.profile import Profile
from demur.studies.smoothing_extensions.recipes import Separated, SeparatingLoss
from demur.studies.smoothing_extensions.tables import TARGETED, show
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Smoothing, its conclusion"
SOURCE = "Jézéquel 2019, conclusion: embeddings of classes that are far apart"
FILTERLESS = "no filter"


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    part = gather_part(profile, profile.attack.images, data_root, seed)
    cases = []
    models = _models(profile, part, seed)
    for (filtered, trained), model in models.items():
        base = models[FILTERLESS, "cross-entropy"]
        for column, node in _attacked(profile, part, model, base, seed).items():
            cases.append(Case(node, {"group": trained, "row": filtered, "column": column}))
    return Study(
        nodes=tuple(case.node for case in cases),
        data=describe_parts([part], None),
        taken=f"Data: {part.taken}.",
        show=partial(show, profile, cases),
        gallery=tuple(case.node for case in cases if case.labels["column"] == TARGETED),
        pictures=profile.gallery,
    )


def _models(profile: Profile, part: Part[Profile], seed: int) -> Mapping[tuple[str, str], Train]:
    """A model for each filter and each training."""
    epochs, size = profile.epochs, profile.batch_size
    filters = {FILTERLESS: SmallNetwork(epochs, size)}
    filters |= {
        f"Gaussian, {one:g}": SmallNetwork(epochs, size, sigma=one) for one in profile.gaussian
    }
    filters |= {
        f"median, {one}x{one}": SmallNetwork(epochs, size, window=one) for one in profile.median
    }
    for one in filters.values():
        one.untrained(part.train, seed).scores(part.test.to_float(torch.tensor([0])))
    term = SeparatingLoss(profile.separation.weight, profile.separation.temperature)
    attack = PGD(steps=profile.separation.steps, random_start=True)
    threat = ThreatModel("linf", profile.attack.eps)
    trainings = {
        "cross-entropy": (None, None),
        "separated": (term, None),
        "attacked images": (None, attack),
        "separated, attacked images": (term, attack),
    }
    return {
        (filtered, trained): Train(
            Separated(plain, loss, attacked, threat if attacked else None),
            part.train,
            seed,
            name=f"{filtered}, {trained}",
        )
        for trained, (loss, attacked) in trainings.items()
        for filtered, plain in filters.items()
    }


def _attacked(
    profile: Profile, part: Part[Profile], model: Train, base: Train, seed: int
) -> dict[str, Evaluate]:
    """The clean images, the paper's targeted steps, and three attackers in Linf."""
    attack = profile.attack
    images = part.test.sample(attack.images, seeds.derive(seed, "attacked"))
    keys = seeds.image_keys(images.to_float())
    goal = Target(other_classes(keys, images.labels, images.num_classes, seed))
    linf = ThreatModel("linf", attack.eps)
    descent = PGD(steps=attack.steps)
    surest = PGD(steps=attack.steps, loss="cross_entropy", keep_maximizing=True)
    step = NormalizedGradient(step_size=attack.step_size, steps=attack.targeted_steps)
    ensemble = Strongest(attack.ensemble_steps, attack.n_queries, attack.n_targets)
    shared: dict[str, Any] = {"seed": seed, "base": base, "split": "attacked"}
    on: Any = partial(Evaluate, model, images, **shared)
    unaware: Any = partial(Evaluate, base, images, through=model, **shared)
    return {
        "clean": Evaluate(model, part.test, None, seed=seed, base=base),
        "before": on(None),
        TARGETED: on(ThreatModel("l2", goal=goal), step, attacker="defence-aware", keep="stored"),
        "sent": unaware(replace(linf, goal=AnyError()), surest, attacker="defence-unaware"),
        "PGD": on(linf, descent, attacker="defence-aware"),
        "ensemble": on(linf, ensemble, attacker="strongest"),
    }
