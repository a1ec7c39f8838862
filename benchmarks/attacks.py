"""How strong and how fast the attacks are, beside other libraries' at the same budget, on the rejection paper's MNIST network.

    pip install -e '.[peers]'
    pip install 'setuptools<81' && pip install --no-build-isolation adv-lib  # whose dependency visdom needs an older setuptools
    python benchmarks/attacks.py [--data-root DIR] [--images 256] [--steps 100] [--only pgd,first,smallest,carlini,precision] [--device cpu]

All in one process and one run: same network (trained here for 4 epochs, or read from --network), same test images, same number
of gradients. Whatever a library returns is judged by demur, in float32, at the distance that it really has. Prints tables in
Markdown. A library that is not installed is left out, and said to be.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from demur import Classifier, attacks, data, outcomes
from demur.attacks import AttackResult
from demur.attacks.driver import GradientPrecision
from demur.classifier import Outcome
from demur.hardware import has_fast_bfloat16, tuned
from demur.networks import fit, rejection_network

Theirs = Callable[[Classifier, Tensor, Tensor], Tensor]
"""A peer's attack: (classifier, images, labels) -> attacked images."""


def network(root: str | None, path: Path | None, device: str) -> tuple[Classifier, data.ImageSet]:
    """The trained network, and the test images: of MNIST, or of the embedded digits."""
    name = "mnist" if any(status.name == "mnist" and status.where for status in data.describe(root)) else "digits"
    train, test = data.load(name, "train", root), data.load(name, "test", root)
    module = rejection_network()
    if path and path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        epochs = 4 if name == "mnist" else 60
        fit(module, train.images, train.labels, epochs=epochs, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), device=device)
        if path:
            torch.save(module.state_dict(), path)
    module.to(memory_format=torch.contiguous_format)  # as other people's networks are
    return Classifier(module.to(device).eval(), 10), test


class Counted(nn.Module):
    """Counts the images that pass forwards, whoever asks."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier, self.images = classifier, 0

    def forward(self, images: Tensor) -> Tensor:
        """Scores, counted."""
        self.images += len(images)
        scores: Tensor = self.classifier(images)
        return scores


class Table:
    """Prints a line as soon as it is measured."""

    without: tuple[str, ...] = ()

    def __init__(self, title: str, classifier: Classifier, images: Tensor, labels: Tensor, norm: str) -> None:
        print(
            f"\n### {title}\n\n| attack | success % | median distance | mean distance | forwards | seconds |\n|---|---|---|---|---|---|",
            flush=True,
        )
        self.classifier, self.images, self.labels, self.norm = classifier, images, labels, norm

    def line(self, name: str, attacked: Tensor, seconds: float, forwards: float) -> None:
        """Judge attacked images, and print."""
        wrong = outcomes(self.classifier, attacked.float().clamp(0, 1), self.labels) == Outcome.WRONG
        lengths = attacks.sizes(self.images, attacked)[self.norm][wrong]
        middle, mean = (f"{float(how(lengths)):.4f}" if len(lengths) else "" for how in (torch.median, torch.mean))
        print(f"| {name} | {100 * float(wrong.float().mean()):.1f} | {middle} | {mean} | {forwards:,.0f} | {seconds:.1f} |", flush=True)

    def ours(self, name: str, attack: Callable[..., AttackResult]) -> None:
        """Run one of demur's attacks."""
        start = _clock(self.images)
        result = attack(self.classifier, self.images, self.labels)
        seconds = _clock(self.images) - start
        self.line(f"**{name}**", result.images, seconds, float(result.forwards.double().mean()))

    def theirs(self, name: str, package: str, attack: Theirs) -> None:
        """Run a peer's attack."""
        if find_spec(package) is None or package in self.without:
            print(f"| {name} | {'left out' if package in self.without else 'not installed'} | | | | |", flush=True)
            return
        self.classifier.eval()  # a peer may have left it in training mode
        counted = Counted(self.classifier)
        start = _clock(self.images)
        attacked = attack(Classifier(counted, 10).eval(), self.images, self.labels).detach()
        seconds = _clock(self.images) - start
        self.line(name, attacked, seconds, counted.images / len(self.images))


def in_batches(attack: Theirs, batch: int) -> Theirs:
    """Give a peer's attack as many images at once as demur's have."""
    return lambda classifier, images, labels: torch.cat([attack(classifier, *pair) for pair in pairs(images, labels, batch)])


def pairs(images: Tensor, labels: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, batch by batch."""
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
        estimator = PyTorchClassifier(classifier, nn.CrossEntropyLoss(), images.shape[1:], 10, clip_values=(0, 1), device_type=kind)
        found = make(estimator).generate(images.cpu().numpy(), labels.cpu().numpy())  # type: ignore[attr-defined]
        return torch.from_numpy(found).to(images.device)

    return attack


def carlini(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """C&W L2: nine search steps."""
    table = Table(f"Carlini & Wagner L2, 9 search steps of {steps} steps", classifier, images, labels, "l2")
    for precision in _precisions(images):
        table.ours(f"demur, {precision}", partial(attacks.carlini_l2, steps=steps, precision=precision, batch_size=batch))

    def by_foolbox() -> object:
        from foolbox.attacks import L2CarliniWagnerAttack

        return L2CarliniWagnerAttack(steps=steps)

    def by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from adv_lib.attacks import carlini_wagner_l2

        return torch.as_tensor(carlini_wagner_l2(classifier, images, labels, max_iterations=steps, binary_search_steps=9))

    def by_art(estimator: object) -> object:
        from art.attacks.evasion import CarliniL2Method

        return CarliniL2Method(estimator, binary_search_steps=9, max_iter=steps, batch_size=batch, verbose=False)

    table.theirs("adv-lib", "adv_lib", in_batches(by_adv_lib, batch))
    table.theirs("foolbox", "foolbox", in_batches(foolbox_attack(by_foolbox), batch))
    table.theirs("ART", "art", art_attack(by_art))


def smallest(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """DDN and FMN at the same steps."""
    table = Table(f"DDN, L2, {steps} steps", classifier, images, labels, "l2")
    for precision in _precisions(images):
        table.ours(f"demur, {precision}", partial(attacks.ddn, steps=steps, precision=precision, batch_size=batch))

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
        for precision in _precisions(images):
            table.ours(f"demur, {precision}", partial(attacks.fmn, norm=norm, steps=steps, precision=precision, batch_size=batch))
        if norm == "l0":
            table.ours("demur, sigma_zero", partial(attacks.sigma_zero, steps=steps, batch_size=batch))

        def fmn_by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor, order: float = order) -> Tensor:
            from adv_lib.attacks import fmn

            return torch.as_tensor(fmn(classifier, images, labels, norm=order, steps=steps))

        table.theirs("adv-lib", "adv_lib", in_batches(fmn_by_adv_lib, batch))


def pgd(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """PGD for a fixed number of steps, with an eps so small that no image leaves before the end, beside the bare passes."""
    eps = 1e-4
    kept = outcomes(classifier, images, labels) == Outcome.CORRECT
    images, labels = images[kept], labels[kept]
    table = Table(f"PGD, {steps} steps, nothing found on the way", classifier, images, labels, "linf")

    def bare(half: bool) -> None:
        start = _clock(images)
        with tuned(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            for part, target in pairs(images, labels, batch):
                given = part.contiguous(memory_format=torch.channels_last) if half else part
                for _ in range(steps):
                    given = given.detach().requires_grad_()
                    torch.autograd.grad(nn.functional.cross_entropy(classifier(given).float(), target, reduction="sum"), given)
        table.line(f"the bare passes, {'bfloat16' if half else 'float32'}", images, _clock(images) - start, steps)

    for parameter in classifier.parameters():
        parameter.requires_grad_(False)
    for precision in _precisions(images):
        bare(precision == "bfloat16")
        ours = partial(attacks.pgd, eps=eps, steps=steps, step_size=eps / 10, precision=precision, batch_size=batch)
        table.ours(f"demur, {precision}", ours)

    def by_foolbox() -> object:
        from foolbox.attacks import LinfPGD

        return LinfPGD(steps=steps, abs_stepsize=eps / 10, random_start=False)

    def by_torchattacks(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from torchattacks import PGD

        return torch.as_tensor(PGD(classifier, eps=eps, alpha=eps / 10, steps=steps, random_start=False)(images, labels))

    def by_adv_lib(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from adv_lib.attacks import pgd_linf

        return torch.as_tensor(pgd_linf(classifier, images, labels, ε=eps, steps=steps, random_init=False))

    table.theirs("foolbox", "foolbox", in_batches(foolbox_attack(by_foolbox, eps), batch))
    table.theirs("torchattacks", "torchattacks", in_batches(by_torchattacks, batch))
    table.theirs("adv-lib", "adv_lib", in_batches(by_adv_lib, batch))


def first(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """To the first success, on an undefended model: an evaluation as one would run it."""
    eps = 0.3
    table = Table(f"Evaluation at Linf {eps:g}", classifier, images, labels, "linf")
    table.ours("demur, strongest", partial(attacks.strongest, eps=eps, batch_size=batch))

    def by_torchattacks(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        from torchattacks import AutoAttack

        return torch.as_tensor(AutoAttack(classifier, eps=eps, n_classes=10)(images, labels))

    def by_foolbox() -> object:
        from foolbox.attacks import LinfPGD

        return LinfPGD(steps=steps)

    table.theirs("torchattacks, AutoAttack", "torchattacks", by_torchattacks)
    table.theirs("foolbox, PGD", "foolbox", in_batches(foolbox_attack(by_foolbox, eps), batch))


def precision(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """Whether gradients in bfloat16 find what float32's do, where some images withstand."""
    table = Table(f"APGD, Linf 0.1, {steps} steps, which some images withstand", classifier, images, labels, "linf")
    for kind in _precisions(images):
        table.ours(f"demur, {kind}", partial(attacks.apgd, eps=0.1, steps=steps, precision=kind, batch_size=batch))
    table = Table("The ensemble, Linf 0.1, 40 steps, 3 targets, 100 queries", classifier, images, labels, "linf")
    for kind in _precisions(images):
        whole = partial(attacks.strongest, eps=0.1, steps=40, targets=3, queries=100, precision=kind)
        table.ours(f"demur, {kind}", partial(whole, batch_size=batch))


def _clock(images: Tensor) -> float:
    """Seconds, when all that was asked for is done."""
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def _precisions(images: Tensor) -> list[GradientPrecision]:
    return ["bfloat16", "float32"] if has_fast_bfloat16(images.device) else ["float32"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", type=Path, help="file to keep the trained network in")
    parser.add_argument("--only", default="pgd,first,smallest,carlini")
    parser.add_argument("--without", default="", help="packages to leave out: adv_lib,foolbox,torchattacks,art")
    given = parser.parse_args()
    Table.without = tuple(given.without.split(","))
    classifier, test = network(given.data_root, given.network, given.device)
    images, labels = test.floats()[: given.images].to(given.device), test.labels[: given.images].to(given.device)
    clean = 100 * float((outcomes(classifier, images, labels) == Outcome.CORRECT).float().mean())
    print(
        f"{test.name}, {len(images)} images, {clean:.1f} % correct when clean, batches of {given.batch}, {torch.get_num_threads()} threads"
    )
    parts = {"pgd": pgd, "first": first, "smallest": smallest, "carlini": carlini, "precision": precision}
    for name in given.only.split(","):
        parts[name](classifier, images, labels, given.steps, given.batch)


if __name__ == "__main__":
    main()
