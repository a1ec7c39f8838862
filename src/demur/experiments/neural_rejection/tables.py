"""The figures of the rejection paper that it prints, what its pictures show, and what it lacks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.data import ImageSet
from demur.evaluation import NodeResult
from demur.evaluation.results import Curve, Measurement, Series, Table
from demur.evaluation.shares import ATTACKED_BY, front, mean, series, share, triple
from demur.experiments.neural_rejection.attackers import (
    ATTACKERS,
    PAPER,
    STRONGEST,
    UNAWARE,
    Attacked,
)
from demur.experiments.neural_rejection.models import (
    ADVERSARIAL,
    DNN,
    DNR,
    LAYERS,
    NR,
    RETRAINED,
    Material,
    Model,
)
from demur.experiments.neural_rejection.profile import Profile
from demur.metrics import rates
from demur.metrics import rejection as measures

TABLE_3 = {("training", "cross-entropy"): 0.0684, ("test", "cross-entropy"): 0.0462,
           ("training", "accuracy"): 98.24, ("test", "accuracy"): 98.95}  # fmt: skip
PAPERS_IMAGES = 30_000
ALPHAS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
BLIND = 0.01  # the share of zero gradients from which it is worth a warning


@dataclass(frozen=True)
class Sheets:
    """All that was measured, as tables, curves and sentences."""

    profile: Profile
    material: Material
    models: Mapping[str, Model]
    network: NodeResult
    found: Mapping[str, Attacked]
    moved: Mapping[str, Mapping[float | str, NodeResult]]
    images: ImageSet

    @property
    def eps(self) -> float:
        """Where all attacks are compared."""
        return self.profile.strongest.eps

    @property
    def at(self) -> int:
        """Its place on the curve."""
        return self.profile.attack.eps.index(self.eps)

    def outcomes(self, model: str, attacker: str) -> list[Tensor]:
        """Outcomes (E, N) of each repeat."""
        found = self.found[model]
        cells = {UNAWARE: found.judged, PAPER: found.paper}
        return self._repeats(
            found.worst if attacker == STRONGEST else cells[attacker].tensors["outcomes"]
        )

    def _repeats(self, outcomes: Tensor) -> list[Tensor]:
        """Outcomes (..., N) of each repeat: each has as many images, one after the other."""
        return list(outcomes.split(self.profile.attack.images, dim=-1))  # type: ignore[no-untyped-call]

    def tables(self) -> list[Table]:
        """Table 3, Figures 7 and 8, 11 and 12 in figures, and what the paper does not measure."""
        return [
            self._network(),
            self._machines(),
            self._clean(),
            self._against_eps("Correct or rejected", ("correct", "rejected")),
            self._against_eps("Correct", ("correct",)),
            self._against_eps("Rejected", ("rejected",)),
            self._compared(),
            self._measures(),
            self._with_rejection(),
            self._gradients(),
            self._front(),
        ]

    def _front(self) -> Table:
        found = {}
        for name, model in self.models.items():
            attacked = [
                [rates(one[self.at]) for one in self.outcomes(name, attacker)]
                for attacker in ATTACKERS
            ]
            found[name] = dict(
                zip(ATTACKED_BY, [[rates(model.values["clean"])], *attacked], strict=True)
            )
        return front(
            found,
            f"L2 within {self.eps:g}. Defence-aware: the paper's attacker. No attack: all test images.",
        )

    def _network(self) -> Table:
        values, printed = (
            self.network.values,
            self.profile.train_images == PAPERS_IMAGES and self.material.train.name == "mnist",
        )
        measured = {
            ("training", "cross-entropy"): values["loss"],
            ("training", "accuracy"): 100 * values["accuracy"],
        }
        for row, part in (("test", "test"), ("training, without dropout", "train")):
            measured |= {
                (row, "cross-entropy"): values[f"{part}_loss"],
                (row, "accuracy"): 100 * values[f"{part}_accuracy"],
            }
        rows = [
            Measurement(
                row,
                column,
                unit="%" if column == "accuracy" else "",
                measured=value,
                paper=TABLE_3.get((row, column)) if printed else None,
            )
            for (row, column), value in measured.items()
        ]
        note = f"After {self.profile.epochs} epochs on {len(self.material.train):,} images; in training with dropout, over the last epoch."
        return Table("The network (Table 3)", rows, note)

    def _machines(self) -> Table:
        rows = []
        for name in (NR, DNR, DNR + RETRAINED, DNR + ADVERSARIAL):
            values = self.models[name].values
            wanted = [*LAYERS.values(), "combined"] if name != NR else list(LAYERS.values())
            layers = [
                (layer, values["by_layer"][layer])
                for layer in wanted
                if layer in values["by_layer"]
            ]
            for place, (layer, accuracy) in enumerate(layers):
                n = len(self.material.test)
                rows.append(share(layer, "accuracy", [(round(accuracy * n), n)], group=name))
                if place < len(values["support"]):
                    rows.append(
                        Measurement(
                            layer, "support vectors", group=name, measured=values["support"][place]
                        )
                    )
        settings = self.profile.machines
        per_class = (
            "all training images"
            if settings.per_class is None
            else f"{settings.per_class:,} images of each class"
        )
        note = (
            "Test images whose highest-scoring machine is that of their class, without rejection. RBF "
            f"machines on {per_class}: C {settings.C:g}, gamma {settings.gamma:g}; combined C "
            f"{settings.combiner_C:g}, gamma {settings.combiner_gamma:g}. The text of the paper does "
            "not print the values of Figures 7 and 8."
        )
        return Table("The machines, layer by layer (Figures 7 and 8)", rows, note)

    def _clean(self) -> Table:
        rows: list[Measurement] = []
        for name, model in self.models.items():
            found = rates(model.values["clean"])
            rows += triple(name, [found])
            rows.append(
                share(name, "selective accuracy", [(found.correct, found.correct + found.wrong)])
            )
            rows.append(Measurement(name, "selective F1", measured=found.selective_f1))
            if model.rejects:
                validation = model.values["false_rejection"]
                rows.append(
                    Measurement(
                        name,
                        "rejected of validation",
                        unit="%",
                        measured=100 * validation,
                        n=len(self.material.validation),
                    )
                )
                noise = self.found[name].out_of_distribution
                if noise is not None:
                    counts = [(noise.values["rejected"], noise.values["n"])]
                    rows.append(share(name, "noise rejected", counts))
        note = (
            f"All {len(self.material.test):,} test images. Selective accuracy is the accuracy on "
            "accepted images; selective F1 is its harmonic mean with the share accepted. Reject below "
            f"{self.profile.machines.threshold:g}, on Platt's probabilities normalised over classes."
        )
        return Table("Clean images", rows, note)

    def _against_eps(self, title: str, counted: Sequence[str]) -> Table:
        rows = []
        for attacker in ATTACKERS:
            for model in self.models:
                if title == "Rejected" and not self.models[model].rejects:
                    continue
                for place, eps in enumerate(self.profile.attack.eps):
                    # At eps 0 a rejection is an error.
                    names = [
                        name for name in counted if eps or name != "rejected" or title == "Rejected"
                    ]
                    found = [rates(one[place]) for one in self.outcomes(model, attacker)]
                    counts = [(sum(getattr(one, name) for name in names), one.n) for one in found]
                    rows.append(share(model, f"eps {eps:g}", counts, group=attacker))
        attack = self.profile.attack
        note = (
            f"L2; {attack.repeats} times {attack.images} test images, mean and sd over these. The "
            "defence-unaware attacker attacks the network alone and maximises the loss. The strongest "
            "ensemble is, for each image, the worst outcome of these two attackers, of the search for "
            f"the smallest change and, from eps {self.eps:g} on, of `attacks.Strongest`. Where no wrong "
            "answer was forced, a forced rejection counts."
        )
        note += " At eps 0 a rejection counts as an error." if len(counted) > 1 else ""
        return Table(f"{title}, against eps (Figures 11 and 12)", rows, note)

    def _compared(self) -> Table:
        rows: list[Measurement] = []
        for model in (DNN, NR, DNR):
            found = self.found[model]
            lines = {
                attacker: [one[self.at] for one in self.outcomes(model, attacker)]
                for attacker in (UNAWARE, PAPER)
            }
            lines |= {
                attack: self._repeats(cell.tensors["outcomes"])
                for attack, cell in found.compared.items()
            }
            broken = [
                torch.stack([one[place] for one in lines.values()]).amax(0)
                for place in range(self.profile.attack.repeats)
            ]
            lines["the worst of these"] = broken
            for attack, each in lines.items():
                rows += triple(attack, [rates(one) for one in each], group=model)
        note = (
            f"L2 within {self.eps:g}. The paper's attack uses the margin of sec. 2.5.1 and includes "
            "images broken at a smaller eps; with twice the steps it is run at this eps alone. The "
            "density is a kernel estimate of the features of known images, as the paper's conclusion "
            "suggests. Feature matching moves towards the features of an accepted image of another "
            "class. These two follow gradients of wider kernels. The ensemble is `attacks.Strongest`."
        )
        return Table(f"The attacks compared, at eps {self.eps:g}", rows, note)

    def _measures(self) -> Table:
        rows = []
        for model in (NR, DNR):
            cells, found = self.moved[model], self.found[model]
            tuned, n = cells["accepted"].tensors, self.profile.thresholds.images

            def add(column: str, value: float, n: int = n, model: str = model) -> None:
                rows.append(
                    Measurement(
                        model,
                        column,
                        unit="%",
                        measured=None if math.isnan(value) else 100 * value,
                        n=n,
                    )
                )

            add("robust error at 99 % accepted", _robust_error(tuned))
            for rate in (0.05, 0.1):
                if rate in cells:
                    attacked = rates(cells[rate].tensors["attacked_outcomes"])
                    add(f"detected at {100 * rate:g} % false rejection", attacked.rejection_rate)
                    add(f"broken at {100 * rate:g} % false rejection", attacked.error_rate)
            clean, worst = (
                found.worst[self.profile.attack.eps.index(0.0)],
                found.worst[self.at] == Outcome.WRONG,
            )
            implied = measures.implied_robust_accuracy(clean, worst)
            add(f"implied robust accuracy at eps {self.eps / 2:g}", implied, n=len(self.images))
        half = self.profile.attack.eps.index(self.eps / 2)
        for model in (DNN, DNN + RETRAINED, DNN + ADVERSARIAL):
            known = rates(self.found[model].worst[half])
            rows.append(
                share(
                    model,
                    f"implied robust accuracy at eps {self.eps / 2:g}",
                    [(known.correct, known.n)],
                )
            )
        note = (
            f"Attacked within {self.eps:g} in L2 by an attacker that knows the threshold, which is set "
            f"on {len(self.material.validation):,} clean validation images. Robust error is taken where "
            "99 % of the correct images are accepted (Stutz et al. 2020), detection at each false "
            "rejection rate. A detector that is robust within eps implies a slow classifier that is "
            "robust within half of it (Tramer 2022): the last column has the implied accuracy, and "
            "that of the networks without rejection."
        )
        return Table("Other measures of rejection", rows, note)

    def _with_rejection(self) -> Table:
        rows = []
        for model in (name for name, one in self.models.items() if one.rejects):
            found = self.found[model]
            broken = found.worst[self.at] == Outcome.WRONG
            errors = measures.error_with_rejection(broken, found.rejected_at, self.eps, ALPHAS)
            for alpha, error in zip(ALPHAS, errors, strict=True):
                rows.append(
                    share(model, f"alpha {alpha:g}", [(round(error * len(broken)), len(broken))])
                )
            for power in (1, 2, 4):
                loss = measures.total_robust_loss(
                    broken, found.rejected_at, measures.ramp_loss(self.eps, power)
                )
                rows.append(
                    Measurement(model, f"ramp loss, power {power}", measured=loss, n=len(broken))
                )
            median = float(found.rejected_at.median())
            length, lacking = (
                (None, "none for half of the images") if median == float("inf") else (median, "")
            )
            rows.append(
                Measurement(
                    model, "median L2 to a rejection", measured=length, n=len(broken), note=lacking
                )
            )
        note = (
            f"Share of images with an accepted error within {self.eps:g}, or a rejection within alpha "
            f"times {self.eps:g}: R_eps(f, alpha) of Chen et al. 2023. Their total robust loss is given "
            "for ramps, where a rejection costs more the nearer it is. Forcing a rejection is an "
            "attack too."
        )
        return Table("Errors, with rejections near the image counted as errors", rows, note)

    def _gradients(self) -> Table:
        rows = []
        for model, found in self.found.items():
            for attacker, cell in ((PAPER, found.paper), (STRONGEST, found.strongest)):
                backwards = cell.values["backwards"]
                zero = cell.values["zero_gradients"]
                rows.append(
                    Measurement(
                        model,
                        "zero gradients",
                        group=attacker,
                        unit="%",
                        measured=100 * zero / max(1, backwards),
                    )
                )
                rows.append(
                    Measurement(
                        model,
                        "gradients an image",
                        group=attacker,
                        measured=backwards / len(self.images),
                    )
                )
            if self.models[model].rejects:
                alone = found.strongest.tensors["alone"]
                reached = alone.isfinite().double().mean(1)
                for name, value in (
                    ("original kernels", reached[0]),
                    ("wider kernels", alone[1:].isfinite().any(0).double().mean()),
                ):
                    row = share(
                        model,
                        f"found, {name}",
                        [(round(float(value) * alone.shape[1]), alone.shape[1])],
                        group=STRONGEST,
                    )
                    rows.append(row)
        note = (
            "Kernels are flat far from their support vectors. Found: images for which the search for the "
            "smallest change found an accepted error at any distance, with gradients of the original "
            "kernels and of wider ones."
        )
        return Table("Gradients", rows, note)

    def curves(self) -> list[Curve]:
        """Figure 11, Figure 12, and the outcomes against false rejection."""
        attack = self.profile.attack
        groups = [
            ((DNN, NR, DNR), "Security evaluation (Figure 11)"),
            (tuple(self.models)[3:], "After adversarial training (Figure 12)"),
        ]
        drawn = []
        for names, title in groups:
            lines = []
            for model, attacker in ((model, attacker) for model in names for attacker in ATTACKERS):
                together = torch.cat(self.outcomes(model, attacker), dim=1)
                lines.append(series(f"{model}, {attacker}", [rates(found) for found in together]))
            note = f"Outcomes of {len(self.images):,} test images. The paper's accuracy counts correct and rejected."
            drawn.append(Curve(title, "eps (L2)", list(attack.eps), lines, note))
        percent = [round(100 * rate, 10) for rate in self.profile.thresholds.rates]
        lines = []
        for model, cells in self.moved.items():
            for kind in ("clean", "attacked"):
                lines.append(self._against_rejection(f"{model}, {kind}", cells, f"{kind}_outcomes"))
        note = (
            f"The threshold rejects that share of {len(self.material.validation):,} validation images. "
            f"{self.profile.thresholds.images} test images are attacked within {self.eps:g} in L2 by PGD "
            "on the margin, which knows the threshold, with kernels of three widths. An attacked image "
            "that is accepted at a higher threshold counts as accepted at every lower one. The "
            "strongest ensemble would break more."
        )
        return [
            *drawn,
            Curve(
                "Outcomes against false rejection",
                "validation images rejected (%)",
                percent,
                lines,
                note,
            ),
        ]

    def _against_rejection(
        self, name: str, cells: Mapping[float | str, NodeResult], kind: str
    ) -> Series:
        points, broken = [], torch.zeros(self.profile.thresholds.images, dtype=torch.bool)
        for rate in reversed(self.profile.thresholds.rates):
            found = cells[rate].tensors[kind]
            broken = broken | (found == Outcome.WRONG) if kind.startswith("attacked") else broken
            points.append(rates(torch.where(broken, int(Outcome.WRONG), found)))
        return series(name, points[::-1])

    def summary(self) -> list[str]:
        """Say the main findings in sentences made of the figures."""
        clean = {name: [rates(self.models[name].values["clean"])] for name in (DNN, NR, DNR)}
        toy = "A toy, to see how it works: small embedded digits and few images."
        sentences = [
            *([toy] if self.material.embedded else []),
            f"Clean images: {mean(clean[DNN], 'correct'):.2f} % correct for the network, {mean(clean[NR], 'correct'):.2f} % with NR "
            f"(which rejects {mean(clean[NR], 'rejected'):.2f} %) and {mean(clean[DNR], 'correct'):.2f} % with DNR "
            f"({mean(clean[DNR], 'rejected'):.2f} % rejected).",
        ]
        for model in self.models:
            wrong = {
                who: mean([rates(one[self.at]) for one in self.outcomes(model, who)], "wrong")
                for who in ATTACKERS
            }
            sentences.append(
                f"{model} within {self.eps:g} in L2: {wrong[UNAWARE]:.1f} % wrong and accepted under the "
                f"defence-unaware attacker, {wrong[PAPER]:.1f} % under the paper's, "
                f"{wrong[STRONGEST]:.1f} % under the strongest ensemble; the median length of the "
                f"smallest change found to an accepted error is {_median(self.found[model].distance)}."
            )
        return sentences

    def warnings(self) -> list[str]:
        """Whatever should make a reader doubt a figure (R13, R14, R19), in words."""
        return [
            line
            for model in self.models
            for line in (*self._better_unaware(model), *self._blind(model))
        ]

    def _better_unaware(self, model: str) -> Iterable[str]:
        """Warn where the defence-unaware attacker breaks images that the paper's does not."""
        unaware, paper = (
            torch.cat(self.outcomes(model, who), dim=1) == Outcome.WRONG for who in (UNAWARE, PAPER)
        )
        alone = (unaware & ~paper).sum(1).tolist()
        places = [
            f"{count} at eps {eps:g}"
            for eps, count in zip(self.profile.attack.eps, alone, strict=True)
            if count
        ]
        if places and self.models[model].rejects:
            yield (
                f"On {model} the defence-unaware attacker breaks images that the paper's does not: "
                f"{', '.join(places)} (of {unaware.shape[1]}). The paper's attack is not the worst case there."
            )

    def _blind(self, model: str) -> Iterable[str]:
        """The paper's attack without a gradient to follow."""
        values = self.found[model].paper.values
        backwards = values["backwards"]
        zero = values["zero_gradients"]
        if zero > BLIND * backwards:
            yield f"{100 * zero / backwards:.1f} % of the gradients of the paper's attack on {model} were zero: it was blind there."


def _robust_error(tensors: Mapping[str, Tensor]) -> float:
    """At the threshold that the classifier has, its reject column: confidence 0."""
    clean, attacked = (
        (tensors[f"{kind}_wrong"], tensors[f"{kind}_confidence"]) for kind in ("clean", "attacked")
    )
    return measures.robust_error(*clean, *attacked, 0.0)


def _median(distance: Tensor) -> str:
    value = float(distance.median())
    return (
        f"{value:.2f}"
        if value < float("inf")
        else "infinity (none was found for half of the images)"
    )
