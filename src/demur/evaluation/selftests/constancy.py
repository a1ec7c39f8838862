"""Hidden state: whether an answer depends on anything but the image."""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from demur.classifier import Classifier, decide, device_of, evaluating
from demur.evaluation.store import Computed
from demur.hardware import tuned

CLEAR: Final = 1e-3
"""Of the spread of the scores: a decision that is nearer to another one may be rounded."""
FEW: Final = 4
"""Images on which the random state is looked at."""


@dataclass(frozen=True, eq=False)
class Constancy:
    """Ask again, after the attacks: the model must give the answers that it gave at first.

    The images are scored in the old order, in other batches, and with gradients. A decision
    that differs from the first one shows a model that counts its calls, that looks at the other
    images of a batch, or that answers attacks differently. The random state of torch is looked at:
    a model that seeds it in each call hides that it draws. Buffers that change show statistics
    that are updated in evaluation mode.

    Parameters
    ----------
    first : tuple of int
        The decision on each image in the first pass of the handshake; -1 is a rejection.

    Examples
    --------
    >>> from demur import Classifier
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    >>> model = Classifier(network, 3)
    >>> probe = Constancy(tuple(model.predict(images).tolist()))
    >>> values, found = probe.run(model, images, labels, seed=0, batch_size=4)
    >>> found["differs"].tolist(), values["reseeds"], values["buffers"]
    ([False, False, False, False], False, [])
    """

    title: ClassVar[str] = "hidden state"
    first: tuple[int, ...]

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, seed: int, batch_size: int
    ) -> Computed:
        """Flag the images whose decision differs: `differs` (n,); say what else changed."""
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        first = torch.tensor(self.first)
        passes = [
            model.scores(images, batch_size),
            _in_other_batches(model, images, batch_size),
            scores_with_gradients(model, images, batch_size),
        ]
        differs = torch.zeros(len(images), dtype=torch.bool)
        for scores in passes:
            differs |= (decide(scores, model.num_classes) != first) & clear(scores)
        changed = [
            name
            for name, buffer in model.named_buffers()
            if name not in before or not torch.equal(buffer, before[name])
        ]
        reseeds = _reseeds(model, images[:FEW])
        return {"reseeds": reseeds, "buffers": changed[:FEW]}, {"differs": differs}

    def passes(self) -> tuple[float, float]:
        """Three forward passes."""
        return 3, 0


def _in_other_batches(model: Classifier, images: Tensor, batch_size: int) -> Tensor:
    """Score every second image first, in batches of at most half of the images."""
    order = torch.arange(len(images))
    order = torch.cat([order[::2], order[1::2]])
    scores = model.scores(images[order], max(1, min(batch_size, len(images) // 2)))
    return scores[order.argsort()]


def clear(scores: Tensor) -> Tensor:
    """Flag the images (n,) whose decision is no matter of rounding."""
    best = scores.topk(2, 1).values
    spread = scores.amax(1) - scores.amin(1)
    return best[:, 0] - best[:, 1] > CLEAR * spread


def scores_with_gradients(model: Classifier, images: Tensor, batch_size: int) -> Tensor:
    """Compute scores as an attack does, with gradients switched on, in float32."""
    device = device_of(model, images.device)
    with evaluating(model), tuned(), torch.enable_grad():
        found = [
            model(part.to(device).requires_grad_()).detach().cpu().float()
            for part in torch.split(images, batch_size)
        ]
    return torch.cat(found)


def _reseeds(model: Classifier, images: Tensor) -> bool:
    """Say whether the random state after a pass does not depend on the state before."""
    states = []
    cuda = device_of(model, images.device).type == "cuda"
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.scores(images, len(images))
            states.append(torch.cuda.get_rng_state() if cuda else torch.get_rng_state())
            states.append(torch.get_rng_state())
    return torch.equal(states[0], states[2]) or torch.equal(states[1], states[3])
