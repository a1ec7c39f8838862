"""Three networks for MNIST to measure an audit on: plain, adversarially trained, certified-trained.

`benchmarks/audit.py` trains each of them once and keeps its weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from demur import Classifier, data, seeds
from demur.attacks import PGD
from demur.defenses import AdversarialTraining
from demur.hardware import tuned
from demur.networks import strided_cnn
from demur.training import fit

CERTIFIED_EPS = 0.2
CERTIFIED_EPOCHS = 12
ADVERSARIAL_EPS = 0.3
WARM_UP = ((0.1, 1), (0.2, 1))
"""(eps, epochs) before the training at `ADVERSARIAL_EPS`: from random weights, training at .3 may
end at chance.
"""
BATCH = 100


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Raise the learning rate to that of the optimizer, and let it fall to 0."""
    rate = optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)


def plain(train: data.ImageSet) -> nn.Module:
    """Train without an attack."""
    network = strided_cnn()
    adam = partial(torch.optim.Adam, lr=2e-3)
    fit(network, train.images, train.labels, epochs=4, optimizer=adam, scheduler=one_cycle)
    return network


def adversarial(train: data.ImageSet) -> nn.Module:
    """Train on images that PGD attacks within eps (Madry et al. 2018), after a warm-up of eps."""
    network = strided_cnn()
    attack = PGD(steps=7, random_start=True)
    for eps, epochs in (*WARM_UP, (ADVERSARIAL_EPS, 8)):
        AdversarialTraining(network, 10, attack, f"linf:{eps}").fit(
            train.images,
            train.labels,
            epochs=epochs,
            batch_size=BATCH,
            optimizer=partial(torch.optim.Adam, lr=2e-3),
            scheduler=one_cycle,
        )
    return network


def certified(train: data.ImageSet) -> nn.Module:
    """Train on interval bounds (Gowal et al. 2018): the weight of the cross-entropy of the clean
    scores falls from 1 to 1/2, and eps grows from 0 to its value in the middle of the training.
    """
    network = strided_cnn()
    images = train.to_float()
    steps = len(images) // BATCH
    total = CERTIFIED_EPOCHS * steps
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total * 7 // 10, total * 9 // 10])
    with tuned():
        for step in range(total):
            epoch, place = divmod(step, steps)
            if place == 0:
                order = torch.randperm(len(images), generator=seeds.generator(0, "order", epoch))
            rows = order[place * BATCH : (place + 1) * BATCH]
            grown = min(1.0, max(0.0, (step / total - 1 / 12) / 0.5))
            optimizer.zero_grad()
            loss = interval_loss(network, images[rows], train.labels[rows], grown)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network


def interval_loss(network: nn.Module, images: Tensor, labels: Tensor, grown: float) -> Tensor:
    """Compute the loss of a batch; `grown` in [0, 1] is how far eps and the bounds' weight are."""
    eps = CERTIFIED_EPS * grown
    low, high = bounds(network, (images - eps).clamp(0, 1), (images + eps).clamp(0, 1))
    own = nn.functional.one_hot(labels, 10).bool()
    worst = torch.where(own, low, high)
    weight = 1 - grown / 2
    clean = nn.functional.cross_entropy(network(images), labels)
    return weight * clean + (1 - weight) * nn.functional.cross_entropy(worst, labels)


def bounds(network: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the scores (N, 10) of all images between two images (N, 1, 28, 28)."""
    for layer in network.children():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            low, high = layer(low), layer(high)
            continue
        middle = layer((low + high) / 2)
        reach = (high - low) / 2
        if isinstance(layer, nn.Linear):
            reach = nn.functional.linear(reach, layer.weight.abs())
        else:
            weight = layer.weight.abs()
            reach = nn.functional.conv2d(reach, weight, None, layer.stride, layer.padding)
        low, high = middle - reach, middle + reach
    return low, high


TRAININGS: dict[str, Callable[[data.ImageSet], nn.Module]] = {
    "plain": plain,
    "adversarially-trained": adversarial,
    "certified-trained": certified,
}


def network(name: str, root: str | None, cache: Path | None) -> Classifier:
    """Give a trained network, from the cache if it is there."""
    path = None if cache is None else cache / f"{name}.pt"
    if path is not None and path.exists():
        module: nn.Module = strided_cnn()
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        print(f"training the {name} network", flush=True)
        module = TRAININGS[name](data.load("mnist", "train", root))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(module.state_dict(), path)
    module.to(memory_format=torch.contiguous_format)  # as the networks of most users
    return Classifier(module.requires_grad_(True).eval(), 10)
