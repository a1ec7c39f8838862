"""The training loop: one for all networks, papers and defences."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from torch import Tensor, nn

from demur import seeds
from demur.data import as_floats
from demur.errors import DemurError
from demur.files import digest, replacing
from demur.hardware import has_fast_bfloat16, pick_device, tuned
from demur.progress import job

BatchTransform = Callable[[nn.Module, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(network, images in [0, 1], labels, step) -> the images and labels to train on: how a defence attacks its batches."""

CHECKPOINT_SECONDS = 30.0
CHECK_STEPS = 50  # losses are looked at this often: each look waits for a GPU


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to, on the batches as trained on: mean cross-entropy and accuracy (0..1)."""

    loss: float
    accuracy: float


def adadelta(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adadelta as the background-class paper had it: Keras' defaults of 2017, pinned, since both libraries changed theirs."""
    return torch.optim.Adadelta(parameters, lr=1.0, rho=0.95, eps=1e-7)


def rejection_sgd(parameters: Iterable[nn.Parameter], rate: float = 0.1) -> torch.optim.Optimizer:
    """Descent as the rejection paper has it (Table 2): momentum .9, and Keras' decay: rate / (1 + 1e-6 step) after each step."""
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)

    def decay(*_: object) -> None:
        for group in optimizer.param_groups:
            group["steps"] = group.get("steps", 0) + 1  # in the group, so that a checkpoint has it
            group["lr"] = rate / (1 + 1e-6 * group["steps"])

    optimizer.register_step_post_hook(decay)
    return optimizer


def stepwise_sgd(parameters: Iterable[nn.Parameter], steps: int, rate: float = 0.1) -> torch.optim.Optimizer:
    """Descent as Madry et al. 2018 have it for CIFAR-10: momentum .9, decay 2e-4, and a tenth of the rate after a half and 3/4 of it."""
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=2e-4)

    def decay(*_: object) -> None:
        for group in optimizer.param_groups:
            group["steps"] = group.get("steps", 0) + 1  # in the group, so that a checkpoint has it
            group["lr"] = rate * 0.1 ** ((group["steps"] >= steps / 2) + (group["steps"] >= 3 * steps / 4))

    optimizer.register_step_post_hook(decay)
    return optimizer


def fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adadelta,
    transform: BatchTransform | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    checkpoint: Path | None = None,
    fabric: Fabric | None = None,
) -> list[Epoch]:
    """Train `network` in place by minimising cross-entropy; leave it in evaluation mode, on the device that was used.

    Args:
        network: gives scores (N, outputs) of images (N, C, H, W) in [0, 1].
        images: (N, C, H, W), uint8 or float in [0, 1]; they stay where they are, and only batches travel.
        labels: (N,) integers in 0..outputs-1.
        epochs: passes over the images; each leaves out the images that do not fill a batch, different ones each time.
        batch_size: images a step, over all devices.
        optimizer: makes the optimizer from the parameters.
        transform: changes each batch before the step.
        seed: order of the images and all draws inside the network; each step has its own, so a resumed run repeats them.
        device: `auto`, `cpu` or `cuda`; ignored if `fabric` is given.
        precision: `bfloat16` computes the passes so (the weights stay float32); `auto` does where the hardware has it.
        checkpoint: file to resume from if it is this run's, written every half minute and removed at the end.
        fabric: a launched lightning Fabric, for data-parallel training; each rank then takes its share of each batch, and batch
            norm its statistics from that share.

    Raises: DemurError for images or labels that do not fit, and for a loss that is not finite (naming the step).
    """
    _check(images, labels, epochs, batch_size)
    fabric = fabric or _fabric(device, precision)
    batch_size = min(batch_size, len(images))
    if batch_size % fabric.world_size:
        raise DemurError(f"a batch of {batch_size} does not divide among {fabric.world_size} devices.")
    steps_per_epoch = len(images) // batch_size
    total = epochs * steps_per_epoch
    labels, highest = labels.to(images.device), int(labels.max())
    network.to(memory_format=torch.channels_last)
    model, optimiser = fabric.setup(network, optimizer(network.parameters()))
    history: list[Epoch] = []
    step, sums = 0, torch.zeros(2, dtype=torch.float64)
    key = ""
    if checkpoint:
        settings = (
            epochs,
            batch_size,
            seed,
            images.shape,
            fabric.strategy.precision.precision,
            type(optimiser.optimizer),
            optimiser.optimizer.defaults,
        )
        initial = (part for name, value in network.state_dict().items() for part in (name, _bytes(value)))
        key = digest(str(settings), _bytes(images), _bytes(labels), *initial)
    if checkpoint and (saved := _load(checkpoint, key)):
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimizer"])
        step, history = saved["step"], [Epoch(**epoch) for epoch in saved["history"]]
        sums = saved["sums"] * fabric.is_global_zero  # they count once
    network.train()
    pending: list[Tensor] = []
    saved_at = time.monotonic()
    with tuned(), torch.random.fork_rng(), job("training", total) as progress:
        progress.advance(step)
        order = _order(len(images), seed, step // steps_per_epoch)
        while step < total:
            position = step % steps_per_epoch
            if position == 0:
                order, sums = _order(len(images), seed, step // steps_per_epoch), torch.zeros(2, dtype=torch.float64)
            chosen = order[position * batch_size : (position + 1) * batch_size]
            chosen = chosen[fabric.global_rank :: fabric.world_size].to(images.device)
            _seed_step(fabric.device, seeds.derive(seed, "step", step, fabric.global_rank))
            pending.append(_step(fabric, model, optimiser, images[chosen], labels[chosen], transform, step, highest))
            step += 1
            ends = step % steps_per_epoch == 0
            if len(pending) == CHECK_STEPS or ends:
                sums = sums + _collect(pending, step)
                lost, correct, n = pending[-1].tolist()
                progress.advance(len(pending), f"loss {lost / n:.3f}, accuracy {correct / n:.1%}")
                pending.clear()
                if ends:
                    everywhere = torch.as_tensor(fabric.all_reduce(sums.to(fabric.device), reduce_op="sum"))
                    loss, correct = (everywhere / (steps_per_epoch * batch_size)).tolist()
                    history.append(Epoch(loss, correct))
                due = checkpoint and step < total and time.monotonic() - saved_at > CHECKPOINT_SECONDS
                if checkpoint and due and fabric.is_global_zero:
                    _save(checkpoint, key, network, optimiser, step, sums, history)
                    saved_at = time.monotonic()
    if checkpoint and fabric.is_global_zero:
        checkpoint.unlink(missing_ok=True)
    network.eval()
    return history


def _check(images: Tensor, labels: Tensor, epochs: int, batch_size: int) -> None:
    if images.ndim < 2 or labels.shape != (len(images),) or len(images) == 0:
        raise DemurError(f"training needs one label for each image, and at least one: got {tuple(images.shape)} and {tuple(labels.shape)}.")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise DemurError("training labels must be integers from 0 up.")
    if epochs < 1 or batch_size < 1:
        raise DemurError(f"epochs and batch_size must be at least 1, not {epochs} and {batch_size}.")


def _fabric(device: str, precision: str) -> Fabric:
    chosen = pick_device(device)
    if precision not in ("auto", "float32", "bfloat16"):
        raise DemurError(f"precision must be auto, float32 or bfloat16, not {precision!r}.")
    half = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(chosen))
    # As a plugin and not by name, which would log a line.
    return Fabric(accelerator=chosen.type, devices=1, plugins=MixedPrecision("bf16-mixed", chosen.type) if half else Precision())


def _seed_step(device: torch.device, seed: int) -> None:
    """Seed the draws inside the network. Not by torch.manual_seed: without a GPU it queues a seed for one at every call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeds.generator(seed, "order", epoch))


def _step(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    transform: BatchTransform | None,
    step: int,
    highest: int,
) -> Tensor:
    """One step of descent; gives (sum of losses, number correct, number of images), still on the device."""
    images, labels = as_floats(images.to(fabric.device)), labels.to(fabric.device, torch.int64)
    if transform is not None:
        images, labels = transform(model, images, labels, step)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer.zero_grad(set_to_none=True)
    scores = model(images).float()
    if highest >= scores.shape[1]:
        raise DemurError(f"a label is {highest}, but the network has {scores.shape[1]} outputs.")
    loss = nn.functional.cross_entropy(scores, labels)
    fabric.backward(loss)
    optimizer.step()
    with torch.no_grad():
        correct = (scores.argmax(1) == labels).sum()
        return torch.stack([loss.double() * len(labels), correct.double(), torch.full_like(loss, len(labels)).double()])


def _collect(pending: list[Tensor], step: int) -> Tensor:
    """Sum what the last steps, up to `step`, came to; fail if one of them lost its way."""
    rows = torch.stack(pending).cpu()
    bad = (~torch.isfinite(rows[:, 0])).nonzero().flatten()
    if len(bad):
        first = step - len(pending) + int(bad[0])
        raise DemurError(f"the training loss is not finite at step {first}: lower the learning rate, or look at the images of that step.")
    return rows[:, :2].sum(0)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _save(
    path: Path, key: str, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, sums: Tensor, history: list[Epoch]
) -> None:
    state = {
        "key": key,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "sums": sums,
        "history": [asdict(epoch) for epoch in history],
    }
    with replacing(path) as partial:
        torch.save(state, partial)


def _load(path: Path, key: str) -> dict[str, Any] | None:
    """The saved state, or None if there is none, it is broken, or it is another run's."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # a broken file makes the restricted unpickler raise whatever its rubbish leads to
        return None
    return saved if isinstance(saved, dict) and saved.get("key") == key else None
