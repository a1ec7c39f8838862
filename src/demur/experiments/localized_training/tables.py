"""Tables, curves and sentences of the localized experiment, with the paper's figures beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.evaluation import NodeResult
from demur.evaluation.results import Curve, Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, UNKNOWN, Printed, front, series, share, written
from demur.experiments.cells import blind
from demur.experiments.localized_training.photographs import NetworkFound
from demur.experiments.localized_training.profile import AttackedPhotographs, Profile
from demur.experiments.localized_training.sets import (
    AROUND,
    BACKGROUND,
    EVERYWHERE,
    MODELS,
    NATURAL,
    OBJECT,
    RANDOM,
    RETAINED,
    STANDARD,
    SetFound,
)
from demur.metrics import rates
from demur.networks import CLASSES
from demur.studies.album import Album

INPUTS = ("natural images", "standard attack", "background attack")
# Figure 2, with its scaling of natural images undone: a thousandth for MNIST, a hundredth for CIFAR-10.
PAPER_LOSS = {
    "MNIST": {
        NATURAL: (0.0414, 68.19, 61.80),
        STANDARD: (0.0579, 0.27, 0.21),
        BACKGROUND: (0.0396, 0.55, 0.23),
    },
    "CIFAR-10": {
        NATURAL: (0.2144, 54.00, 2.96),
        STANDARD: (0.4049, 2.34, 0.52),
        BACKGROUND: (0.2109, 45.37, 0.23),
    },
}
PAPER_ACCURACY = {
    ("MNIST", "clean"): 99.19,
    ("MNIST", AROUND): 0.08,
    ("CIFAR-10", "clean"): 95.17,
    ("CIFAR-10", AROUND): 59.26,
}
"""Of the natural models (sec. 1.1)."""

# Tables 1 and 2: confidence in the correct class before, percent of pixels altered, confidence after, guess after.
PAPER_PHOTOGRAPHS: dict[str, tuple[float, float, float, str]] = {
    "triceratops": (0.980953, 35.6, 0.000377, "coral reef"),
    "tarantula": (0.957682, 61, 4.44e-08, "wolf spider"),
    "snail": (0.880702, 70.7, 2.42e-06, "bakery"),
    "bassoon": (0.748791, 28.3, 0.000657, "electric fan"),
    "hammer": (0.925929, 15.5, 0.000389, "hand blower"),
    "iPod": (0.982066, 70.3, 1.10e-07, "paper towel"),
    "great white shark": (0.53433, 48, 1.10e-07, "parachute"),
    "hen": (0.380655, 36.3, 9.68e-05, "potter's wheel"),
    "kite": (0.00108, 76, 6.02e-11, "brain coral"),
}
PAPER_GUESSED = {"kite": "umbrella"}
PAPER_NETWORK = "inception_v3"
DIFFERENCES = ((STANDARD, NATURAL), (BACKGROUND, NATURAL), (BACKGROUND, STANDARD))
AVERAGE = "average of these"


@dataclass(frozen=True)
class Sheets:
    """What a run found, and how it is written down."""

    profile: Profile
    found: Sequence[SetFound]
    album: Album | None
    networks: Sequence[NetworkFound]
    embedded: bool

    def tables(self) -> list[Table]:
        """All tables, the paper's first."""
        pictures = (
            [self._photographs_clean(), *self._photographs_attacked(), self._photographs_all()]
            if self.album
            else []
        )
        return [
            self._losses(),
            self._differences(),
            self._accuracies(),
            self._boxes(),
            *pictures,
            self._front(),
        ]

    def _front(self) -> Table:
        no_attack, _, aware, strongest = ATTACKED_BY
        found = {}
        for one in self.found:
            for model in MODELS:
                for region in (AROUND, EVERYWHERE):
                    lines = {no_attack: one.clean[model].tensors["outcomes"]}
                    lines |= {
                        aware: one.pgd[model, region].tensors["outcomes"],
                        strongest: worst_of(one, model, region),
                    }
                    where = "around the box" if region == AROUND else region
                    found[f"{one.part.settings.name}: {model} model, attacked {where}"] = {
                        who: [rates(own)] for who, own in lines.items()
                    }
        eps = ", ".join(
            f"{written(one.part.settings.eps)} on {one.part.settings.name}" for one in self.found
        )
        return front(found, f"Linf, eps {eps}. Defence-aware: the paper's attack.")

    def _losses(self) -> Table:
        rows = []
        for one in self.found:
            paper = PAPER_LOSS.get(one.part.settings.paper, {})
            for model in MODELS:
                known = paper.get(model, (None, None, None))
                for column, value, printed in zip(
                    INPUTS, _losses_of(one, model), known, strict=True
                ):
                    n = len(one.part.test) if column == INPUTS[0] else len(one.attacked)
                    rows.append(
                        Measurement(
                            model,
                            column,
                            one.part.settings.name,
                            measured=value,
                            paper=printed,
                            n=n,
                        )
                    )
        note = (
            "Mean cross-entropy. The attack is the paper's: descent from a random start to the largest cross-entropy, in "
            f"{self.profile.attack.steps} steps; standard everywhere, background outside the centre box. Natural images: the whole test "
            "set. The paper prints its losses on natural images a thousand (MNIST) and a hundred (CIFAR-10) times as large. "
        )
        note += " ".join(
            f"{one.part.settings.name}: eps {written(one.part.settings.eps)}, {one.part.settings.steps:,} training steps of "
            f"{one.part.settings.batch_size} images, attacked in {one.part.settings.attack_steps} steps, box {one.box}x{one.box}."
            for one in self.found
        )
        return Table("Loss of each model on each kind of input (Figure 2)", rows, note)

    def _differences(self) -> Table:
        rows = []
        for one in self.found:
            paper = PAPER_LOSS.get(one.part.settings.paper)
            for model, other in DIFFERENCES:
                for place, column in enumerate(INPUTS):
                    printed = (
                        None if paper is None else _change(paper[model][place], paper[other][place])
                    )
                    value = _change(_losses_of(one, model)[place], _losses_of(one, other)[place])
                    rows.append(
                        Measurement(
                            f"{model} against {other}",
                            column,
                            one.part.settings.name,
                            "%",
                            measured=value,
                            paper=printed,
                        )
                    )
        note = (
            "Difference of the loss of the first model from that of the second, in percent, as in "
            "sections 1 and 5 of the paper."
        )
        return Table("Differences of the loss", rows, note)

    def _accuracies(self) -> Table:
        rows = []
        for one in self.found:
            name, kind = one.part.settings.name, one.part.settings.paper
            for model in MODELS:

                def printed(column: str, model: str = model, kind: str = kind) -> Printed:
                    return (
                        (PAPER_ACCURACY[kind, column], None)
                        if model == NATURAL and (kind, column) in PAPER_ACCURACY
                        else UNKNOWN
                    )

                lines: dict[str, Tensor] = {"clean": one.clean[model].tensors["outcomes"]}
                lines |= {
                    region: one.pgd[model, region].tensors["outcomes"]
                    for region in (EVERYWHERE, AROUND, OBJECT, RANDOM)
                }
                lines |= {
                    f"strongest ensemble, {region}": worst_of(one, model, region)
                    for region in (EVERYWHERE, AROUND)
                }
                for column, outcomes in lines.items():
                    found = rates(outcomes)
                    rows.append(
                        share(
                            model,
                            column,
                            [(found.correct, found.n)],
                            group=name,
                            paper=printed(column),
                        )
                    )
        note = (
            "Correct answers. The box was chosen by the accuracy of the natural model under the attack "
            "on the background. The first columns are the paper's attack on "
            f"{self.profile.attack.images:,} test images: everywhere, outside the centre box "
            "(background), inside it, and on as many random pixels as the background has. The "
            "strongest ensemble is the worst outcome of `attacks.Strongest` and of the paper's attack, "
            f"on {self.profile.strongest.images:,} of these images."
        )
        return Table("Accuracy of each model, attacked in each region", rows, note)

    def _boxes(self) -> Table:
        rows = []
        for one in self.found:
            values, settings = one.calibration.values, one.part.settings
            for side, accuracy in zip(settings.boxes, values["accuracy"], strict=True):
                note = "chosen" if side == one.box else ""
                rows.append(
                    Measurement(
                        f"{side}x{side}",
                        "accuracy",
                        settings.name,
                        "%",
                        measured=100 * accuracy,
                        n=self.profile.attack.calibration_images,
                    )
                )
                rows.append(Measurement(f"{side}x{side}", "", settings.name, note=note or " "))
        wanted = " and ".join(
            f"{100 * RETAINED[one.part.settings.paper]:.2f} % on {one.part.settings.paper}"
            for one in self.found
            if one.part.settings.paper in RETAINED
        )
        note = (
            "Accuracy of the natural model, attacked around a centre box of each size. The paper does "
            "not give the size. "
        )
        note += (
            f"The chosen box leaves the share of clean accuracy nearest to the paper's: {wanted}."
            if wanted
            else "The middle one is chosen."
        )
        return Table("The natural model, attacked around a box", rows, note)

    def _photographs_clean(self) -> Table:
        rows: list[Measurement] = []
        for network in self._with_paper():
            cell = None if network is None else network.clean
            rows += self._listed(
                PAPER_NETWORK if network is None else network.name, cell, paper_at=0
            )
        note = (
            self._album_note()
            + " The paper's photographs of the nine classes are not available; others are used."
        )
        return Table("Unattacked photographs (Table 1)", rows, note)

    def _photographs_attacked(self) -> list[Table]:
        tables = []
        for number, eps in enumerate(self._settings.eps):
            rows: list[Measurement] = []
            for network in self._with_paper():
                cell = None if network is None else network.attacked[eps, AROUND]
                rows += self._listed(
                    PAPER_NETWORK if network is None else network.name,
                    cell,
                    paper_at=2 if number == 0 else None,
                )
            note = (
                f"Attacked outside the objects' boxes, eps {written(eps)} in {self._settings.steps} steps; every figure is of the "
                "picture rounded to 8 bits. Altered: pixels that differ. The paper does not give its eps."
            )
            whole = [
                int((one.attacked[eps, AROUND].tensors["altered"] == 0).sum())
                for one in self.networks
            ]
            if any(whole):
                note += f" In {max(whole)} of all photographs the box is the whole picture that the network sees: nothing may be attacked."
            tables.append(
                Table(
                    f"Photographs attacked around the object, eps {written(eps)} (Table 2)",
                    rows,
                    note,
                )
            )
        return tables

    def _listed(
        self, network: str, cell: NodeResult | None, paper_at: int | None
    ) -> list[Measurement]:
        """The lines of Tables 1 or 2 for one network: of each photograph, and their average; without a cell, the paper's alone."""
        assert self.album is not None
        names = [photo.name for photo in self.album.photos[: self._settings.listed]]
        paper = PAPER_PHOTOGRAPHS if network == PAPER_NETWORK and paper_at is not None else {}
        rows, kept = [], dict[str, list[float]]()
        missing = "no weights at hand" if cell is None else ""
        for place, name in enumerate(names):
            known = paper.get(name)
            values: dict[str, float | None] = dict.fromkeys(
                ("altered", "correct", "top 5", "top 10", "confidence")
            )
            guess = missing
            if cell is not None:
                rank = int(cell.tensors["rank"][place])
                tops = {
                    column: 100.0 * (rank < limit)
                    for column, limit in (("correct", 1), ("top 5", 5), ("top 10", 10))
                }
                confidence = float(cell.tensors["confidence"][place])
                altered = (
                    100 * float(cell.tensors["altered"][place])
                    if "altered" in cell.tensors
                    else 0.0
                )
                values = {"altered": altered, **tops, "confidence": confidence}
                guess = CLASSES[int(cell.tensors["guess"][place])]
            printed: dict[str, float] = {}
            if known:
                hit = 100.0 * (paper_at == 0 and name not in PAPER_GUESSED)
                printed = dict.fromkeys(("correct", "top 5", "top 10"), hit)
                printed |= (
                    {"altered": 0.0, "confidence": known[0]}
                    if paper_at == 0
                    else {"altered": known[1], "confidence": known[2]}
                )
            for column, value in values.items():
                unit = "" if column == "confidence" else "%"
                rows.append(
                    Measurement(
                        name,
                        column,
                        network,
                        unit,
                        measured=value,
                        paper=printed.get(column),
                        note="" if cell else "—",
                    )
                )
                if value is not None:
                    kept.setdefault(column, []).append(value)
            theirs = (PAPER_GUESSED.get(name, name) if paper_at == 0 else known[3]) if known else ""
            rows.append(
                Measurement(name, "guess", network, note=f"{guess} [{theirs}]" if theirs else guess)
            )
        averages = {column: fmean(values) for column, values in kept.items()}
        printed_averages = (
            _paper_averages(paper, paper_at or 0) if paper and set(names) == set(paper) else {}
        )
        for column in ("altered", "correct", "top 5", "top 10", "confidence"):
            unit = "" if column == "confidence" else "%"
            line = Measurement(
                AVERAGE,
                column,
                network,
                unit,
                measured=averages.get(column),
                paper=printed_averages.get(column),
                note="" if cell else "—",
            )
            rows.append(line)
        return rows

    def _photographs_all(self) -> Table:
        rows = []
        for network in self.networks:
            cells = {("no attack", ""): network.clean}
            cells |= {
                (region, f"eps {written(eps)}"): cell
                for (eps, region), cell in network.attacked.items()
            }
            for (region, eps), cell in cells.items():
                row = f"{region}, {eps}" if eps else region
                count = len(cell.tensors["rank"])
                for column, limit in (("correct", 1), ("top 5", 5), ("top 10", 10)):
                    rows.append(
                        share(
                            row,
                            column,
                            [(int((cell.tensors["rank"] < limit).sum()), count)],
                            group=network.name,
                        )
                    )
                altered = (
                    float(cell.tensors["altered"].mean()) if "altered" in cell.tensors else 0.0
                )
                rows.append(
                    Measurement(
                        row,
                        "confidence",
                        network.name,
                        measured=float(cell.tensors["confidence"].mean()),
                        n=count,
                    )
                )
                rows.append(
                    Measurement(row, "altered", network.name, "%", measured=100 * altered, n=count)
                )
        note = (
            "All photographs, attacked in each region: outside the objects' boxes, on as many random pixels, in the boxes, and everywhere. "
            "If random pixels do as well, the network does not rely on the background. "
        )
        return Table("All photographs, attacked in each region", rows, note + self._album_note())

    def _with_paper(self) -> list[NetworkFound | None]:
        """The networks, the paper's first: None where its weights are not at hand."""
        theirs = [one for one in self.networks if one.name == PAPER_NETWORK]
        wanted = PAPER_NETWORK in self._settings.networks
        first: list[NetworkFound | None] = [*theirs] if theirs or not wanted else [None]
        return [*first, *(one for one in self.networks if one.name != PAPER_NETWORK)]

    @property
    def _settings(self) -> AttackedPhotographs:
        assert self.profile.photographs is not None
        return self.profile.photographs

    def _album_note(self) -> str:
        assert self.album is not None
        return " ".join([f"{len(self.album.photos)} photographs.", *self.album.notes])

    def curves(self) -> list[Curve]:
        """Outcomes against eps, around the object and everywhere."""
        factors, drawn = list(self.profile.attack.curve), []
        for one in self.found:
            lines = []
            for model in MODELS:
                for region in (AROUND, EVERYWHERE):
                    points = [
                        rates(found) for found in one.curve[model, region].tensors["outcomes"]
                    ]
                    lines.append(
                        series(
                            f"{model}, attacked {'around the box' if region == AROUND else region}",
                            points,
                        )
                    )
            eps = [min(1.0, round(factor * one.part.settings.eps, 6)) for factor in factors]
            note = f"Outcomes of {len(one.attacked):,} test images under the paper's attack. An image broken at one eps counts as broken at every larger eps."
            drawn.append(
                Curve(
                    f"{one.part.settings.name}: outcomes against eps",
                    "eps (Linf)",
                    eps,
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
            name = one.part.settings.name
            natural, standard, background = (_losses_of(one, model) for model in MODELS)
            cut = [
                f"{-_change(other[place], natural[place]):.1f} %"
                for other, place in ((standard, 1), (background, 2))
            ]
            sentences.append(
                f"{name}: trained on attacked images, the loss under the attack that a model was trained on falls by {cut[0]} (standard) "
                f"and {cut[1]} (background); on natural images it changes by {_change(standard[0], natural[0]):+.1f} % and "
                f"{_change(background[0], natural[0]):+.1f} %."
            )
            left = {
                (model, region): 100 * rates(worst_of(one, model, region)).accuracy
                for model in MODELS
                for region in (AROUND, EVERYWHERE)
            }
            sentences.append(
                f"{name}, under the strongest ensemble: around the box the natural model keeps {left[NATURAL, AROUND]:.1f} % correct, the "
                f"background model {left[BACKGROUND, AROUND]:.1f} %, the standard one {left[STANDARD, AROUND]:.1f} %; everywhere they keep "
                f"{left[NATURAL, EVERYWHERE]:.1f} %, {left[BACKGROUND, EVERYWHERE]:.1f} % and {left[STANDARD, EVERYWHERE]:.1f} %."
            )
            sentences += _signs(one)
        for network in self.networks:
            eps = max(at for at, _ in network.attacked)
            before, after = (
                network.clean.tensors,
                {region: network.attacked[eps, region].tensors for region in (AROUND, RANDOM)},
            )
            first = {
                region: 100 * float((tensors["rank"] == 0).double().mean())
                for region, tensors in after.items()
            }
            clean = 100 * float((before["rank"] == 0).double().mean())
            sentences.append(
                f"{network.name} on {len(before['rank'])} photographs: {clean:.0f} % correct; attacked around the object within "
                f"{written(eps)}, {first[AROUND]:.0f} %, and on as many random pixels {first[RANDOM]:.0f} %."
            )
        return sentences

    def warnings(self) -> list[str]:
        """Whatever should make a reader doubt a figure, in words."""
        lines = []
        for one in self.found:
            name = one.part.settings.name
            for model in MODELS:
                if (
                    100 * rates(one.clean[model].tensors["outcomes"]).accuracy
                    < 150 / one.part.train.num_classes
                ):
                    lines.append(
                        f"{name}: the accuracy of the {model} model is close to chance: its small loss under attack is no robustness."
                    )
                attacked = {
                    f"{name}, {model}, {region}": one.pgd[model, region]
                    for region in (EVERYWHERE, AROUND)
                }
                attacked |= {
                    f"{name}, strongest ensemble on {model}, {region}": one.strongest[model, region]
                    for region in (EVERYWHERE, AROUND)
                }
                lines += blind(attacked)
                for region in (EVERYWHERE, AROUND):
                    paper, strong = (
                        one.pgd[model, region].tensors["outcomes"],
                        one.strongest[model, region].tensors["outcomes"],
                    )
                    alone = int(
                        (
                            (paper[: len(strong)] != Outcome.CORRECT) & (strong == Outcome.CORRECT)
                        ).sum()
                    )
                    if alone:
                        lines.append(
                            f"{name}, {model}, {region}: the paper's attack breaks {alone} images that the ensemble does not; they count."
                        )
        return lines


def worst_of(one: SetFound, model: str, region: str) -> Tensor:
    """Outcomes (n,) under the worst of all attacks in the region; everywhere includes the background."""
    outcomes = one.strongest[model, region].tensors["outcomes"]
    count = len(outcomes)
    everything = [outcomes, one.pgd[model, region].tensors["outcomes"][:count]]
    if region == EVERYWHERE:
        everything += [
            one.pgd[model, inner].tensors["outcomes"][:count] for inner in (AROUND, OBJECT, RANDOM)
        ]
        everything.append(one.strongest[model, AROUND].tensors["outcomes"])
    return torch.stack(everything).amax(0)


def _losses_of(one: SetFound, model: str) -> tuple[float, float, float]:
    """Mean cross-entropy on natural images, under the standard attack and under the background attack."""
    cells = (one.clean[model], one.pgd[model, EVERYWHERE], one.pgd[model, AROUND])
    natural, standard, background = (float(cell.tensors["losses"].mean()) for cell in cells)
    return natural, standard, background


def _signs(one: SetFound) -> list[str]:
    """Whether every difference of Figure 2 has the paper's sign."""
    paper = PAPER_LOSS.get(one.part.settings.paper)
    if paper is None:
        return []
    other = []
    for model, against in DIFFERENCES:
        ours, theirs, base, their_base = (
            _losses_of(one, model),
            paper[model],
            _losses_of(one, against),
            paper[against],
        )
        for place, column in enumerate(INPUTS):
            if (ours[place] > base[place]) != (theirs[place] > their_base[place]):
                other.append(
                    f"{model} against {against} on {'natural images' if place == 0 else f'the {column}'}"
                )
    agree = len(DIFFERENCES) * len(INPUTS) - len(other)
    sentence = f"{one.part.settings.name}: {agree} of {agree + len(other)} differences of Figure 2 have the paper's sign"
    return [f"{sentence}; not: {'; '.join(other)}." if other else f"{sentence}."]


def _change(value: float, base: float) -> float:
    """By how many percent a loss is larger than another."""
    return 100 * (value / base - 1) if base > 0 else 0.0


def _paper_averages(
    paper: Mapping[str, tuple[float, float, float, str]], at: int
) -> dict[str, float]:
    hits = 100 * fmean(float(at == 0 and name not in PAPER_GUESSED) for name in paper)
    altered = 0.0 if at == 0 else fmean(entry[1] for entry in paper.values())
    confidence = fmean(float(entry[0] if at == 0 else entry[2]) for entry in paper.values())
    return {
        "altered": altered,
        **dict.fromkeys(("correct", "top 5", "top 10"), hits),
        "confidence": confidence,
    }
