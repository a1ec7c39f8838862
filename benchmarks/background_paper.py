"""Measure two things of the background-class paper at its own size, over several runs.

    python benchmarks/background_paper.py selection --data-root ROOT --minutes 60
    python benchmarks/background_paper.py splits --data-root ROOT --minutes 60
    python benchmarks/background_paper.py tables    # what results/background-class-paper has

`selection` is the paper's cross-validation: 10 folds, four times, 20 epochs (profile `paper`).
`splits` makes Tables III to V on the random splits 4 to 10 of the profile `desk`; the study itself
has splits 1 to 3. Both write results/background-class-paper/PART.json after each fold or split, and
a later run goes on there. They stop after the first fold or split that ends past --minutes. Each
entry has the fingerprint of the code that computed it. Seconds are of the processor, on one
thread: set OMP_NUM_THREADS=1.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from demur import seeds
from demur.commands.run import STUDIES, code_of
from demur.data import ImageSet
from demur.data.background import Selection, confusing_classes
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read
from demur.evaluation.store import Store
from demur.progress import Silent, reporting
from demur.studies.background_class import tables
from demur.studies.background_class.material import Material, gather
from demur.studies.background_class.plan import _measure
from demur.studies.background_class.profile import Profile
from demur.studies.background_class.recipes import Split, Training
from demur.studies.background_class.tables import Cells

STUDY = "background-class"
RESULTS = Path(__file__).resolve().parents[1] / "results"
FOLDER = RESULTS / "background-class-paper"
SHOWN = ("Table III: clean images", "Table V: attacked images", "Table IV: attack success rates")
SPLITS = 10
SEED = 0

Entry = dict[str, Any]


def entries(part: str) -> list[Entry]:
    """Give what earlier runs computed."""
    path = FOLDER / f"{part}.json"
    found: list[Entry] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def keep(part: str, entry: Entry) -> None:
    """Add an entry to the file of a part."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, ensure_ascii=False) for one in [*entries(part), entry]]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    (FOLDER / f"{part}.json").write_text(text, encoding="utf-8")


def ready(name: str, root: Path) -> tuple[Profile, Material]:
    """Load a profile of the study, and its images."""
    profile = load_profile(STUDIES[STUDY], name)
    assert isinstance(profile, Profile)
    return profile, gather(profile, root, SEED)


def folds(profile: Profile, material: Material) -> Iterator[tuple[Entry, ImageSet, ImageSet, int]]:
    """Give repeat and fold, the images to train on and to test on, and the seed of each fold."""
    settings = profile.selection
    own = seeds.derive(SEED, "selection")
    chosen = material.for_selection.select_classes((*material.keys, *material.candidates))
    chosen = chosen.balanced(settings.per_class, own)
    found = []

    def planned(train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int) -> Tensor:
        found.append(({"repeat": repeat, "fold": fold}, train, test, seed))
        return test.labels

    options = settings.model_dump(include={"folds", "repeats", "cutoff"})
    with reporting(Silent()):
        selection: Selection = confusing_classes(
            chosen, material.keys, material.candidates, planned, seed=own, **options
        )
    assert len(selection.table) == len(material.candidates)
    yield from found


def select(root: Path) -> Iterator[Entry]:
    """Train and test the next fold of the selection, again and again."""
    profile, material = ready("paper", root)
    recipe = Training(profile.selection.epochs, profile.batch_size)
    done = {(one["repeat"], one["fold"]) for one in entries("selection")}
    for place, train, test, seed in folds(profile, material):
        if (place["repeat"], place["fold"]) in done:
            continue
        start = time.process_time()
        with TemporaryDirectory() as store:
            node = Evaluate(Train(recipe, train, seed, name="selection"), test, None)
            outputs = execute([node], Store(Path(store)), Local(), Environment.here("cpu"))
            predicted = torch.tensor(outputs.records([node])["prediction"].to_list())
        names = test.class_names
        other = torch.isin(predicted, torch.tensor(test.class_indices(material.candidates)))
        counts = {
            name: [
                int((test.labels == names.index(name)).sum()),
                int(other[test.labels == names.index(name)].sum()),
            ]
            for name in material.candidates
        }
        right = round(float((predicted == test.labels).double().mean()), 5)
        yield place | {"accuracy": right, "taken": counts} | _made(start)


def split(root: Path) -> Iterator[Entry]:
    """Measure the next random split, again and again."""
    profile, material = ready("desk", root)
    selection = Selection((), profile.selection.cutoff, 0)
    kept = tuple(profile.background)
    first = Split(material.keys, kept, profile.held_out, SEED, profile.background_share)
    done = {one["split"] for one in entries("splits")}
    for number in range(profile.splits, SPLITS):
        if number + 1 in done:
            continue
        start = time.process_time()
        cells = Cells(profile, material, selection, kept)
        own = Split(**vars(first) | {"seed": seeds.derive(SEED, "split", number)})
        _measure(cells, own, number)
        with TemporaryDirectory() as store:
            nodes = list(cells.lines)
            outputs = execute(nodes, Store(Path(store)), Local(), Environment.here("cpu"))
            records = tables._lined(outputs, cells.lines)
        found = tables._of_test_images(
            records.filter(split="test"), records.filter(split="Carlini")
        )
        shown = {
            title: [[one.group, one.row, one.column, one.measured] for one in found[title]]
            for title in SHOWN
        }
        yield {"split": number + 1, "tables": shown} | _made(start)


def _made(start: float) -> Entry:
    return {"seconds": round(time.process_time() - start), "code": code_of(STUDY)}


def say_selection() -> None:
    """Print how often each kind was taken for background, and what is kept."""
    found = entries("selection")
    total: dict[str, list[int]] = {}
    for entry in found:
        for name, (images, taken) in entry["taken"].items():
            old = total.get(name, [0, 0])
            total[name] = [old[0] + images, old[1] + taken]
    rates = {name: taken / images for name, (images, taken) in total.items()}
    cutoff = load_profile(STUDIES[STUDY], "paper").selection.cutoff
    kept = {name for name, rate in rates.items() if rate >= cutoff}
    both = kept & set(tables.LETTERS)
    seconds = sum(one["seconds"] for one in found)
    print(f"\nSelection: {len(found)} of 40 folds, {seconds / 3600:.1f} hours of the processor.")
    print(f"Kept from {cutoff:.0%} up: {len(kept)}, of which {len(both)} of the paper's 22.")
    print(f"Kept, and not by the paper: {' '.join(sorted(kept - both)) or 'none'}.")
    print(f"The paper's, and not kept: {' '.join(sorted(set(tables.LETTERS) - both)) or 'none'}.")
    print("\n| kind | images | taken for background (%) |\n|---|---:|---:|")
    for name, rate in sorted(rates.items(), key=lambda one: -one[1]):
        print(f"| {name} | {total[name][0]:,} | {100 * rate:.2f} |")


def say_splits() -> None:
    """Print the tables of all splits: mean and sd of those of the study and of the others."""
    desk = {one.title: one for one in read(RESULTS / "background-class-desk").tables}
    found = entries("splits")
    seconds = sum(one["seconds"] for one in found)
    print(f"\nSplits 1 to 3 and {len(found)} more, {seconds / 3600:.1f} hours of the processor.")
    for title in SHOWN:
        print(f"\n{title}\n\n| | | | measured (%) | the paper (%) |\n|---|---|---|---:|---:|")
        rows = {(one.group, one.row, one.column): one for one in desk[title].rows}
        for key, one in rows.items():
            more = [
                value
                for entry in found
                for *names, value in entry["tables"][title]
                if tuple(names) == key and value is not None
            ]
            if one.measured is None or len(more) < len(found):
                continue
            mean, spread = together(one.measured, one.sd or 0.0, 3, more)
            paper = "" if one.paper is None else f"{one.paper:.2f}"
            paper += "" if one.paper_sd is None else f" ± {one.paper_sd:.2f}"
            print(f"| {' | '.join(key)} | {mean:.2f} ± {spread:.2f} | {paper} |")


def together(mean: float, sd: float, count: int, more: list[float]) -> tuple[float, float]:
    """Give mean and sample sd of `count` values, of which these are known, and of more values.

    >>> [round(one, 6) for one in together(2.0, 1.0, 3, [4.0, 5.0])]
    [3.0, 1.581139]
    """
    if not more:
        return mean, sd
    total = count + len(more)
    middle = (count * mean + sum(more)) / total
    own = stdev(more) if len(more) > 1 else 0.0
    squares = (count - 1) * sd**2 + (len(more) - 1) * own**2
    squares += count * (mean - middle) ** 2 + len(more) * (fmean(more) - middle) ** 2
    return middle, math.sqrt(squares / (total - 1))


def main() -> None:
    """Compute until the time is over, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("selection", "splits", "tables"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    if options.part == "tables":
        say_selection()
        say_splits()
        return
    end = time.monotonic() + 60 * options.minutes
    parts = {"selection": select, "splits": split}
    for entry in parts[options.part](options.data_root):
        keep(options.part, entry)
        said = {name: value for name, value in entry.items() if name not in ("taken", "tables")}
        print(said, flush=True)
        if time.monotonic() > end:
            break


if __name__ == "__main__":
    main()
