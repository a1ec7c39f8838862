"""The tables of this study: queries over records."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from demur.evaluation.nodes import Train
from demur.evaluation.plan import Outputs
from demur.evaluation.results import Table
from demur.evaluation.shares import ATTACKED_BY, FRONT, share
from demur.evaluation.tables import by_attacker, figures, lookup, outcome_table, share_of
from demur.studies.background_extensions.profile import Profile
from demur.studies.reported import read_texts
from demur.studies.study import Shown

CLEAN, UNAWARE, AWARE, STRONGEST = ATTACKED_BY
SHOWN = (
    (CLEAN, "correct"),
    (CLEAN, "rejected"),
    (UNAWARE, "rejected"),
    (UNAWARE, "wrong"),
    (AWARE, "wrong"),
    (STRONGEST, "wrong"),
)
"""The columns of the tables: attacker and outcome."""


@dataclass(frozen=True)
class Parts:
    """The models: by width and background, by kind of background, and by round."""

    capacity: Mapping[tuple[int, bool], Train]
    kinds: Mapping[str, Train]
    grown: Mapping[int, Train]

    def models(self, width: int) -> Iterator[tuple[Train, Train]]:
        """Give each model with its undefended twin; `width` is that of kinds and rounds."""
        for (own, _), model in self.capacity.items():
            yield model, self.capacity[own, False]
        for model in (*self.kinds.values(), *self.grown.values()):
            yield model, self.capacity[width, False]


def show(profile: Profile, parts: Parts, embedded: bool, outputs: Outputs) -> Shown:
    """Make all tables and sentences."""
    texts = {
        name: text.format(**vars(profile)) if "{" in text and "said" not in name else text
        for name, text in read_texts("background_extensions").items()
    }
    records = by_attacker(outputs.records())
    columns = {
        f"{attacker}: {outcome}": share_of(outcome, among=pl.col("group") == attacker)
        for attacker, outcome in SHOWN
    }

    def part(title: str, models: Iterable[Train], note: str) -> Table:
        names = [model.name for model in models]
        chosen = records.filter(pl.col("model").is_in(names))
        return Table(title, figures(chosen, columns), note)

    attacked = [
        part("Capacity: the width of the network", parts.capacity.values(), texts["capacity"]),
        part("Kinds of background under attack", parts.kinds.values(), texts["kinds"]),
        part("Background grown by attacks", parts.grown.values(), texts["grown"]),
    ]
    summary = [texts["toy"]] * embedded + _summary(profile, parts, attacked, texts)
    others = _strange(outputs, texts["strange"])
    front = outcome_table(FRONT, records, note=texts["front"])
    return Shown([*attacked, others, front], summary=summary)


def _strange(outputs: Outputs, note: str) -> Table:
    """Make the table of rejected images of no key class."""
    found = outputs.measurements().filter(pl.col("n").is_not_null())
    rows = [
        share(row["node"], row["name"], [(round(row["value"] * row["n"]), row["n"])])
        for row in found.to_dicts()
    ]
    return Table("Which kinds of other image are rejected", rows, note)


def _summary(
    profile: Profile, parts: Parts, tables: list[Table], texts: Mapping[str, str]
) -> list[str]:
    """Say what came out, one sentence a question."""
    of = {name: row for table in tables for name, row in lookup(table)[""].items()}
    clean, lost = f"{CLEAN}: correct", f"{STRONGEST}: wrong"
    sentences = []
    for width in profile.widths:
        before, after = (of[parts.capacity[width, both].name] for both in (False, True))
        sentences.append(
            texts["said of capacity"].format(
                width=width, before=before[clean], after=after[clean], broken=after[lost]
            )
        )
    naive = {kind: of[kind][f"{UNAWARE}: wrong"] for kind in parts.kinds}
    best, worst = min(naive, key=lambda kind: naive[kind]), max(naive, key=lambda kind: naive[kind])
    sentences.append(
        texts["said of kinds"].format(
            least=naive[best],
            best=best,
            most=naive[worst],
            worst=worst,
            ensemble=min(of[kind][lost] for kind in parts.kinds),
        )
    )
    first, last = (of[parts.grown[number].name] for number in (0, profile.grown.rounds))
    refused = f"{CLEAN}: rejected"
    sentences.append(
        texts["said of grown"].format(
            rounds=profile.grown.rounds,
            before=first[lost],
            after=last[lost],
            clean=first[refused],
            rejected=last[refused],
        )
    )
    return sentences
