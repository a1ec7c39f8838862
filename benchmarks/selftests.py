"""Which self-test flags which model: thirteen broken defences and eleven honest models.

    python benchmarks/selftests.py --cache DIR [--data digits|mnist] [--data-root DIR] [--seeds 5]
        [--images 40] [--models NAME,NAME] [--profile quick] [--minutes M]
    python benchmarks/selftests.py --cache DIR --robustness [--seeds 5] [--images 40]

Each model of `broken_models.py` is trained on the data and audited at linf:0.1, once for each seed.
The seed also draws the images. The first table counts, for each model and self-test, the seeds in
which the test flagged it; "refused" counts audits that the handshake ended with an error. A broken
model with the verdict "sound" is a miss, an honest one with another verdict a false alarm. The
second table has the seconds of attacks and of self-tests, summed over the seeds.

With --robustness, broken models without randomness and state are attacked on their honest twin's
gradients, too: BPDA, Square with 10,000 queries on every image, and transfer from the twin. The
share of images that stay right is printed beside that of the twin under the thorough ensemble.

Results are kept in --cache, a line of JSON for each audit: the same command goes on after an
interruption, and --minutes ends it early.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import demur
from broken_models import BROKEN, CLASSES, EPS, FURTHER, HONEST, Material
from demur import Classifier, Outcome, attacks, data, outcomes
from demur.attacks.strongest import PROFILES
from demur.data import ImageSet
from demur.errors import DemurError

MODELS: Final = {**BROKEN, **HONEST, **FURTHER}
REFUSED: Final = "refused"
TWINS: Final = (
    *("quantised input", "sparse activations", "saturated softmax", "detached gradient"),
    *("compression", "checkerboard", "sign detector", "temperature-scaled detector"),
)
"""Broken models that answer by the image alone, and whose twin is the plain network."""
EPOCHS: Final = {"digits": 15, "mnist": 6}
LEARNT: Final = 10_000
"""Training images, at most."""


def material_of(name: str, root: str | None, seed: int) -> tuple[Material, ImageSet]:
    """Give what models are trained on, and the test images."""
    train, test = data.load(name, "train", root), data.load(name, "test", root)
    assert isinstance(train, ImageSet) and isinstance(test, ImageSet)
    return Material(train.sample(min(LEARNT, len(train)), seed), seed, EPOCHS[name]), test


def audited(make: Callable[[Material], Classifier], given: argparse.Namespace, seed: int) -> Any:
    """Train a model, audit it, and describe what was found."""
    material, test = material_of(given.data, given.data_root, seed)
    model = make(material)
    images = test.sample(given.images, seed)
    threat = f"linf:{EPS}"
    try:
        found = demur.audit(model, images, [threat], profile=given.profile, seed=seed, device="cpu")
    except DemurError as error:
        return {"verdict": REFUSED, "text": str(error)}
    results = found.results
    return {
        "verdict": results.verdict,
        "flagged": [one.name for one in results.checks if one.state == "flagged"],
        "states": {one.name: one.state for one in results.checks},
        "doubts": results.doubts,
        "correct": found.threat("clean").correct,
        "wrong": found.threat(threat).wrong,
        "seconds": results.cost["seconds"],
        "self_tests": results.cost["self_tests"],
    }


def robust(name: str, given: argparse.Namespace, seed: int) -> Any:
    """Attack a broken model in all ways, and its twin with the thorough ensemble."""
    material, test = material_of(given.data, given.data_root, seed)
    broken = MODELS[name](material).eval()
    twin = Classifier(material.plain(), CLASSES).eval()
    images = test.sample(given.images, seed)
    x, y = images.to_float(), images.labels
    threat = f"linf:{EPS}"
    strong = PROFILES["thorough"]
    alone = strong(twin, x, y, threat, seed=seed)
    quick = PROFILES["quick"](broken, x, y, threat, seed=seed)
    lost = outcomes(broken, x, y) == Outcome.WRONG
    lost |= quick.success
    ways: dict[str, Callable[[], attacks.AttackResult]] = {
        "transfer": lambda: attacks.Transfer(
            attacks.PGD(steps=100, loss="cross_entropy", keep_maximizing=True)
        )(broken, x, y, threat, seed=seed, surrogate=twin),
        "BPDA": lambda: attacks.WithBPDA(PROFILES["quick"])(broken, x, y, threat, seed=seed),
        "Square": lambda: attacks.Square(n_queries=10_000)(broken, x, y, threat, seed=seed),
    }
    by_way = {"quick": float((~lost).float().mean())}
    for way, attack in ways.items():
        lost |= attack().success
        by_way[way] = float((~lost).float().mean())
    # What breaks the twin is an allowed image of the broken model, too.
    lost |= outcomes(broken, alone.candidates, y) == Outcome.WRONG
    by_way["images of the twin"] = float((~lost).float().mean())
    return {"robust": by_way, "twin": float((~alone.success).float().mean())}


def computed(
    jobs: Mapping[str, Callable[[int], Any]], given: argparse.Namespace, kind: str
) -> Iterator[tuple[str, int, Any]]:
    """Give each job's result, by name and seed; from the cache if it is there."""
    request = [kind, given.data, given.images, given.profile]
    path = given.cache / "selftests.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    known = {json.dumps(one["key"]): one["found"] for one in map(json.loads, lines)}
    end = time.monotonic() + 60 * given.minutes
    for seed in range(given.seeds):
        for name, job in jobs.items():
            key = json.dumps([*request, name, seed])
            if key not in known:
                if time.monotonic() > end:
                    continue
                known[key] = job(seed)
                with path.open("a") as file:
                    file.write(json.dumps({"key": json.loads(key), "found": known[key]}) + "\n")
                print(f"seed {seed}, {name}: {known[key]}", flush=True)
            yield name, seed, known[key]


def print_tables(found: list[tuple[str, int, Any]]) -> None:
    """Print which test flagged which model, and the cost."""
    ran = [one for _, _, one in found if one["verdict"] != REFUSED]
    tests = list(ran[0]["states"]) if ran else []
    print("\n| model | audits | verdicts | flagged by (audits) |\n|---|---|---|---|")
    missed = alarms = 0
    for name in MODELS:
        own = [one for model, _, one in found if model == name]
        if not own:
            continue
        verdicts = [one["verdict"] for one in own]
        missed += verdicts.count("sound") if name in BROKEN else 0
        alarms += len(own) - verdicts.count("sound") if name not in BROKEN else 0
        kinds = ", ".join(f"{one} {verdicts.count(one)}" for one in dict.fromkeys(verdicts))
        flags = [flag for one in own for flag in one.get("flagged", ["handshake"])]
        said = ", ".join(f"{one} {flags.count(one)}" for one in sorted(set(flags)))
        print(f"| {name} | {len(own)} | {kinds} | {said or 'nothing'} |")
    broken = sum(name in BROKEN for name, _, _ in found)
    print(f"\nMisses: {missed} of {broken} audits of broken models.")
    print(f"False alarms: {alarms} of {len(found) - broken} audits of honest models.")
    print(f"Self-tests: {', '.join(tests)}.")
    total = sum(one["seconds"] for one in ran)
    checks = sum(one["self_tests"] for one in ran)
    print(f"Seconds of attacks: {total - checks:.0f}; of self-tests: {checks:.0f}.")
    for group, names in (("broken", BROKEN), ("honest", {**HONEST, **FURTHER})):
        own = [one for name, _, one in found if name in names and one in ran]
        both = sum(one["seconds"] for one in own)
        part = sum(one["self_tests"] for one in own)
        print(f"Of {group} models: attacks {both - part:.0f} s, self-tests {part:.0f} s.")


def print_robustness(found: list[tuple[str, int, Any]]) -> None:
    """Print the robust share of broken models and of their twin, averaged over the seeds."""
    if not found:
        return
    ways = list(found[0][2]["robust"])
    print(f"\n| model | seeds | {' | '.join(ways)} | twin |")
    print("|---|---|" + "---|" * (len(ways) + 1))
    for name in dict.fromkeys(name for name, _, _ in found):
        own = [one for model, _, one in found if model == name]
        cells = [100 * sum(one["robust"][way] for one in own) / len(own) for way in ways]
        twin = 100 * sum(one["twin"] for one in own) / len(own)
        said = " | ".join(f"{cell:.1f}" for cell in cells)
        print(f"| {name} | {len(own)} | {said} | {twin:.1f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", choices=list(EPOCHS), default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--models", default="")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--robustness", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = given.models.split(",") if given.models else list(MODELS)
    if given.robustness:
        names = [name for name in TWINS if name in chosen]
        jobs = {name: lambda seed, name=name: robust(name, given, seed) for name in names}
        print_robustness(list(computed(jobs, given, "robustness")))
        return
    jobs = {name: lambda seed, name=name: audited(MODELS[name], given, seed) for name in chosen}
    print_tables(list(computed(jobs, given, "audit")))


if __name__ == "__main__":
    main()
