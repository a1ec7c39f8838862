"""Tables, curves and sentences of the smoothing experiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.evaluation.results import Curve, Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, front, series, share, written
from demur.experiments.cells import blind
from demur.experiments.smoothing.filters import (
    BOX,
    IDENTITY,
    IGNORES,
    NONE,
    THROUGH,
    SetFound,
    broken_alone,
)
from demur.experiments.smoothing.photographs import NetworkFound
from demur.experiments.smoothing.profile import Profile
from demur.experiments.smoothing.tuning import PUBLIC, WHITE, Tuned
from demur.metrics import rates
from demur.studies.album import Album

PAPER_BEST = "Gaussian, sigma 1.5"
ATTACKERS = (IGNORES, THROUGH, IDENTITY, BOX)


@dataclass(frozen=True)
class Sheets:
    """What a run found, and how it is written down."""

    profile: Profile
    found: Sequence[SetFound]
    album: Album | None
    networks: Sequence[NetworkFound]
    tuned: Sequence[Tuned]
    embedded: bool

    def tables(self) -> list[Table]:
        """All tables."""
        pictures = [self._photographs(), self._transfer()] if self.networks else []
        return [
            self._rankings(),
            self._attackers(),
            *pictures,
            *([self._tuned()] if self.tuned else []),
            self._front(),
        ]

    def _front(self) -> Table:
        no_attack, unaware, aware, strongest = ATTACKED_BY
        found = {}
        for one in self.found:
            for model in one.models:
                lines = {
                    no_attack: one.clean[model].tensors["outcomes"],
                    unaware: _ignoring(one, model),
                }
                lines |= {
                    aware: one.attackers[model, THROUGH].tensors["outcomes"],
                    strongest: one.worst(model),
                }
                found[f"{one.part.settings.name}: {model}"] = {
                    who: [rates(own)] for who, own in lines.items()
                }
        eps = ", ".join(
            f"{written(one.part.settings.eps)} on {one.part.settings.name}" for one in self.found
        )
        return front(
            found,
            f"Linf, eps {eps}. The defence-unaware attacker ignores the filter; the defence-aware one "
            "differentiates through it.",
        )

    def _rankings(self) -> Table:
        rows = []
        for one in self.found:
            name = one.part.settings.name
            products, kept = products_of(one), robust_of(one)
            by_product, by_robust = _places(products), _places(kept)
            for model in one.models:
                targeted = one.targeted[model].tensors
                clean = rates(one.clean[model].tensors["outcomes"])
                rows.append(share(model, "clean accuracy", [(clean.correct, clean.n)], group=name))
                count = len(targeted["success"])
                rows.append(
                    share(
                        model,
                        "target reached",
                        [(int(targeted["success"].sum()), count)],
                        group=name,
                    )
                )
                distance = distance_of(one, model)
                rows.append(
                    Measurement(
                        model,
                        "mean L2",
                        name,
                        measured=distance,
                        n=int(targeted["success"].sum()),
                        note="" if distance else "none",
                    )
                )
                rows.append(
                    Measurement(
                        model,
                        "steps",
                        name,
                        measured=float(targeted["steps"].double().mean()),
                        n=count,
                    )
                )
                rows.append(
                    Measurement(
                        model,
                        "accuracy x distance",
                        name,
                        measured=products.get(model),
                        note="" if distance else "no target reached",
                    )
                )
                rows.append(
                    Measurement(
                        model,
                        "rank by the product",
                        name,
                        measured=by_product.get(model),
                        note="" if distance else "no target reached",
                    )
                )
                strong = rates(one.worst(model))
                rows.append(
                    share(model, "robust accuracy", [(strong.correct, strong.n)], group=name)
                )
                rows.append(
                    Measurement(model, "rank by robust accuracy", name, measured=by_robust[model])
                )
        eps = ", ".join(
            f"{written(one.part.settings.eps)} on {one.part.settings.name}" for one in self.found
        )
        attack = self.profile.attack
        note = (
            f"The paper's attack moves towards a random other class in steps of {attack.step_size:g}, "
            f"at most {attack.targeted_steps:,}, on {attack.images:,} test images. Its measure of a "
            "filter is accuracy times the mean distance of the changes found. Robust accuracy: "
            f"correct under the worst of all attackers, in Linf (eps {eps}), on "
            f"{self.profile.strongest.images:,} images."
        )
        return Table("Filters, ranked by the paper's product and by robust accuracy", rows, note)

    def _attackers(self) -> Table:
        rows = []
        for one in self.found:
            for model in one.models:
                for attacker in ATTACKERS:
                    if (model, attacker) in one.attackers:
                        found = rates(one.attackers[model, attacker].tensors["outcomes"])
                        rows.append(
                            share(
                                model,
                                attacker,
                                [(found.wrong, found.n)],
                                group=one.part.settings.name,
                            )
                        )
                for column, outcomes in (
                    ("strongest ensemble", one.strongest[model].tensors["outcomes"]),
                    ("worst of all", one.worst(model)),
                ):
                    found = rates(outcomes)
                    rows.append(
                        share(model, column, [(found.wrong, found.n)], group=one.part.settings.name)
                    )
        note = (
            "Wrong answers of each network. The defence-unaware attacker attacks the network behind "
            "the filter; its images then pass through the filter. This is transfer, not a measure of "
            f"the defence. The other attackers know the filter and use {self.profile.attack.steps} "
            "steps of projected gradient descent: with its own gradient (a subgradient for the "
            "median), or with that of the identity or of a box blur in its place (BPDA)."
        )
        return Table("Wrong answers under each attacker", rows, note)

    def _photographs(self) -> Table:
        assert self.profile.photographs is not None and self.album is not None
        rows = []
        common = reached_by_all(self.networks)
        for one in sorted(self.networks, key=lambda one: -hardness(one, common)):
            tensors = one.attacked.tensors
            found, count = tensors["success"], len(tensors["success"])
            rows.append(Measurement(one.name, "layers", measured=float(one.layers)))
            rows.append(Measurement(one.name, "weights (millions)", measured=one.weights / 1e6))
            rows.append(share(one.name, "target reached", [(int(found.sum()), count)]))
            rows.append(
                share(one.name, "target reached, 8 bits", [(int(tensors["stored"].sum()), count)])
            )
            rows.append(
                Measurement(
                    one.name,
                    "median steps",
                    measured=float(tensors["steps"].double().median()),
                    n=count,
                )
            )
            mean = hardness(one, common) if bool(common.any()) else None
            rows.append(
                Measurement(
                    one.name,
                    "mean L2",
                    measured=mean,
                    n=int(common.sum()),
                    note="" if mean is not None else "none",
                )
            )
            rows.append(
                Measurement(
                    one.name,
                    "confidence in the target",
                    measured=float(tensors["confidence"].mean()),
                    n=count,
                )
            )
        note = (
            f"{count} photographs, each attacked towards a random class, the same for all networks, in "
            f"steps of {self.profile.photographs.step_size:g} in L2; the hardest network first. Layers: "
            "convolutional and dense layers. The mean is over the photographs for which the attack "
            "reached the target on all networks. " + " ".join(self.album.notes)
        )
        return Table("Photographs: which network is hardest (section 2.2)", rows, note.strip())

    def _transfer(self) -> Table:
        rows = []
        for one in self.networks:
            for other, cell in one.answers.items():
                knew = cell.tensors["clean"] == cell.tensors["labels"]
                wrong = knew & (cell.tensors["attacked"] != cell.tensors["labels"])
                rows.append(
                    share(
                        one.name,
                        other,
                        [(int(wrong.sum()), int(knew.sum()))],
                        note="itself" if other == one.name else "",
                    )
                )
                if other != one.name:
                    reached = cell.tensors["attacked"] == one.attacked.tensors["targets"]
                    rows.append(
                        share(one.name, f"{other}: target", [(int(reached.sum()), len(reached))])
                    )
        note = (
            "Photographs attacked on the network of the row and classified by that of the column: the "
            "share of its correct photographs that are now wrong, and the share that is classified as "
            "the target. An attack that stops at the first success transfers little."
        )
        return Table("Photographs: transfer from network to network", rows, note)

    def _tuned(self) -> Table:
        assert self.profile.tuning is not None
        settings, rows = self.profile.tuning, []
        for one in self.tuned:
            lines = {"clean": one.clean, **one.attacked}
            for column, cell in lines.items():
                found = rates(cell.tensors["outcomes"])
                rows.append(share(one.filter, column, [(found.correct, found.n)], group=one.layers))
        note = (
            f"Correct answers of {settings.network}, tuned for {settings.epochs} epochs to small images enlarged to {settings.size} "
            f"pixels, on {settings.images} test images. Attacked within {written(settings.eps)} in Linf "
            "on the public network, away from its own answer, and on the tuned network. Batch "
            "statistics are updated on the new images even where only the last layer is trained."
        )
        return Table("Transfer learning behind the filter", rows, note)

    def curves(self) -> list[Curve]:
        """Outcomes against the Gaussian's width, clean and under the worst of all attackers."""
        drawn = []
        for one in self.found:
            sigmas = [0.0, *one.part.settings.gaussian]
            names = [NONE, *(f"Gaussian, sigma {sigma:g}" for sigma in sigmas[1:])]
            if len(sigmas) < 2:
                continue
            lines = [
                series("clean", [rates(one.clean[name].tensors["outcomes"]) for name in names]),
                series("the worst of all attackers", [rates(one.worst(name)) for name in names]),
                series(IGNORES, [rates(_ignoring(one, name)) for name in names]),
            ]
            note = f"eps {written(one.part.settings.eps)} in Linf. A sigma of 0 is no filter."
            drawn.append(
                Curve(
                    f"{one.part.settings.name}: outcomes against the Gaussian's width",
                    "sigma (pixels)",
                    sigmas,
                    lines,
                    note,
                )
            )
        return drawn

    def summary(self) -> list[str]:
        """Say the main findings in sentences made of the figures."""
        sentences = (
            ["A toy, to see how it works: small embedded digits and few images."]
            if self.embedded
            else []
        )
        for one in self.found:
            name, products, kept = one.part.settings.name, products_of(one), robust_of(one)
            best, strong = (
                max(products, key=lambda model: products[model]),
                max(kept, key=lambda model: kept[model]),
            )
            sentences.append(
                f"{name}: the paper's product is largest for {best} ({products[best]:.2f}; without a filter {products[NONE]:.2f}); "
                f"robust accuracy at "
                f"{written(one.part.settings.eps)} is largest for {strong} ({kept[strong]:.1f} %; without a filter {kept[NONE]:.1f} %)."
            )
            smooth = [model for model in one.models if model != NONE]
            ignoring = fmean(
                100 * rates(one.attackers[model, IGNORES].tensors["outcomes"]).accuracy
                for model in smooth
            )
            knowing, best = (
                fmean(kept[model] for model in smooth),
                max(smooth, key=lambda model: kept[model]),
            )
            sentences.append(
                f"{name}: the filtered networks keep {ignoring:.1f} % correct on average under the "
                f"defence-unaware attacker, and {knowing:.1f} % under the worst of all attackers; the "
                f"best of them ({best}) keeps {kept[best]:.1f} %, no filter {kept[NONE]:.1f} %. "
                f"{_verdict(kept[best], kept[NONE])}"
            )
        if self.networks:
            common = reached_by_all(self.networks)
            hardest = max(self.networks, key=lambda one: hardness(one, common))
            deepest = max(self.networks, key=lambda one: one.layers)
            agrees = "agrees" if hardest is deepest else "does not agree"
            sentences.append(
                f"Photographs: {hardest.name} is hardest to deceive ({hardness(hardest, common):.2f} in L2 on average), the deepest is "
                f"{deepest.name} "
                f"({hardness(deepest, common):.2f}): that {agrees} with the paper's claim that depth helps."
            )
        for way in self.tuned:
            cells = (way.clean, way.attacked[PUBLIC], way.attacked[WHITE])
            clean, public, white = (
                100 * rates(cell.tensors["outcomes"]).accuracy for cell in cells
            )
            sentences.append(
                f"Tuned, {way.layers}, {way.filter}: {clean:.1f} % correct; {public:.1f} % under attacks "
                f"on the public network, {white:.1f} % under attacks on the tuned network."
            )
        return sentences

    def warnings(self) -> list[str]:
        """Warn where the exact gradient is not the worst case (R24), and where the ensemble is not (R13)."""
        lines = []
        for one in self.found:
            for model, attacker in one.attackers:
                lines += blind(
                    {
                        f"{one.part.settings.name}, {model}, {attacker}": one.attackers[
                            model, attacker
                        ]
                    }
                )
                if attacker in (THROUGH, IGNORES):
                    continue
                alone = broken_alone(one, model, attacker)
                ours, theirs = (
                    rates(one.attackers[model, who].tensors["outcomes"]).wrong
                    for who in (THROUGH, attacker)
                )
                if theirs > ours:
                    lines.append(
                        f"{one.part.settings.name}, {model}: the exact gradient breaks {ours} images, {attacker} {theirs} ({alone} of "
                        f"them alone). The exact "
                        "gradient is not the worst case there."
                    )
            for model in one.models:
                strongest, worst = one.strongest[model].tensors["outcomes"], one.worst(model)
                missed = int(((worst == Outcome.WRONG) & (strongest != Outcome.WRONG)).sum())
                if missed:
                    lines.append(
                        f"{one.part.settings.name}, {model}: the ensemble misses {missed} images that another attack breaks; they count."
                    )
        return lines


def products_of(one: SetFound) -> dict[str, float]:
    """The paper's score of each filter whose targets were reached: accuracy times the mean distance of the targeted attack."""
    far = {model: distance_of(one, model) for model in one.models}
    return {
        model: rates(one.clean[model].tensors["outcomes"]).accuracy * distance
        for model, distance in far.items()
        if distance is not None
    }


def distance_of(one: SetFound, model: str) -> float | None:
    """Mean distance of what the targeted attack found; None where it found nothing."""
    tensors = one.targeted[model].tensors
    return (
        float(tensors["distance"][tensors["success"]].mean())
        if bool(tensors["success"].any())
        else None
    )


def robust_of(one: SetFound) -> dict[str, float]:
    """Share in % that stays correct under the worst of all attackers."""
    return {model: 100 * rates(one.worst(model)).accuracy for model in one.models}


def reached_by_all(networks: Sequence[NetworkFound]) -> Tensor:
    """The photographs (N,) on which every network was led to the target: on these, distances compare."""
    return torch.stack([one.attacked.tensors["success"] for one in networks]).all(0)


def hardness(one: NetworkFound, common: Tensor) -> float:
    """Mean distance to the targets, over those photographs (N,) bool; NaN where there is none."""
    return float(one.attacked.tensors["distance"][common].mean())


def _ignoring(one: SetFound, name: str) -> Tensor:
    return one.attackers[name, THROUGH if name == NONE else IGNORES].tensors["outcomes"]


def _places(values: dict[str, float]) -> dict[str, float]:
    """Rank from 1, the largest first; equals share the better one."""
    return {
        name: 1.0 + sum(other > value for other in values.values())
        for name, value in values.items()
    }


def _verdict(best: float, without: float) -> str:
    """Whether smoothing defends, by the best filter's robust accuracy and that without one, in %."""
    if best < without + 10:
        return (
            "Smoothing is no defence against a defence-aware attacker."
            if best < 50
            else "Smoothing adds nothing to it."
        )
    if best < 50:
        return "The best filter makes the attack harder, but most images are still broken."
    return "By these figures, smoothing helps against a defence-aware attacker."
