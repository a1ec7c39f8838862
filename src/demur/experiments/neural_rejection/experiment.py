"""The rejection experiment from end to end: its images, its models, its attackers, its tables and its gallery."""

from collections.abc import Mapping
from pathlib import Path

import torch

from demur import seeds
from demur.classifier import Outcome
from demur.data import ImageSet
from demur.evaluation import NodeResult, offset_for
from demur.evaluation.pictures import describe, mixed
from demur.evaluation.results import Curve, Table, write_gallery
from demur.experiments.cells import Run
from demur.experiments.neural_rejection import attackers
from demur.experiments.neural_rejection.attackers import COMPARED, ENSEMBLE, PAPER, Attacked
from demur.experiments.neural_rejection.models import DNN, DNR, NR, Material, Model, build, prepare
from demur.experiments.neural_rejection.profile import Profile
from demur.experiments.neural_rejection.tables import Sheets
from demur.metrics.rejection import acceptance_threshold, confidences

__all__ = ["SOURCE", "TITLE", "carry_out", "prepare", "work"]

TITLE = "Neural rejection"
SOURCE = "Thanthulage 2020, deep neural rejection (after Melis et al. 2017 and Sotgiu et al. 2020)"
ACCEPTED = 0.99  # of the correct validation images, at the threshold of CCAT's robust error


def work(profile: Profile, material: Material) -> float:
    """Units of work, about one image trained on once, for the time left."""
    attack, strongest = profile.attack, profile.strongest
    images, steps = attack.images * attack.repeats, attack.steps * len(attack.eps) / 2
    trained = len(material.train) * (
        profile.epochs
        + profile.retraining.epochs
        + 2 * profile.adversarial.epochs * profile.adversarial.steps
    )
    fitted = 4 * 20 * (profile.machines.per_class or len(material.train))
    plain, deep = attackers.PASS[False], attackers.PASS[True]
    curves = 3 * images * steps * plain + 2 * images * steps * (3 * plain + 4 * deep)
    searched = images * strongest.steps * (3 * plain + 4 * 4 * deep)
    compared = len(COMPARED) * 2 * images * attack.steps * (plain + 2 * deep)
    thresholds = (
        2
        * (len(profile.thresholds.rates) + 1)
        * 2
        * profile.thresholds.steps
        * deep
        * profile.thresholds.images
    )
    return trained + fitted + curves + searched + compared + thresholds


def carry_out(
    profile: Profile, material: Material, run: Run, out: Path
) -> tuple[list[Table], list[Curve], list[str], list[str]]:
    """Run all cells; write the gallery; give the tables, the curves, the summary and the warnings."""
    models, network = build(profile, material, run)
    total = material.test.sample(
        profile.attack.images * profile.attack.repeats, seeds.derive(run.seed, "attacked")
    )
    sent = {
        key: attackers.unaware_cell(profile, model, total, run)
        for key, model in {one.network_key: one for one in models.values()}.items()
    }
    found = {
        name: _attack(profile, model, sent[model.network_key], total, material, run)
        for name, model in models.items()
    }
    few = total.subset(torch.arange(profile.thresholds.images))
    moved = {
        name: _thresholds(profile, models[name], few, material.validation, run)
        for name in (NR, DNR)
    }
    sheets = Sheets(profile, material, models, network, found, moved, total)
    _write_pictures(profile, models, found, total, out)
    return sheets.tables(), sheets.curves(), sheets.summary(), sheets.warnings()


def _attack(
    profile: Profile,
    model: Model,
    unaware: NodeResult,
    images: ImageSet,
    material: Material,
    run: Run,
) -> Attacked:
    """All attackers on one model. The compared attacks do not count for the strongest ensemble: they do not run on all models."""
    others = attackers.other_classes(images, material.validation, run.seed)
    judged = attackers.judged_cell(model, unaware, images, run)
    paper = attackers.paper_cell(profile, model, images, others, run)
    strongest = attackers.strongest_cell(profile, model, images, run)
    wanted = COMPARED if model.name in (DNN, NR, DNR) else (ENSEMBLE,)
    compared = {
        attack: attackers.compared_cell(profile, model, attack, images, material.validation, run)
        for attack in wanted
    }
    everywhere = [cell.tensors["distance"] for cell in (paper, strongest, compared[ENSEMBLE])]
    distance = attackers.nearest(judged, unaware, images, Outcome.WRONG, everywhere)
    forced = [strongest.tensors["rejected_at"], attackers.rejected_by(profile, paper)]
    rejected_at = attackers.nearest(judged, unaware, images, Outcome.REJECTED, forced)
    worst = attackers.worst(profile, judged, paper, distance, rejected_at)
    out_of_distribution = (
        attackers.out_of_distribution_cell(model, tuple(images.images.shape[1:]), run)
        if model.rejects
        else None
    )
    return Attacked(
        judged, paper, strongest, compared, worst, distance, rejected_at, out_of_distribution
    )


def _thresholds(
    profile: Profile, model: Model, images: ImageSet, validation: ImageSet, run: Run
) -> dict[float | str, NodeResult]:
    """The model at other thresholds, set on validation images: by false rejection rate, and where 99 % of the correct are accepted."""
    clean = validation.to_float()
    offsets: dict[float | str, float] = {
        rate: offset_for(model.classifier, clean, rate) for rate in profile.thresholds.rates
    }
    confidence, classes = confidences(model.classifier, clean)
    accepted = acceptance_threshold(confidence.double(), classes == validation.labels, ACCEPTED)
    offsets["accepted"] = accepted - 1e-5 * max(
        1.0, abs(accepted)
    )  # a hair below: adding it to a float32 score rounds
    return {
        at: attackers.threshold_cell(profile, model, offset, images, run)
        for at, offset in offsets.items()
    }


def _write_pictures(
    profile: Profile,
    models: Mapping[str, Model],
    found: Mapping[str, Attacked],
    images: ImageSet,
    out: Path,
) -> None:
    """What the paper's attack makes of some images, for the gallery (Figure 10)."""
    each = profile.gallery // 3
    described, originals, attacked = [], [], []
    for place, name in enumerate((DNR, NR, DNN)):
        tensors = found[name].paper.tensors
        index = torch.tensor(mixed(tensors["stored_outcomes"], place)[:each], dtype=torch.int64)
        originals.append(images.images[index])
        attacked.append(tensors["images"][index])
        what = f"PGD in L2, eps {profile.strongest.eps:g}"
        shown = images.subset(index) if each else None
        rejects = models[name].rejects
        described.append(
            list(describe(models[name].classifier, name, what, PAPER, shown, attacked[-1], rejects))
            if shown
            else []
        )
    pictures = [picture for turn in zip(*described, strict=True) for picture in turn]
    write_gallery(
        out, pictures, *(torch.stack(parts, dim=1).flatten(0, 1) for parts in (originals, attacked))
    )
