"""The work of `demur harden`: steps that are stored one by one, the threshold, the bundle."""

import copy
import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from demur.classifier import Classifier, Outcome, Preprocess, Provenance, outcomes_of
from demur.commands.harden_data import Material, by_chunks
from demur.commands.harden_steps import Given, Step
from demur.commands.harden_threshold import ThresholdRule, set_threshold
from demur.commands.run import STORE
from demur.defenses.certified_consistency import CertifiedConsistency
from demur.defenses.descriptions import leaf_of
from demur.defenses.saving import CONFIG, save_classifier, state_of
from demur.errors import DemurError
from demur.evaluation.code import code_fingerprint
from demur.evaluation.folder import claimed
from demur.evaluation.keys import Environment, versions
from demur.evaluation.store import Computed, Store
from demur.files import digest
from demur.loading.bundles import load_bundle, restored
from demur.metrics import Rates
from demur.progress import job
from demur.untrusted import read_json
from demur.writing import check_writable, writing

FINISHED = "The bundle was finished already."
TINY_DELTA = 1 / 510
UNSEEN = (
    "The figures and the threshold hold for images that the network was not trained on. If it was "
    "trained on these images, give others: --split test, or another folder."
)


@dataclass(frozen=True, eq=False)
class HardenRun:
    """One hardening."""

    material: Material
    steps: tuple[Step, ...]
    rule: ThresholdRule
    seed: int
    device: str
    data: str

    def request(self) -> dict[str, Any]:
        """Give what was asked for, as JSON."""
        return {
            "command": "harden",
            "with": [one.name for one in self.steps],
            "settings": {one.name: dataclasses.asdict(one) for one in self.steps},
            "threshold": dataclasses.asdict(self.rule),
            "seed": self.seed,
            "background": self.material.background_fingerprint,
        }

    def provenance(self) -> Provenance:
        """Give what the model is made from."""
        return Provenance(
            base=self.material.base.source,
            base_fingerprint=self.material.base.fingerprint,
            data=self.data,
            data_fingerprint=self.material.fingerprint,
            code=self.code(),
            request=self.request(),
            images=self.material.seen,
        )

    def code(self) -> str:
        """Digest the code that makes the model."""
        return code_fingerprint([*map(type, self.steps), set_threshold, restored])

    def written(self, out: Path, store: Path | None) -> tuple[Classifier, tuple[str, ...]]:
        """Make the model, and move the whole bundle to its place in one step."""
        work = out.with_name(f".{out.name}.harden")
        if done := self._finished(out):
            shutil.rmtree(work, ignore_errors=True)
            return done, (FINISHED,)
        # Stored steps are found by keys of their own: a corrected request uses those that fit.
        with claimed(work, {"command": "harden", "out": out.name}):
            kept = Store(store or Path(os.environ.get(STORE) or work / "store"))
            check_writable(kept.folder)
            classifier, notes = self.made(kept)
            shutil.rmtree(work / "bundle", ignore_errors=True)
            save_classifier(classifier, work / "bundle")
            with writing(out):
                (work / "bundle").replace(out)
        shutil.rmtree(work, ignore_errors=True)
        # What the folder holds: memory of another alignment can change the last bits of scores.
        return load_bundle(out, self.network_of(out)), notes

    def _finished(self, out: Path) -> Classifier | None:
        """Give the model of an earlier call of the same request, or refuse another folder."""
        with writing(out):
            if not out.exists() or (out.is_dir() and not any(out.iterdir())):
                return None
        if not (out / CONFIG).is_file():
            raise DemurError(f"{out} is not empty and holds no bundle. Choose another --out.")
        there = load_bundle(out, self.network_of(out))
        if there.provenance != self.provenance():
            raise DemurError(
                f"{out} holds another bundle. Choose another --out, or delete that folder."
            )
        return there

    def network_of(self, out: Path) -> nn.Module | None:
        """Give the network of the base, if the bundle does not describe it."""
        return self._given_network(read_json(out / CONFIG))

    def _given_network(self, config: object) -> nn.Module | None:
        leaf = leaf_of(self.material.base.classifier)
        return leaf if _lacks_network(config) else None

    def made(self, store: Store) -> tuple[Classifier, tuple[str, ...]]:
        """Make the steps one after the other, each once, and set the threshold."""
        material = self.material
        classifier = material.base.classifier
        environment = dataclasses.astuple(Environment.here(self.device))
        key = digest(
            material.base.fingerprint,
            material.fingerprint,
            material.learn.fingerprint,
            material.background_fingerprint,
            str((environment, versions(), self.seed)),
        )
        with job("hardening", len(self.steps) + 1) as progress:
            for step in self.steps:
                key = digest(key, repr(step), code_fingerprint([type(step), restored]))
                before = classifier

                def compute(checkpoint: Path, step: Step = step, base: Any = before) -> Computed:
                    given = Given(
                        copy.deepcopy(base).to(self.device),
                        material.learn,
                        material.held_out,
                        material.background,
                        self.seed,
                        self.device,
                        checkpoint,
                    )
                    return state_of(step.make(given).cpu().eval())

                found = store.cell({"harden": step.name, "key": key}, compute)
                network = self._given_network(found.values)
                classifier = restored(found.values, found.tensors, network)
                progress.advance(1, step.name)
            notes = self._threshold(classifier)
            progress.advance(1, "threshold")
        base = material.base.classifier
        channels, height, width = material.learn.image_shape
        known = base.preprocess or Preprocess(channels=channels)
        classifier.preprocess = known if known.size else replace(known, size=(height, width))
        classifier.class_names = base.class_names
        classifier.provenance = self.provenance()
        return classifier, (*material.notes, *notes)

    def _threshold(self, classifier: Classifier) -> list[str]:
        held_out = self.material.held_out
        classifier.scores(held_out.to_float(torch.arange(1)))
        if classifier.rejects:
            said = set_threshold(classifier, held_out.images, held_out.labels, self.rule)
            unseen = [] if self.material.base.classifier.provenance else [UNSEEN]
            return [said, *unseen, *_tiny_delta(classifier)]
        return ["The model never rejects, so there is no threshold."]

    def rates(self, classifier: Classifier) -> Rates:
        """Count the three outcomes of the images of the report part."""
        report = self.material.report
        predictions = by_chunks(report, lambda images: classifier.predict(images, 64))
        found = outcomes_of(predictions, report.labels)
        return Rates(*(int((found == kind).sum()) for kind in Outcome))


def _tiny_delta(classifier: Classifier) -> list[str]:
    """Warn of a delta that is smaller than any change of an 8-bit image."""
    if not isinstance(classifier, CertifiedConsistency) or classifier.threshold >= TINY_DELTA:
        return []
    return [
        f"Warning: delta is {classifier.threshold:.2g}, less than half a step of an 8-bit pixel: "
        "the check proves almost nothing. The network was not trained for it "
        "(`training.certified_fit`)."
    ]


def _lacks_network(config: object) -> bool:
    """Say whether a description needs a network of the user's own."""
    if not isinstance(config, Mapping):
        return False
    parts = [config[one] for one in ("network", "first", "second") if one in config]
    return any(part is None or set(part) == {"head"} or _lacks_network(part) for part in parts)
