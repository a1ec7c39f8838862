"""Strength and speed of the ensemble against AutoAttack, on networks of three kinds.

    DEMUR_PEERS_PATH=DIR python benchmarks/audit.py --data-root DIR --cache DIR [--images 256]
        [--rounds 1] [--networks plain,adversarially-trained,certified-trained] [--norm linf]
        [--attacks auto,float32,quick,thorough] [--without foolbox,adv_lib]

A plain, an adversarially trained and a certified-trained network for MNIST (`audit_networks.py`)
are trained once, which takes minutes, and kept in --cache. Each is attacked in one process by
AutoAttack (Croce & Hein 2020), version "standard" in its authors' code and in float32, and by
`Strongest` in its profiles, in turn. demur decides all outcomes, in float32, and checks that no
image left the allowed set. Seconds are those of the processor, summed over its threads: other
processes do not count. They are of one run: compare them with each other only.

Then foolbox and adv-lib attack the images that `Strongest` calls safe. An image that another
library breaks there is listed with the attack that broke it. A library that is not installed is
named and left out. `attacks.py` says how AutoAttack is found and the libraries are installed.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attacks import add_autoattack, foolbox_attack, in_batches
from audit_networks import ADVERSARIAL_EPS, CERTIFIED_EPS, TRAININGS, network
from demur import Classifier, Outcome, attacks, data, outcomes
from demur.attacks.base import SearchAttack
from demur.attacks.engine import GradientPrecision
from demur.attacks.strongest import PROFILES
from demur.hardware import keep_buffers

EPS = {
    "plain": {"linf": 0.1, "l2": 1.5},
    "adversarially-trained": {"linf": ADVERSARIAL_EPS, "l2": 2.0},
    "certified-trained": {"linf": CERTIFIED_EPS, "l2": 2.0},
}
SECTIONS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's version "standard", attack by attack, in its order."""


@dataclass
class Member:
    """What one attack of an ensemble met, broke and cost."""

    met: int = 0
    broken: int = 0
    seconds: float = 0.0


@dataclass
class Found:
    """What one ensemble found: attacked images, the attack that broke each, and the members."""

    images: Tensor
    by: list[str]
    seconds: float
    members: dict[str, Member] = field(default_factory=dict)
    note: str = ""


@dataclass
class Problem:
    """What is attacked."""

    classifier: Classifier
    images: Tensor
    labels: Tensor
    norm: str
    eps: float
    batch: int

    @property
    def threat(self) -> str:
        """The threat as text."""
        return f"{self.norm}:{self.eps:g}"

    def broken(self, images: Tensor) -> Tensor:
        """Flag the images (N,) that are wrong, and allowed but for rounding."""
        sizes = attacks.sizes(self.images, images)[self.norm]
        allowed = sizes <= self.eps * (1 + 1e-5)
        return allowed & (outcomes(self.classifier, images, self.labels) == Outcome.WRONG)

    def rows(self, index: Tensor) -> "Problem":
        """Give the problem of the images at `index`."""
        images, labels = self.images[index], self.labels[index]
        return Problem(self.classifier, images, labels, self.norm, self.eps, self.batch)


@contextmanager
def recorded(members: dict[str, Member]) -> Iterator[None]:
    """Inside: note what each search attack meets, breaks and costs."""
    original = SearchAttack.__call__

    def noted(self: SearchAttack, *given: Any, **options: Any) -> attacks.AttackResult:
        start = time.process_time()
        result = original(self, *given, **options)
        member = members.setdefault(repr(self), Member())
        member.seconds += time.process_time() - start
        member.met += len(result.success)
        member.broken += int(result.success.sum())
        return result

    SearchAttack.__call__ = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        SearchAttack.__call__ = original  # type: ignore[method-assign]


def ours(profile: str, precision: GradientPrecision, problem: Problem) -> Found:
    """Attack with `Strongest`."""
    members: dict[str, Member] = {}
    start = time.process_time()
    with recorded(members):
        result = PROFILES[profile](
            problem.classifier,
            problem.images,
            problem.labels,
            problem.threat,
            batch_size=problem.batch,
            precision=precision,
        )
    seconds = time.process_time() - start
    return Found(result.images, list(result.by), seconds, members, str(result.sampled or ""))


def autoattack(problem: Problem) -> Found:
    """Attack with AutoAttack, one of its attacks after another, each on the images that are left.

    This is what its version "standard" does, and it tells which attack broke an image.
    """
    norm = {"linf": "Linf", "l2": "L2"}[problem.norm]
    make = import_module("autoattack").AutoAttack
    found = Found(problem.images.clone(), [""] * len(problem.images), 0.0)
    for section in SECTIONS:
        left = (~problem.broken(found.images)).nonzero().flatten()
        if not len(left):
            break
        here = problem.rows(left)
        start = time.process_time()
        theirs = make(
            here.classifier, norm=norm, eps=here.eps, seed=0, version="standard", verbose=False,
            device=here.images.device,
        )  # fmt: skip
        theirs.attacks_to_run = [section]
        attacked = theirs.run_standard_evaluation(here.images, here.labels, bs=problem.batch)
        seconds = time.process_time() - start
        broken = here.broken(attacked)
        found.images[left[broken]] = attacked[broken]
        for row in left[broken].tolist():
            found.by[row] = section
        found.seconds += seconds
        found.members[section] = Member(len(left), int(broken.sum()), seconds)
    return found


def oracles(without: list[str]) -> dict[str, tuple[str, Callable[[Problem], Tensor]]]:
    """Give attacks of other libraries: name -> (package, attack)."""

    def by_foolbox(make: Callable[[], object], problem: Problem) -> Tensor:
        attack = in_batches(foolbox_attack(make, problem.eps), problem.batch)
        return attack(problem.classifier, problem.images, problem.labels)

    def foolbox_pgd() -> object:
        from foolbox.attacks import LinfPGD

        return LinfPGD(steps=300, rel_stepsize=0.03).repeat(2)

    def foolbox_fmn() -> object:
        from foolbox.attacks import LInfFMNAttack

        return LInfFMNAttack(steps=300)

    def by_adv_lib(name: str, options: dict[str, Any], problem: Problem) -> Tensor:
        attack = getattr(import_module("adv_lib.attacks"), name)
        eps = {"eps": problem.eps} if name.startswith("apgd") else {}

        def run(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
            return torch.as_tensor(attack(classifier, images, labels, **eps, **options)).detach()

        return in_batches(run, problem.batch)(problem.classifier, problem.images, problem.labels)

    order = float("inf")
    known = {
        "foolbox LinfPGD(300) x 2": ("foolbox", partial(by_foolbox, foolbox_pgd)),
        "foolbox LInfFMN(300)": ("foolbox", partial(by_foolbox, foolbox_fmn)),
        "adv-lib FMN(1000)": (
            "adv_lib",
            partial(by_adv_lib, "fmn", {"norm": order, "steps": 1000}),
        ),
        "adv-lib APGD, targeted, DLR": (
            "adv_lib",
            partial(by_adv_lib, "apgd_targeted", {"norm": order, "n_restarts": 1}),
        ),
    }
    return {name: one for name, one in known.items() if one[0] not in without}


def cross_check(problem: Problem, found: Found, without: list[str]) -> None:
    """Attack the images that `Strongest` calls safe with other libraries, and list what breaks."""
    right = outcomes(problem.classifier, problem.images, problem.labels) == Outcome.CORRECT
    safe = (right & ~problem.broken(found.images)).nonzero().flatten()
    if problem.norm != "linf" or not len(safe):
        return
    here = problem.rows(safe)
    print(f"\nOther libraries on the {len(safe)} images that standard (auto) calls safe:\n")
    for name, (package, attack) in oracles(without).items():
        if find_spec(package) is None:
            print(f"- {name}: not installed")
            continue
        start = time.process_time()
        broken = here.broken(attack(here).float().clamp(0, 1))
        seconds = time.process_time() - start
        which = safe[broken].tolist()
        print(f"- {name}: {len(which)} broken {which or ''}, {seconds:.0f} s", flush=True)


def measure(
    name: str, problem: Problem, wanted: list[str], rounds: int, without: list[str]
) -> None:
    """Attack one network with all ensembles in turn, and print."""
    contenders: dict[str, Callable[[Problem], Found]] = {}
    if add_autoattack():
        contenders["AutoAttack standard"] = autoattack
    known: dict[str, Callable[[Problem], Found]] = {
        "auto": partial(ours, "standard", "auto"),
        "float32": partial(ours, "standard", "float32"),
        "quick": partial(ours, "quick", "auto"),
        "thorough": partial(ours, "thorough", "auto"),
    }
    named = {"auto": "standard (auto)", "float32": "standard (float32)"}
    contenders |= {named.get(key, key): known[key] for key in wanted}
    runs: dict[str, list[Found]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, attack in contenders.items():
            runs[key].append(attack(problem))
    print(f"\n### {name}, {problem.threat}, {len(problem.images)} images\n")
    _table(problem, runs)
    _members({key: found[0] for key, found in runs.items()})
    if "standard (auto)" in runs:
        cross_check(problem, runs["standard (auto)"][0], without)


def _table(problem: Problem, runs: dict[str, list[Found]]) -> None:
    theirs = runs.get("AutoAttack standard", [])
    right = outcomes(problem.classifier, problem.images, problem.labels) == Outcome.CORRECT
    print("| ensemble | robust % | only this broke | only AutoAttack broke | seconds | ratio |")
    print("|---|---|---|---|---|---|")
    for key, found in runs.items():
        broken = problem.broken(found[0].images)
        robust = 100 * float((right & ~broken).float().mean())
        ratio = mine = other = ""
        if theirs and key != "AutoAttack standard":
            reference = problem.broken(theirs[0].images)
            mine = _named(broken & ~reference, found[0].by)
            other = _named(reference & ~broken, theirs[0].by)
            pairs = zip(found, theirs, strict=True)
            ratio = f"{median(one.seconds / two.seconds for one, two in pairs):.3f}"
        seconds = median(one.seconds for one in found)
        print(f"| {key} | {robust:.2f} | {mine} | {other} | {seconds:.1f} | {ratio} |")
    for key, found in runs.items():
        if found[0].note:
            print(f"\n{key}: {found[0].note}")


def _members(runs: dict[str, Found]) -> None:
    print("\n| ensemble | member | images met | broken | seconds |")
    print("|---|---|---|---|---|")
    for key, found in runs.items():
        for name, member in found.members.items():
            print(f"| {key} | {name} | {member.met} | {member.broken} | {member.seconds:.2f} |")


def _named(flags: Tensor, by: list[str]) -> str:
    rows = flags.nonzero().flatten().tolist()
    return "; ".join(f"{row}: {by[row]}" for row in rows) or "none"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--cache", type=Path, help="folder to keep the trained networks in")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", default=",".join(TRAININGS))
    parser.add_argument("--norm", default="linf", choices=["linf", "l2"])
    parser.add_argument("--attacks", default="auto,float32,quick")
    parser.add_argument("--without", default="", help="packages to leave out: foolbox,adv_lib")
    given = parser.parse_args()
    keep_buffers()
    test = data.load("mnist", "test", given.data_root)
    images, labels = test.to_float()[: given.images], test.labels[: given.images]
    print(f"{len(images)} images, batches of {given.batch}, {torch.get_num_threads()} threads")
    for name in given.networks.split(","):
        classifier = network(name, given.data_root, given.cache)
        eps = EPS[name][given.norm]
        problem = Problem(classifier, images, labels, given.norm, eps, given.batch)
        measure(name, problem, given.attacks.split(","), given.rounds, given.without.split(","))


if __name__ == "__main__":
    main()
