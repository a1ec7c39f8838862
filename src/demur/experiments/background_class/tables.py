"""The tables of the background-class paper, measured beside printed, and what they say in plain words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.data.background import Selection
from demur.evaluation import NodeResult
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, UNKNOWN, Printed, front, mean, share, triple
from demur.experiments.background_class.attacked import (
    AWARE,
    AWARE_BY_ENTROPY,
    DEFENDED,
    FORCING,
    NAIVE,
    NOISE,
    PGD_STEPS,
    PLAIN,
    Attack,
    attack_list,
)
from demur.experiments.background_class.cells import Material, Split, TradeOff, kinds
from demur.experiments.background_class.minimum import (
    NEAREST,
    TARGETED,
    Found,
    carlini_table,
    success,
)
from demur.experiments.background_class.profile import Profile
from demur.metrics import Rates, rates, spread

COUNTS = {(PLAIN, "train key images"): 310_912, (PLAIN, "test key images"): 34_432, (DEFENDED, "train key images"): 310_912,
          (DEFENDED, "train background"): 191_360, (DEFENDED, "test key images"): 34_432}  # fmt: skip
CLEAN: dict[tuple[str, str], float] = {(PLAIN, "correct"): 99.62, (PLAIN, "wrong"): 0.38, (DEFENDED, "correct"): 99.11,
                                       (DEFENDED, "wrong"): 0.41, (DEFENDED, "rejected"): 0.48}  # fmt: skip
ATTACKED: dict[tuple[str, str, str], Printed] = {
    ("FGS", PLAIN, "correct"): (8.26, 1.92), ("FGS", PLAIN, "wrong"): (91.74, 1.92),
    ("FGS", DEFENDED, "correct"): (2.26, 0.99), ("FGS", DEFENDED, "wrong"): (68.39, 12.50), ("FGS", DEFENDED, "rejected"): (29.35, 13.22),
    ("FG", PLAIN, "correct"): (5.91, 1.42), ("FG", PLAIN, "wrong"): (94.09, 1.42),
    ("FG", DEFENDED, "correct"): (1.21, 0.80), ("FG", DEFENDED, "wrong"): (55.99, 6.82), ("FG", DEFENDED, "rejected"): (42.80, 7.11),
}  # fmt: skip
SUCCESS = {("FGS", PLAIN): 92.0, ("FG", PLAIN): 94.0, ("Carlini", PLAIN): 100.0,
           ("FGS", DEFENDED): 68.0, ("FG", DEFENDED): 56.0, ("Carlini", DEFENDED): 100.0}  # fmt: skip
LETTERS = tuple("TtUdEPfFXHCnhAKMVWeRrN")
"""The 22 letters that the paper keeps (sec. IV.A)."""


def worst_of(cells: Sequence[NodeResult]) -> Tensor:
    """Outcome of each image under the worst of several attacks: wrong if any makes it so, else rejected if any does."""
    return torch.stack([cell.tensors["outcomes"] for cell in cells]).amax(
        0
    )  # Outcome counts up: correct, rejected, wrong


@dataclass(frozen=True)
class Sheets:
    """All that was measured, as tables and sentences."""

    profile: Profile
    material: Material
    selection: Selection
    kept: tuple[str, ...]
    splits: Sequence[Split]
    traded: TradeOff

    @property
    def printed(self) -> bool:
        """Whether this is what the paper measured, so that its figures can stand beside ours: digits, and its letters."""
        return self.material.keys == tuple("0123456789") and set(self.kept) == set(LETTERS)

    def tables(self) -> list[Table]:
        """Tables III, V, IV and I of the paper, its letters selection, and what it lacks."""
        return [
            self._clean(),
            self._attacked(),
            self._success(),
            carlini_table(self.profile.carlini, self._carlini),
            self._sizes(),
            self._out_of_distribution(),
            self._letters(),
            self._trade_off(),
            self._counts(),
            self._front(),
        ]

    def _front(self) -> Table:
        plans = {model: attack_list(self.profile, model) for model in (PLAIN, DEFENDED)}
        found: dict[str, dict[str, list[Rates]]] = {}
        for model, plan in plans.items():
            one_step = {attack.attacker: attack for attack in plan if attack.name == "FGS"}
            many = [
                attack
                for attack in plan
                if attack.norm == "linf" and attack.attacker in (NAIVE, AWARE, AWARE_BY_ENTROPY)
            ]
            worst = [
                rates(worst_of([split.attacks[model, attack] for attack in many]))
                for split in self.splits
            ]
            lines = [
                self.found(model, None),
                self.found(model, one_step[NAIVE]),
                self.found(model, one_step[AWARE]),
                worst,
            ]
            found[model] = dict(zip(ATTACKED_BY, lines, strict=True))
        note = (
            f"Linf within {self.profile.fgs_eps:g}. Defence-unaware and defence-aware: FGS. Strongest "
            f"ensemble: the worst outcome of FGS and of PGD in {PGD_STEPS} steps."
        )
        return front(found, note)

    def found(self, model: str, attack: Attack | None, tensor: str = "outcomes") -> list[Rates]:
        """Outcomes of a model in each split, clean or under an attack."""
        if attack is None:
            return [rates(split.models[model].clean) for split in self.splits]
        return [rates(split.attacks[model, attack].tensors[tensor]) for split in self.splits]

    def worst(self, model: str, name: str) -> list[Rates]:
        """Outcomes of a model in each split under the per-image worst of the reject-aware attacks of that name (R18)."""
        plan = [
            attack
            for attack in attack_list(self.profile, model)
            if attack.name == name and attack.attacker in (AWARE, AWARE_BY_ENTROPY)
        ]
        return [
            rates(worst_of([split.attacks[model, attack] for attack in plan]))
            for split in self.splits
        ]

    @property
    def _carlini(self) -> Found:
        pairs = list(self.splits[0].carlini)
        return {pair: [split.carlini[pair] for split in self.splits] for pair in pairs}

    def _is_printed(self, attack: Attack) -> bool:
        nominal = {"FGS": 0.25, "FG": 6.79}
        return self.printed and attack.attacker == NAIVE and nominal.get(attack.name) == attack.eps

    def _counts(self) -> Table:
        rows, first = [], self.splits[0]
        for model in (PLAIN, DEFENDED):
            for column, count in first.sizes.items():
                if model == DEFENDED or column != "train background":
                    whole = count // self.profile.batch_size * self.profile.batch_size
                    paper = COUNTS.get((model, column)) if self.printed else None
                    rows.append(
                        Measurement(
                            row=model,
                            column=column,
                            paper=paper,
                            measured=count,
                            n=count,
                            note=f"{whole:,} in whole batches",
                        )
                    )
        note = (
            "Images of one split. The paper's counts are whole batches of 128; ours are exact, and the training loop leaves out the "
            "images that do not fill a batch, different ones in each epoch. Only images of the key classes are scored."
        )
        return Table("Table I: data sizes", rows, note)

    def _clean(self) -> Table:
        rows: list[Measurement] = []
        for model in (PLAIN, DEFENDED):
            found = self.found(model, None)

            def paper(column: str, model: str = model) -> Printed:
                return (CLEAN.get((model, column), math.nan) if self.printed else math.nan, None)

            rows += triple(model, found, paper=paper)
            rows.append(share(model, "coverage", [(one.n - one.rejected, one.n) for one in found]))
            rows.append(
                share(
                    model,
                    "selective accuracy",
                    [(one.correct, one.correct + one.wrong) for one in found],
                )
            )
        note = (
            "Test images of the key classes, not under attack. Rejected is the false rejection rate; "
            "selective accuracy is that of the answered images."
        )
        return Table("Table III: clean images", rows, note)

    def _attacked(self) -> Table:
        rows: list[Measurement] = []
        for attack in attack_list(self.profile, DEFENDED):
            for model in (PLAIN, DEFENDED):
                if attack not in attack_list(self.profile, model):
                    continue

                def paper(column: str, attack: Attack = attack, model: str = model) -> Printed:
                    return (
                        ATTACKED.get((attack.name, model, column), UNKNOWN)
                        if self._is_printed(attack)
                        else UNKNOWN
                    )

                rows += triple(model, self.found(model, attack), attack.label, paper)
                if attack.attacker == AWARE_BY_ENTROPY:
                    worst = f"{attack.name} eps {attack.eps:g}, worst of both reject-aware"
                    rows += triple(model, self.worst(model, attack.name), worst)
        note = (
            "Outcomes of the attacked images. The naive attacker is the paper's: it uses the "
            "cross-entropy of the true class and ignores the reject column. The reject-aware attackers "
            "compare the accepted wrong classes with the true class and the reject column, by margin or "
            "by cross-entropy. PGD is the margin attack in many steps. Worst of both takes the worse "
            "outcome of the two for each image. Forcing rejection is denial of service: rejected is "
            "then the attacker's success. Noise of the same eps is a control: an attack must break "
            "every image that noise breaks. Where an attack fails and the clean image already reaches "
            "the goal, the clean image is used."
        )
        return Table("Table V: attacked images", rows, note)

    def _success(self) -> Table:
        rows: list[Measurement] = []
        for attack in (one for one in attack_list(self.profile, PLAIN) if one.attacker == NAIVE):
            for model in (PLAIN, DEFENDED):
                printed = (
                    (SUCCESS[attack.name, model], None) if self._is_printed(attack) else UNKNOWN
                )
                rows.append(
                    share(
                        model,
                        attack.name,
                        [(one.wrong, one.n) for one in self.found(model, attack)],
                        group=NAIVE,
                        paper=printed,
                    )
                )
                worst = [(one.wrong, one.n) for one in self.worst(model, attack.name)]
                rows.append(share(model, attack.name, worst, group="reject-aware, worst of both"))
        for model in (PLAIN, DEFENDED):
            printed = (SUCCESS["Carlini", model], None) if self.printed else UNKNOWN
            rows.append(
                share(
                    model,
                    "Carlini",
                    success(self._carlini, model, TARGETED),
                    group=NAIVE,
                    paper=printed,
                )
            )
            rows.append(
                share(
                    model,
                    "Carlini",
                    success(self._carlini, model, NEAREST),
                    group="reject-aware, worst of both",
                )
            )
        note = (
            "Attack success: wrong and accepted. A rejected image is never a success. Carlini is the L2 "
            "attack without a limit on eps: targeted in the first line, as in the paper; the "
            "reject-aware line takes the nearest wrong class."
        )
        return Table("Table IV: attack success rates", rows, note)

    def _sizes(self) -> Table:
        rows: list[Measurement] = []
        for attack in attack_list(self.profile, PLAIN):
            for model in (PLAIN, DEFENDED):
                cells = [split.attacks[model, attack] for split in self.splits]
                n = sum(len(cell.tensors["outcomes"]) for cell in cells)
                for norm, name in (("l0", "L0"), ("l2", "L2"), ("linf", "Linf")):
                    over = spread([float(cell.values["sizes"][norm]) for cell in cells])
                    rows.append(
                        Measurement(
                            row=model,
                            column=name,
                            group=attack.label,
                            measured=over.mean,
                            sd=over.sd,
                            splits=over.n,
                            n=n,
                        )
                    )
                stored = self.found(model, attack, "stored_outcomes")
                rows.append(
                    share(
                        model,
                        "wrong when stored in 8 bits",
                        [(one.wrong, one.n) for one in stored],
                        group=attack.label,
                    )
                )
                zero = fmean(
                    cell.values["zero_gradients"] / max(cell.values["backwards"], 1)
                    for cell in cells
                )
                rows.append(
                    Measurement(
                        row=model,
                        column="zero gradients",
                        group=attack.label,
                        unit="%",
                        measured=100 * zero,
                        n=n,
                    )
                )
        pixels = self.splits[0].test.images[0].numel()
        note = (
            "Mean size of the change after clipping to [0, 1]; eps is the size before it. "
            f"FGS of eps {self.profile.fgs_eps:g} on {pixels} pixels has an L2 of {self.profile.fgs_eps * pixels**0.5:.2f} "
            f"at most before it is clipped. "
            "In the last columns: attacked images rounded to 8 bits, and gradients that were zero."
        )
        return Table("Size of the perturbations", rows, note)

    def _out_of_distribution(self) -> Table:
        rows = [
            share(model, kind, [split.declined[model][kind] for split in self.splits])
            for model in (PLAIN, DEFENDED)
            for kind in self.splits[0].declined[model]
        ]
        note = (
            "Share of out-of-distribution images (of none of the key classes) that is rejected. A "
            "classifier without a reject column answers all of them."
        )
        return Table("Out-of-distribution images rejected", rows, note)

    def _letters(self) -> Table:
        rows = []
        for line in self.selection.table:
            ours = "kept" if line.name in self.selection.kept else "dropped"
            papers = (
                f"; the paper {'keeps' if line.name in LETTERS else 'drops'} it"
                if self.printed
                else ""
            )
            taken = f"; taken for {line.confused_with}" if line.confused_with else ""
            counts = [(round(line.rate * line.images), line.images)]
            rows.append(
                share(
                    line.name,
                    "taken for background",
                    counts,
                    group=ours,
                    note=f"{ours}{papers}{taken}",
                )
            )
        settings = self.profile.selection
        note = (
            f"How often images of each kind are taken for any kind of background and not for a key class, in {settings.folds}-fold "
            f"cross-validation ({'once' if settings.repeats == 1 else f'{settings.repeats} times'}) over all classes of "
            f"{self.material.selection_images.name}, {settings.per_class} images of each. Kept from {100 * settings.cutoff:g} % up."
        )
        return Table("The selection of background images", rows, note)

    def _trade_off(self) -> Table:
        rows: list[Measurement] = []
        for attacker in (NAIVE, AWARE, AWARE_BY_ENTROPY):
            for count, repeats in self.traded.items():
                name = kinds(count)
                clean = [rates(model.clean) for model, _ in repeats]
                rows.append(
                    share(
                        name,
                        "clean correct",
                        [(one.correct, one.n) for one in clean],
                        group=attacker,
                    )
                )
                rows.append(
                    share(
                        name,
                        "clean rejected",
                        [(one.rejected, one.n) for one in clean],
                        group=attacker,
                    )
                )
                for attack in (one for one in repeats[0][1] if one.attacker == attacker):
                    found = [rates(cells[attack].tensors["outcomes"]) for _, cells in repeats]
                    rows.append(
                        share(
                            name,
                            f"{attack.name} wrong",
                            [(one.wrong, one.n) for one in found],
                            group=attacker,
                        )
                    )
                    rows.append(
                        share(
                            name,
                            f"{attack.name} rejected",
                            [(one.rejected, one.n) for one in found],
                            group=attacker,
                        )
                    )
        settings = self.profile.trade_off
        note = (
            f"Trained on background images of the least confusing kinds alone, with {settings.key_images:,} key images at "
            f"most, for {settings.epochs} "
            "epochs. The paper: more confusing background images mean more detection and less clean accuracy, without figures."
        )
        return Table("Trade-off: how many kinds to keep", rows, note)

    def summary(self) -> list[str]:
        """Say the main findings in sentences made of the figures."""
        clean, defended = self.found(PLAIN, None), self.found(DEFENDED, None)
        made = "synthetic backgrounds, " if self.profile.made_per_kind else ""
        toy = f"A toy, to see how it works: small embedded digits, {made}mostly one-step attacks. The real table is in the README."
        sentences = [
            *([toy] if self.material.embedded else []),
            f"Clean images: {mean(clean, 'correct'):.2f} % correct without, {mean(defended, 'correct'):.2f} % with the background class, "
            f"which falsely rejects {mean(defended, 'rejected'):.2f} %.",
        ]
        for naive in (one for one in attack_list(self.profile, PLAIN) if one.attacker == NAIVE):
            under, worst = self.found(DEFENDED, naive), self.worst(DEFENDED, naive.name)
            sentences.append(
                f"{naive.name} (eps {naive.eps:g}) by the paper's attacker: wrong and accepted "
                f"{mean(self.found(PLAIN, naive), 'wrong'):.1f} % without "
                f"and {mean(under, 'wrong'):.1f} % with the background class, which rejects {mean(under, 'rejected'):.1f} %. "
                f"The reject-aware attacker gets {mean(worst, 'wrong'):.1f} % wrong and accepted with one such step"
                f"{self._in_more_steps(naive)}."
            )
        lengths = {
            model: torch.cat([cell.tensors["distance"] for cell in self._carlini[model, NEAREST]])
            for model in (PLAIN, DEFENDED)
        }
        sentences.append(
            "Carlini & Wagner's L2 attack, aware of the reject column, breaks "
            f"{_percent(lengths[DEFENDED])} of the images of {DEFENDED} with changes of a median length of "
            f"{float(lengths[DEFENDED].median()):.2f}, and {_percent(lengths[PLAIN])} of {PLAIN} with {float(lengths[PLAIN].median()):.2f}."
        )
        if self.printed:
            ours, theirs = set(self.selection.kept), set(LETTERS)
            sentences.append(
                f"The selection keeps {len(ours)} letters, {len(ours & theirs)} of the paper's {len(theirs)}; "
                f"it also keeps: {_list(ours - theirs)}; it drops of the paper's: {_list(theirs - ours)}."
            )
        else:
            sentences.append(
                f"Background images kept by the selection: {_list(self.selection.kept)}; dropped: {_list(self.selection.dropped)}."
            )
        return sentences

    def _in_more_steps(self, naive: Attack) -> str:
        many = [
            attack
            for attack in attack_list(self.profile, DEFENDED)
            if attack.steps > 1 and attack.norm == naive.norm
        ]
        return "".join(
            f", and {mean(self.found(DEFENDED, one), 'wrong'):.1f} % in {one.steps} (PGD)"
            for one in many
        )

    def warnings(self) -> list[str]:
        """Whatever should make a reader doubt a figure (R13, R14, R19), in words."""
        doubts = [self._broken_by_noise_alone, self._blind, self._better_unaware]
        return [line for model in (PLAIN, DEFENDED) for doubt in doubts for line in doubt(model)]

    def _broken_by_noise_alone(self, model: str) -> Iterable[str]:
        """Images that random noise of the same eps breaks and no attack does."""
        plan = attack_list(self.profile, model)
        for noise in (attack for attack in plan if attack.attacker == NOISE):
            rivals = [
                attack
                for attack in plan
                if attack.norm == noise.norm and attack.attacker not in (NOISE, FORCING)
            ]
            alone, n = 0, 0
            for split in self.splits:
                by_attack = (
                    worst_of([split.attacks[model, attack] for attack in rivals]) == Outcome.WRONG
                )
                by_noise = split.attacks[model, noise].tensors["outcomes"] == Outcome.WRONG
                alone, n = alone + int((by_noise & ~by_attack).sum()), n + len(by_noise)
            if alone:
                yield (
                    f"{alone:,} of {n:,} images of {model} are broken by random noise (eps {noise.eps:g}, {noise.draws} draws) "
                    f"and by no {' or '.join(dict.fromkeys(one.name for one in rivals))}: the attacks are not the worst case."
                )

    def _blind(self, model: str) -> Iterable[str]:
        """Attacks that had no gradient to follow."""
        for attack in attack_list(self.profile, model):
            cells = [split.attacks[model, attack] for split in self.splits]
            zero = sum(cell.values["zero_gradients"] for cell in cells)
            n = sum(cell.values["backwards"] for cell in cells)
            if zero > 0.01 * n:
                yield f"{100 * zero / n:.1f} % of the gradients of {attack.label} on {model} were zero: the attack was blind there."

    def _better_unaware(self, model: str) -> Iterable[str]:
        """Warn where the naive attacker does better than the reject-aware ones, which are then too weak."""
        for naive in (one for one in attack_list(self.profile, model) if one.attacker == NAIVE):
            unaware, aware = (
                mean(self.found(model, naive), "wrong"),
                mean(self.worst(model, naive.name), "wrong"),
            )
            if unaware > aware:
                yield (
                    f"{naive.label}, gets more of {model} wrong and accepted ({unaware:.1f} %) than the "
                    f"reject-aware attackers ({aware:.1f} %): theirs is not the worst case."
                )


def _percent(lengths: Tensor) -> str:
    return f"{100 * float(lengths.isfinite().float().mean()):.0f} %"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
