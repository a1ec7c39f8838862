"""The background-class paper, and what it lacks: attackers that know the defence, and curves."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from demur import attacks, seeds
from demur.data import ImageSet
from demur.data.background import FitPredict, Selection, confusing_classes
from demur.errors import DemurError
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.goals import AnyError, ForceReject, Target
from demur.progress import Silent, reporting
from demur.studies.background_class import tables
from demur.studies.background_class.material import Material, gather
from demur.studies.background_class.profile import Profile
from demur.studies.background_class.recipes import Split, Training, shuffled
from demur.studies.background_class.tables import DEFENDED, PLAIN, Attackers, Cells
from demur.studies.recipes import FalseRejectionRate, WithoutReject, rejected
from demur.studies.study import Shown, Study
from demur.threat import ThreatModel

TITLE = "Background class"
SOURCE = "McCoyd & Wagner 2018, Background Class Defense Against Adversarial Examples"
PGD_STEPS = 40
MOST = 2000
"""Out-of-distribution images of each kind, at most."""


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed: the selection, and then the rest.

    Raises
    ------
    DemurError
        If data is missing, or the profile does not fit it.
    """
    material = gather(profile, data_root, seed)
    folds: dict[tuple[int, int], Evaluate] = {}
    recipe = Training(profile.selection.epochs, profile.batch_size)

    def planned(train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int) -> Tensor:
        model = Train(recipe, train, seed, name=f"selection, fold {fold + 1}")
        folds[repeat, fold] = Evaluate(model, test, None, split="selection", repeat=repeat)
        return test.labels

    def measured(outputs: Outputs) -> Study:
        def found(train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int) -> Tensor:
            return torch.tensor(outputs.records([folds[repeat, fold]])["prediction"].to_list())

        rest = _rest(profile, material, _select(profile, material, seed, found), seed)
        return replace(rest, nodes=(*folds.values(), *rest.nodes))

    _select(profile, material, seed, planned)
    first = tuple(folds.values())
    return Study(first, material.data, material.taken, lambda _: Shown([]), then=measured)


def _select(profile: Profile, material: Material, seed: int, predict: FitPredict) -> Selection:
    """Find the confusing kinds of background image by cross-validation (sec. IV.A)."""
    settings = profile.selection
    own = seeds.derive(seed, "selection")
    keys, others = material.keys, material.candidates
    chosen = material.for_selection.select_classes((*keys, *others))
    chosen = chosen.balanced(settings.per_class, own)
    options = settings.model_dump(include={"folds", "repeats", "cutoff"})
    with reporting(Silent()):  # nothing is computed here
        return confusing_classes(chosen, keys, others, predict, seed=own, **options)


def _rest(profile: Profile, material: Material, selection: Selection, seed: int) -> Study:
    """Plan what depends on the selection."""
    kept = selection.kept if profile.background == "selected" else tuple(profile.background)
    if not kept:
        raise DemurError(
            "no kind of background image is told apart from the keys at the cutoff of "
            f"{profile.selection.cutoff:g}: lower it."
        )
    cells = Cells(profile, material, selection, kept)
    split = Split(material.keys, kept, profile.held_out, seed, profile.background_share)
    for number in range(profile.splits):
        _measure(cells, replace(split, seed=seeds.derive(seed, "split", number)), number)
    trade = profile.trade_off
    ranked = tuple(row.name for row in selection.table)
    for count in dict.fromkeys(min(count, len(ranked)) for count in trade.kept):
        for repeat in range(trade.repeats):
            own = seeds.derive(seeds.derive(seed, "trade-off"), "split", repeat)
            some = replace(split, background=ranked[:count], seed=own, key_images=trade.key_images)
            _trade(cells, some, repeat)
    nodes = (*cells.lines, *cells.strange)
    seen = (tables.NAIVE, tables.AWARE)
    shown = [node for node, line in cells.lines.items() if line.endswith(seen)]
    shown = [node for node in shown if node.keep == "stored"]
    shown.sort(key=lambda node: node.scored_on.name != DEFENDED)
    show = partial(tables.show, cells)
    return Study(nodes, material.data, material.taken, show, tuple(shown), profile.gallery)


def one_step(name: str, threat: ThreatModel) -> Attackers:
    """Give the attackers in one step: the paper's, those that know the reject column, and denial.

    The paper's uses the cross-entropy of the true class and ignores the reject column.
    """
    margin = attacks.FGSM() if threat.norm == "linf" else attacks.FGM()
    entropy = replace(margin, loss="cross_entropy")
    found: Attackers = {
        tables.NAIVE: (entropy, replace(threat, goal=AnyError()), "defence-unaware"),
        tables.AWARE: (margin, threat, "defence-aware"),
        tables.BY_ENTROPY: (entropy, threat, "defence-aware"),
        tables.FORCING: (margin, replace(threat, goal=ForceReject()), "defence-aware"),
    }
    return {f"{name} eps {threat.eps:g}, {label}": attacker for label, attacker in found.items()}


def attackers(profile: Profile) -> Attackers:
    """Give the attackers of Tables IV and V, one in many steps (R11), and noise (R13)."""
    threats = {"FGS": ThreatModel("linf", profile.fgs_eps), "FG": ThreatModel("l2", profile.fg_eps)}
    found: Attackers = {}
    for name, threat in threats.items():
        found |= one_step(name, threat)
    pgd = attacks.PGD(steps=PGD_STEPS)
    noise = attacks.RandomNoise(draws=profile.noise_draws)
    for threat in threats.values():
        found[f"PGD eps {threat.eps:g}, {tables.AWARE}"] = (pgd, threat, "strongest")
    for threat in threats.values():
        line = f"noise eps {threat.eps:g}, best of {noise.draws} draws"
        found[line] = (noise, threat, "defence-aware")
    return found


def _without(found: Attackers, *what: str) -> Attackers:
    return {line: one for line, one in found.items() if not any(word in line for word in what)}


def _measure(cells: Cells, split: Split, number: int) -> None:
    """Train both models on one split, attack them, and show them images of no key class."""
    profile = cells.profile
    images = cells.material.images
    train, test, used, spare = split.parts(images)
    recipe = Training(profile.epochs, profile.batch_size, split)
    alone = replace(recipe, split=replace(split, background=(), share=None))
    plain = Train(alone, images, split.seed, name=PLAIN)
    defended = Train(recipe, images, split.seed, name=DEFENDED)
    lines = attackers(profile)
    attacked = test if profile.attacked is None else test.sample(profile.attacked, split.seed)
    strange = _strange(cells, split, spare)
    keep = "nothing" if number else "stored"
    for model, own in ((plain, _without(lines, tables.FORCING)), (defended, lines)):
        add = partial(cells.add, model, base=plain, repeat=number)
        add(test, tables.CLEAN)
        add(attacked, own, seed=split.seed, keep=keep)
        cells.strange.append(Measure(rejected, (model, *strange), model.name))
    _carlini(cells, plain, defended, test, split.seed, number)
    if number == 0:
        counts = (len(train), len(test), len(used))
        names = ("train key images", "test key images", "train background")
        cells.sizes.update(zip(names, counts, strict=True))
        _curves(cells, plain, defended, test, split.seed)


def _strange(cells: Cells, split: Split, spare: Tensor) -> list[tuple[str, Tensor]]:
    """Give images of none of the key classes (R21)."""
    images = cells.material.images
    left_out = tuple(name for name in cells.material.candidates if name not in cells.kept)
    shape = (MOST, *images.image_shape)
    drawn = seeds.generator(split.seed, "noise")
    kinds = {
        "kept kinds, images not trained on": spare,
        "kinds left out": shuffled(images, left_out, split.seed),
        "uniform noise": torch.randint(0, 256, shape, generator=drawn, dtype=torch.uint8),
    }
    return [(kind, found[:MOST]) for kind, found in kinds.items() if len(found)]


def _carlini(
    cells: Cells, plain: Train, defended: Train, test: ImageSet, seed: int, number: int
) -> None:
    """Add Carlini & Wagner's attack. The whole model decides the outcomes."""
    settings = cells.profile.carlini
    images = test.balanced(settings.per_class, seed)
    attack = attacks.CarliniWagnerL2(search_steps=settings.search_steps, steps=settings.steps)
    keys = seeds.image_keys(images.to_float())
    classes = images.num_classes
    others = 1 + (seeds.uniform(keys, (), seed, "targets") * (classes - 1)).long()
    targeted = ThreatModel("l2", goal=Target((images.labels + others) % classes))
    aware: Attackers = {
        f"Carlini, {tables.TARGETED}": (attack, targeted, "defence-aware"),
        f"Carlini, {tables.NEAREST}": (attack, ThreatModel("l2"), "defence-aware"),
    }
    unaware: Attackers = {f"Carlini, {tables.UNAWARE}": (attack, targeted, "defence-unaware")}
    alone = Train(WithoutReject(), images, seed, base=defended, name=DEFENDED)
    add = partial(cells.add, images=images, base=plain, repeat=number, split="Carlini")
    add(plain, lines=aware)
    add(defended, lines=aware)
    add(alone, lines=unaware, through=defended)


def _curves(cells: Cells, plain: Train, defended: Train, test: ImageSet, seed: int) -> None:
    """Attack part of the first split's test images; the others set the thresholds (R17)."""
    settings = cells.profile.curve
    order = torch.randperm(len(test), generator=seeds.generator(seed, "curve"))
    images = test.subset(order[: settings.images])
    validation = test.subset(order[settings.images :])
    add = partial(cells.add, images=images, base=plain, seed=seed)
    for model in (plain, defended):
        for eps in settings.eps:
            lines = _without(one_step("FGS", ThreatModel("linf", eps)), tables.FORCING)
            add(model, lines=lines, split="eps curve")
    lines = _without(one_step("FGS", ThreatModel("linf", cells.profile.fgs_eps)), tables.FORCING)
    for rate in settings.rejected:
        name = f"{DEFENDED} at {100 * rate:g} % rejection"
        moved = Train(FalseRejectionRate(rate), validation, seed, base=defended, name=name)
        add(moved, lines=tables.CLEAN | lines, split="rejection curve")


def _trade(cells: Cells, split: Split, repeat: int) -> None:
    """Train on some kinds of background alone, and attack in one step (end of sec. IV.B)."""
    profile = cells.profile
    images = cells.material.images
    _, test, _, _ = split.parts(images)
    count = len(split.background)
    name = f"{DEFENDED} ({count} kind{'s' * (count != 1)})"
    recipe = Training(profile.trade_off.epochs, profile.batch_size, split)
    model = Train(recipe, images, split.seed, name=name)
    some = test.sample(profile.curve.images, split.seed)
    add = partial(cells.add, model, repeat=repeat, seed=split.seed, split="trade-off")
    add(test, tables.CLEAN)
    add(some, _without(attackers(profile), tables.FORCING, "PGD", "noise"))
