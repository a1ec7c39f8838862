"""Strength and speed of the attacks and of other libraries' attacks at the same budget.

    pip install -e '.[peers]'
    pip install 'setuptools<81'  # adv-lib needs visdom, and visdom needs an older setuptools
    pip install --no-build-isolation adv-lib
    DEMUR_PEERS_PATH=DIR python benchmarks/attacks.py [--data-root DIR] [--images 256]
        [--steps 100] [--only pgd,first,smallest,carlini,precision] [--device cpu]

All libraries attack in one process and one run: the same network (the rejection paper's MNIST
network, trained here for 4 epochs or read from --network), the same test images, and the same
number of gradients. demur decides the outcomes of every library, in float32, and measures the real
sizes of the changes. The tables are in Markdown. A table names a library that is not installed.

The ensemble is compared with AutoAttack (Croce & Hein 2020), version "standard", in its authors'
code: the environment variable DEMUR_PEERS_PATH names a folder that contains their repository
auto-attack. torchattacks' AutoAttack is left out: it runs 10 steps of APGD, the standard 100.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from demur import Classifier, Outcome, attacks, data, outcomes
from demur.attacks import APGD, DDN, FMN, PGD, CarliniWagnerL2, SigmaZero, Strongest
from demur.attacks.engine import GradientPrecision
from demur.hardware import has_fast_bfloat16, keep_buffers, tuned
from demur.networks import dnr_cnn
from demur.training import fit

Theirs = Callable[[Classifier, Tensor, Tensor], Tensor]
"""The attack of another library: (classifier, images, labels) -> attacked images."""

PEERS_PATH = "DEMUR_PEERS_PATH"


def network(root: str | None, path: Path | None, device: str) -> tuple[Classifier, data.ImageSet]:
    """Give the trained network, and the test images: of MNIST, or of the embedded digits."""
    present = {status.name for status in data.list_datasets(root) if status.where}
    name = "mnist" if "mnist" in present else "digits"
    train = data.load(name, "train", root)
    test = data.load(name, "test", root)
    module = dnr_cnn()
    if path and path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        epochs = 4 if name == "mnist" else 60
        fit(
            module,
            train.images,
            train.labels,
            epochs=epochs,
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            device=device,
        )
        if path:
            torch.save(module.state_dict(), path)
    module.to(memory_format=torch.contiguous_format)  # as the networks of most users
    return Classifier(module.to(device).eval(), 10), test


class Counted(nn.Module):
    """A classifier that counts the images of its forward passes."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores, and count."""
        self.images += len(images)
        scores: Tensor = self.classifier(images)
        return scores


class Table:
    """A table that prints each line as soon as it is measured."""

    without: tuple[str, ...] = ()

    def __init__(
        self, title: str, classifier: Classifier, images: Tensor, labels: Tensor, norm: str
    ) -> None:
        print(f"\n### {title}\n")
        print("| attack | success % | median distance | mean distance | forwards | seconds |")
        print("|---|---|---|---|---|---|", flush=True)
        self.classifier = classifier
        self.images = images
        self.labels = labels
        self.norm = norm

    def line(self, name: str, attacked: Tensor, seconds: float, forwards: float) -> None:
        """Decide attacked images, and print."""
        found = outcomes(self.classifier, attacked.float().clamp(0, 1), self.labels)
        wrong = found == Outcome.WRONG
        lengths = attacks.sizes(self.images, attacked)[self.norm][wrong]
        middle, mean = (
            f"{float(how(lengths)):.4f}" if len(lengths) else ""
            for how in (torch.median, torch.mean)
        )
        success = f"{100 * float(wrong.float().mean()):.1f}"
        print(
            f"| {name} | {success} | {middle} | {mean} | {forwards:,.0f} | {seconds:.1f} |",
            flush=True,
        )

    def ours(
        self,
        name: str,
        attack: attacks.Attack,
        threat: str,
        batch: int,
        precision: GradientPrecision = "auto",
    ) -> None:
        """Run one of demur's attacks."""
        start = _clock(self.images)
        result = attack(
            self.classifier,
            self.images,
            self.labels,
            threat,
            batch_size=batch,
            precision=precision,
        )
        seconds = _clock(self.images) - start
        self.line(f"**{name}**", result.images, seconds, float(result.forwards.double().mean()))

    def ours_in_each_precision(self, attack: attacks.Attack, threat: str, batch: int) -> None:
        """Run one of demur's attacks with gradients in each precision that the hardware has."""
        for precision in _precisions(self.images):
            self.ours(f"demur, {precision}", attack, threat, batch, precision)

    def missing(self, name: str, reason: str) -> None:
        """Print the line of an attack that does not run."""
        print(f"| {name} | {reason} | | | | |", flush=True)

    def theirs(self, name: str, package: str, attack: Theirs) -> None:
        """Run the attack of another library."""
        if package in self.without:
            self.missing(name, "left out")
            return
        if find_spec(package) is None:
            self.missing(name, "not installed")
            return
        self.classifier.eval()  # another library may have left it in training mode
        counted = Counted(self.classifier)
        start = _clock(self.images)
        attacked = attack(Classifier(counted, 10).eval(), self.images, self.labels).detach()
        seconds = _clock(self.images) - start
        self.line(name, attacked, seconds, counted.images / len(self.images))


def in_batches(attack: Theirs, batch: int) -> Theirs:
    """Give an attack of another library as many images at once as demur's attacks."""
    return lambda classifier, images, labels: torch.cat(
        [attack(classifier, *pair) for pair in pairs(images, labels, batch)]
    )


def pairs(images: Tensor, labels: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Split images and labels into batches."""
    return list(zip(torch.split(images, batch), torch.split(labels, batch), strict=True))


def foolbox_attack(make: Callable[[], object], epsilon: float | None = None) -> Theirs:
    """Wrap an attack of foolbox."""

    def attack(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        import foolbox

        model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=images.device)
        _, clipped, _ = make()(model, images, labels, epsilons=epsilon)  # type: ignore[operator]
        return torch.as_tensor(clipped)

    return attack


def art_attack(make: Callable[[object], object]) -> Theirs:
    """Wrap an attack of the Adversarial Robustness Toolbox."""

    def attack(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from art.estimators.classification import PyTorchClassifier

        kind = "gpu" if images.device.type == "cuda" else "cpu"
        estimator = PyTorchClassifier(
            classifier,
            nn.CrossEntropyLoss(),
            images.shape[1:],
            10,
            clip_values=(0, 1),
            device_type=kind,
        )
        found = make(estimator).generate(images.cpu().numpy(), labels.cpu().numpy())  # type: ignore[attr-defined]
        return torch.from_numpy(found).to(images.device)

    return attack


def carlini(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """Measure Carlini & Wagner's L2 attack, nine search steps."""
    table = Table(
        f"Carlini & Wagner L2, 9 search steps of {steps} steps", classifier, images, labels, "l2"
    )
    table.ours_in_each_precision(CarliniWagnerL2(steps=steps), "l2", batch)

    def by_foolbox() -> object:
        from foolbox.attacks import L2CarliniWagnerAttack

        return L2CarliniWagnerAttack(steps=steps)

    def by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from adv_lib.attacks import carlini_wagner_l2

        return torch.as_tensor(
            carlini_wagner_l2(
                classifier, images, labels, max_iterations=steps, binary_search_steps=9
            )
        )

    def by_art(estimator: object) -> object:
        from art.attacks.evasion import CarliniL2Method

        return CarliniL2Method(
            estimator, binary_search_steps=9, max_iter=steps, batch_size=batch, verbose=False
        )

    table.theirs("adv-lib", "adv_lib", in_batches(by_adv_lib, batch))
    table.theirs("foolbox", "foolbox", in_batches(foolbox_attack(by_foolbox), batch))
    table.theirs("ART", "art", art_attack(by_art))


def smallest(
    classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int
) -> None:
    """Measure DDN and FMN at the same number of steps."""
    table = Table(f"DDN, L2, {steps} steps", classifier, images, labels, "l2")
    table.ours_in_each_precision(DDN(steps=steps), "l2", batch)

    def ddn_by_foolbox() -> object:
        from foolbox.attacks import DDNAttack

        return DDNAttack(steps=steps)

    def ddn_by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from adv_lib.attacks import ddn

        return torch.as_tensor(ddn(classifier, images, labels, steps=steps, levels=None))

    table.theirs("adv-lib", "adv_lib", in_batches(ddn_by_adv_lib, batch))
    table.theirs("foolbox", "foolbox", in_batches(foolbox_attack(ddn_by_foolbox), batch))
    for norm, order in (("l2", 2.0), ("linf", float("inf")), ("l1", 1.0), ("l0", 0.0)):
        table = Table(f"FMN, {norm}, {steps} steps", classifier, images, labels, norm)
        table.ours_in_each_precision(FMN(steps=steps), norm, batch)
        if norm == "l0":
            table.ours("demur, SigmaZero", SigmaZero(steps=steps), norm, batch)

        def fmn_by_adv_lib(
            classifier: Classifier, images: Tensor, labels: Tensor, order: float = order
        ) -> Tensor:
            from adv_lib.attacks import fmn

            return torch.as_tensor(fmn(classifier, images, labels, norm=order, steps=steps))

        table.theirs("adv-lib", "adv_lib", in_batches(fmn_by_adv_lib, batch))


def pgd(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """Measure PGD and the bare passes, for a fixed number of steps.

    The eps is so small that no image is solved before the end.
    """
    eps = 1e-4
    kept = outcomes(classifier, images, labels) == Outcome.CORRECT
    images, labels = images[kept], labels[kept]
    table = Table(f"PGD, {steps} steps, no success on the way", classifier, images, labels, "linf")

    def bare(half: bool) -> None:
        start = _clock(images)
        with tuned(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            for part, target in pairs(images, labels, batch):
                given = part.contiguous(memory_format=torch.channels_last) if half else part
                for _ in range(steps):
                    given = given.detach().requires_grad_()
                    torch.autograd.grad(
                        nn.functional.cross_entropy(
                            classifier(given).float(), target, reduction="sum"
                        ),
                        given,
                    )
        table.line(
            f"the bare passes, {'bfloat16' if half else 'float32'}",
            images,
            _clock(images) - start,
            steps,
        )

    for parameter in classifier.parameters():
        parameter.requires_grad_(False)
    for precision in _precisions(images):
        bare(precision == "bfloat16")
        ours = PGD(steps=steps, step_size=eps / 10)
        table.ours(f"demur, {precision}", ours, f"linf:{eps}", batch, precision)

    def by_foolbox() -> object:
        from foolbox.attacks import LinfPGD

        return LinfPGD(steps=steps, abs_stepsize=eps / 10, random_start=False)

    def by_torchattacks(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        import torchattacks

        attack = torchattacks.PGD(
            classifier, eps=eps, alpha=eps / 10, steps=steps, random_start=False
        )
        return torch.as_tensor(attack(images, labels))

    def by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from adv_lib.attacks import pgd_linf

        return torch.as_tensor(
            pgd_linf(classifier, images, labels, ε=eps, steps=steps, random_init=False)
        )

    table.theirs("foolbox", "foolbox", in_batches(foolbox_attack(by_foolbox, eps), batch))
    table.theirs("torchattacks", "torchattacks", in_batches(by_torchattacks, batch))
    table.theirs("adv-lib", "adv_lib", in_batches(by_adv_lib, batch))


def first(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """Measure an evaluation of an undefended model: each attack stops at the first success."""
    eps = 0.3
    table = Table(f"Evaluation at Linf {eps:g}", classifier, images, labels, "linf")
    table.ours("demur, Strongest", Strongest(), f"linf:{eps}", batch)

    def by_autoattack(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        attack = import_module("autoattack").AutoAttack(
            classifier,
            norm="Linf",
            eps=eps,
            seed=0,
            version="standard",
            verbose=False,
            device=images.device,
        )
        return torch.as_tensor(attack.run_standard_evaluation(images, labels, bs=batch))

    def by_foolbox() -> object:
        from foolbox.attacks import LinfPGD

        return LinfPGD(steps=steps)

    if add_autoattack():
        table.theirs('AutoAttack, "standard"', "autoattack", by_autoattack)
    else:
        table.missing('AutoAttack, "standard"', f"skipped: {PEERS_PATH} is not set")
    table.theirs("foolbox, PGD", "foolbox", in_batches(foolbox_attack(by_foolbox, eps), batch))


def add_autoattack() -> bool:
    """Make AutoAttack importable, if the environment names the folder of its repository."""
    folder = os.environ.get(PEERS_PATH)
    if not folder:
        return False
    path = str(Path(folder) / "auto-attack")
    if path not in sys.path:
        sys.path.insert(0, path)
    return True


def precision(
    classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int
) -> None:
    """Measure whether bfloat16 gradients find what float32 gradients find on robust images."""
    table = Table(
        f"APGD, Linf 0.1, {steps} steps, where some images are robust",
        classifier,
        images,
        labels,
        "linf",
    )
    table.ours_in_each_precision(APGD(steps=steps), "linf:0.1", batch)
    table = Table(
        "The ensemble, Linf 0.1, 40 steps, 3 targets, 100 queries",
        classifier,
        images,
        labels,
        "linf",
    )
    whole = Strongest(steps=40, n_queries=100, n_targets=3)
    table.ours_in_each_precision(whole, "linf:0.1", batch)


def _clock(images: Tensor) -> float:
    """Give the seconds that the processor worked, or, on a GPU, the time after all its work.

    Seconds of the processor do not depend on other programs.
    """
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
        return time.perf_counter()
    return time.process_time()


def _precisions(images: Tensor) -> list[GradientPrecision]:
    return ["bfloat16", "float32"] if has_fast_bfloat16(images.device) else ["float32"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", type=Path, help="file to keep the trained network in")
    parser.add_argument("--only", default="pgd,first,smallest,carlini")
    parser.add_argument(
        "--without", default="", help="packages to leave out: adv_lib,foolbox,torchattacks,art"
    )
    given = parser.parse_args()
    keep_buffers()
    Table.without = tuple(given.without.split(","))
    classifier, test = network(given.data_root, given.network, given.device)
    images = test.to_float()[: given.images].to(given.device)
    labels = test.labels[: given.images].to(given.device)
    clean = 100 * float((outcomes(classifier, images, labels) == Outcome.CORRECT).float().mean())
    print(
        f"{test.name}, {len(images)} images, {clean:.1f} % correct when clean, "
        f"batches of {given.batch}, {torch.get_num_threads()} threads"
    )
    parts = {
        "pgd": pgd,
        "first": first,
        "smallest": smallest,
        "carlini": carlini,
        "precision": precision,
    }
    for name in given.only.split(","):
        parts[name](classifier, images, labels, given.steps, given.batch)


if __name__ == "__main__":
    main()
