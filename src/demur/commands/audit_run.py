"""The computation of an audit: its plan, the estimate of its time, and what is left out."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from demur.attacks import PGD
from demur.certificates import Prover
from demur.classifier import Preprocess
from demur.commands.audit_subject import Subject
from demur.data import CORRUPTIONS, ImageSource, read_unlabelled
from demur.errors import amount
from demur.evaluation.audit_certified import Proofs, provable
from demur.evaluation.audit_costs import Rates, seconds_of, trimmed
from demur.evaluation.audit_other import Answers, Corrupted
from demur.evaluation.audit_plan import Profile, Step, plan
from demur.evaluation.audit_tests import TestStep, self_tests_of
from demur.evaluation.engines import Engine
from demur.evaluation.keys import Environment, Keys
from demur.evaluation.on_images import OnImages
from demur.evaluation.plan import Outputs, execute
from demur.evaluation.selftests import SelfTest
from demur.evaluation.store import Store
from demur.progress import job, message
from demur.threat import ThreatModel

CERTIFIED: Final = 4
"""Images that are certified for the estimate of the time."""
PROBED: Final = 16
"""Images on which a short attack shows how many break, for the estimate of the time."""


@dataclass
class AuditRun:
    """The plan of an audit, its estimate, and what was left out of it.

    `answers` are nodes that score images without an attack: those of the audit, and those of none
    of the classes (`ood`). `corrupted` are nodes that score corrupted images, and `proofs` those
    that certify. `skipped` are the parts without attacks that were left out.
    """

    subject: Subject
    threats: Sequence[ThreatModel]
    profile: Profile
    seed: int
    max_minutes: float | None
    ood: ImageSource | None = None
    corruptions: bool = False
    certify: bool = False
    proofs: list[Proofs] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    corrupted: list[Corrupted] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left: list[Step] = field(default_factory=list)
    tests: list[TestStep] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    estimate: float = 0.0

    def execute(
        self, store: Store, worker: Engine, environment: Environment, reuse_stale: bool
    ) -> tuple[Outputs, float]:
        """Estimate, trim and compute."""
        subject = self.subject
        batch_size = subject.handshake.batch_size
        all_steps = plan(
            subject.target, self.threats, self.profile, seed=self.seed, batch_size=batch_size
        )
        self.answers = [
            Answers(subject.target.model, images, None, self.seed, batch_size)
            for images in (subject.images, self.ood)
            if images is not None
        ]
        self.corrupted = [
            Corrupted(subject.target.model, subject.images, None, family, self.seed, batch_size)
            for family in (CORRUPTIONS if self.corruptions else ())
        ]
        self.proofs = [
            Proofs(subject.target.model, subject.images, threat, Prover(self.profile.methods))
            for threat in (provable(self.threats) if self.certify else ())
        ]
        self.tests = self_tests_of(
            subject.target,
            self.threats,
            self.profile,
            subject.first,
            randomised=subject.handshake.randomised,
            seed=self.seed,
            batch_size=batch_size,
        )
        both: list[Step | TestStep] = [*all_steps, *self.tests]
        limit = math.inf if self.max_minutes is None else 60 * self.max_minutes
        known = Outputs(store, Keys(environment), tuple(step.node for step in both))
        by_node = {
            id(step.node): 0.0 if known.complete(step.node) else cost
            for step, cost in zip(both, self._costs(both), strict=True)
        }
        by_node |= self._proof_costs(Outputs(store, Keys(environment), tuple(self.proofs)))

        def total(nodes: Iterable[OnImages | SelfTest]) -> float:
            return sum(len(node.images) * by_node[id(node)] for node in nodes)

        cost = {place: total([step.node]) for place, step in enumerate(all_steps)}
        tests = [step.node for step in self.tests]
        others = {"certificates": total(self.proofs), "self-tests": total(tests)}
        self.steps, kept = trimmed(all_steps, cost, limit, others)
        self.left = [step for step in all_steps if step not in self.steps]
        self.skipped = [part for part in others if part not in kept]
        tests = tests if "self-tests" in kept else []
        proofs = self.proofs if "certificates" in kept else []
        self.estimate = total([*(step.node for step in self.steps), *tests, *proofs])
        attacks, checks = amount(len(self.steps), "attack"), amount(len(tests), "self-test")
        shown = amount(len(subject.images), "image")
        certified = f", certificates of {amount(len(proofs), 'threat')}" if proofs else ""
        message(f"{attacks} and {checks} on {shown}{certified}: {_time(self.estimate)}")
        for part in dict.fromkeys([*(step.part for step in self.left), *self.skipped]):
            unit = "minute" if self.max_minutes == 1 else "minutes"
            message(f"left out to stay within {self.max_minutes:g} {unit}: {part}")
        began = time.monotonic()
        outputs = execute(
            # The last self-test asks again after everything else.
            [
                *(step.node for step in self.steps),
                *self.answers,
                *self.corrupted,
                *proofs,
                *tests,
            ],
            store,
            worker,
            environment,
            reuse_stale=reuse_stale,
            title="audit",
            expected=lambda node: by_node.get(id(node), 0.0),
            until=began + limit,
        )
        return outputs, time.monotonic() - began

    def _costs(self, steps: Sequence[Step | TestStep]) -> list[float]:
        """Estimate the seconds of each step for one image."""
        shake = self.subject.handshake
        rates = self._probe(steps, Rates(shake.images_per_second, shake.gradients_per_second, {}))
        return [seconds_of(step, rates) for step in steps]

    def _proof_costs(self, known: Outputs) -> dict[int, float]:
        """Certify a few images at each threat: give the seconds for one image, by node."""
        subject = self.subject
        count = min(CERTIFIED, len(subject.sample_labels))
        given = subject.sample[:count], subject.sample_labels[:count]
        found = {}
        for node in self.proofs:
            assert node.threat is not None
            begin = time.perf_counter()
            if not known.complete(node):
                node.prover.proofs(subject.classifier, *given, node.threat)
            found[id(node)] = (time.perf_counter() - begin) / count
        return found

    def _probe(self, steps: Sequence[Step | TestStep], rates: Rates) -> Rates:
        """Attack a few images shortly at each threat.

        This gives the share of images that break soon, after how many gradients they break, and the
        speed of an attack's gradients: in the precision of attacks, which may be faster than that
        of the handshake.
        """
        subject = self.subject
        if not subject.gradients:
            return rates
        broken: dict[str, float] = {}
        soon: dict[str, float] = {}
        index = torch.arange(min(PROBED, len(subject.sample_labels)))
        images = subject.sample[index]
        labels = subject.sample_labels[index]
        limited = [
            step.node.threat
            for step in steps
            if isinstance(step, Step)
            and step.node.threat is not None
            and step.node.threat.eps is not None
        ]
        asked = {str(threat): threat for threat in limited}
        gradients = seconds = 0.0
        with job("estimate", len(asked)) as progress:
            for name, threat in asked.items():
                size = subject.handshake.batch_size
                begin = time.perf_counter()
                result = PGD(steps=5)(subject.classifier, images, labels, threat, batch_size=size)
                gradients += float(result.backwards.sum())
                seconds += time.perf_counter() - begin
                broken[name] = float(result.success.float().mean())
                if result.success.any():
                    soon[name] = float(result.backwards[result.success].float().mean())
                progress.advance(1, f"estimate: {name}")
        speed = gradients / seconds if gradients else rates.gradients
        return Rates(rates.forwards, speed, broken, soon)


def other_images(
    subject: Subject, spec: str | Path, options: Mapping[str, Any] | None
) -> ImageSource:
    """Read images of none of the classes, as the model of an audit takes them."""
    channels, height, width = subject.images.image_shape
    known = subject.classifier.preprocess or Preprocess()
    if known.size is None:
        known = replace(known, size=(height, width), channels=channels)
    return read_unlabelled(spec, known, root=(options or {}).get("root"))


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(2, round(seconds))} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
