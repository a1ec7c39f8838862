"""A generator network that makes adversarial images in one pass (AdvGAN)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks import Transfer, wider_kernels
from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.attacks.strongest import WIDER
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.errors import DemurError
from demur.threat import ThreatModel, as_threat

CONFIDENCE = 0.5
"""A margin above this is not raised further."""
REALISM = 0.1
"""Weight of the discriminator beside the margin."""


@dataclass(frozen=True, repr=False)
class AdvGAN(Attack):
    """A generator is trained against the classifier; it then changes each image in one pass.

    Xiao et al. 2018, "Generating adversarial examples with adversarial networks". The generator
    makes a change of each image, and is trained on known images to raise the margin of the
    attacker's goal, and to please a discriminator that tells changed images from known ones (least
    squares). Gradients go through the classifier, with wider kernels where it has any.

    Deviations: the change is scaled into the ball of the threat, in place of the paper's hinge on
    its length; the margin of the goal takes the place of the loss of Carlini & Wagner, so the
    attack knows the reject column; the networks are smaller.

    Parameters
    ----------
    known : ImageSet
        Images that the generator learns from. No attacked image should be among them.
    epochs : int, default 10
    batch_size : int, default 64
    learning_rate : float, default 1e-3
        Of Adam, for both networks.
    """

    known: ImageSet
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        **options: Any,
    ) -> AttackResult:
        """Train a generator, and score its images; see `Attack.__call__`."""
        threat = as_threat(threat)
        if threat.norm not in ("l2", "linf") or threat.eps is None or threat.mask is not None:
            raise DemurError("the generator needs an eps in L2 or Linf, and takes no mask.")
        generator = self.trained(classifier, threat, options.get("seed", 0))
        with torch.no_grad():
            sent = torch.cat(
                [changed(generator, part, threat) for part in torch.split(images, 256)]
            )
        attack = Transfer(_Given(sent))
        return attack(classifier, images, labels, threat, surrogate=classifier, **options)

    def trained(self, classifier: Classifier, threat: ThreatModel, seed: int) -> nn.Module:
        """Train the generator."""
        device = next(classifier.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(seeds.derive(seed, "generator"))
            channels = self.known.image_shape[0]
            generator = generator_network(channels).to(device)
            judge = discriminator_network(channels).to(device)
            both = [
                torch.optim.Adam(one.parameters(), self.learning_rate, (0.5, 0.999))
                for one in (generator, judge)
            ]
            with wider_kernels(classifier, WIDER[0]):
                for images, labels in self._batches(device):
                    self._step(classifier, generator, judge, both, images, labels, threat)
        return generator.eval()

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(self.known)), self.batch_size):
                yield self.known.to_float(rows).to(device), self.known.labels[rows].to(device)

    @staticmethod
    def _step(
        classifier: Classifier,
        generator: nn.Module,
        judge: nn.Module,
        optimizers: list[torch.optim.Adam],
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
    ) -> None:
        """Train both networks on a batch."""
        sent = changed(generator, images, threat)
        of_generator, of_judge = optimizers
        real, made = judge(images), judge(sent.detach())
        of_judge.zero_grad()
        torch.autograd.backward((real - 1).square().mean() + made.square().mean())
        of_judge.step()
        scores = classifier(sent)
        margin = threat.goal.loss(scores, labels, classifier.num_classes)
        loss = REALISM * (judge(sent) - 1).square().mean() - margin.clamp(max=CONFIDENCE).mean()
        parameters = list(generator.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        of_generator.step()

    def __repr__(self) -> str:
        """Leave the images out."""
        return f"AdvGAN(epochs={self.epochs})"


@dataclass(frozen=True, repr=False)
class _Given(Attack):
    """Give images that exist."""

    sent: Tensor

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        **options: Any,
    ) -> AttackResult:
        """Give them, unchecked."""
        none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        unknown = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        success = torch.zeros_like(none, dtype=torch.bool)
        return AttackResult(images, success, self.sent, unknown, none, none, none)


def changed(generator: nn.Module, images: Tensor, threat: ThreatModel) -> Tensor:
    """Change images (N, C, H, W) within the threat; differentiable."""
    change = generator(images - 0.5)
    assert threat.eps is not None
    if threat.norm == "linf":
        change = threat.eps * change.tanh()
    else:
        length = change.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
        change = change * (threat.eps / length).clamp(max=1)
    # A little inside: rounding to float32 must not leave the ball.
    return torch.as_tensor((images + (1 - 1e-6) * change).clamp(0, 1))


def generator_network(channels: int, width: int = 16) -> nn.Sequential:
    """Images (N, C, H, W), with sides divisible by 4, to changes of that shape."""

    def block(before: int, after: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(before, after, 3, stride, padding=1)
        return [layer, nn.GroupNorm(1, after), nn.ReLU()]

    def larger(before: int, after: int) -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), *block(before, after)]

    return nn.Sequential(
        *block(channels, width),
        *block(width, 2 * width, 2),
        *block(2 * width, 4 * width, 2),
        *block(4 * width, 4 * width),
        *larger(4 * width, 2 * width),
        *larger(2 * width, width),
        nn.Conv2d(width, channels, 3, padding=1),
    )


def discriminator_network(channels: int, width: int = 16) -> nn.Sequential:
    """Images to a number each: 1 for known images, 0 for changed ones."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 4, 2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 1))
