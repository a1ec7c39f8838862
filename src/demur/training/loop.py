"""The training loop: one for all networks, papers and defences."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from demur import seeds
from demur.classifier import check_counts, device_of, raising_module_errors
from demur.errors import DemurError
from demur.hardware import has_fast_bfloat16, pick_device, tuned
from demur.progress import Job, job
from demur.training import checkpoint as checkpoints
from demur.training.batches import LoaderBatches, check_labelled, make_batches
from demur.training.optimizers import adadelta
from demur.training.randomness import preserved_randomness, seed_step
from demur.training.steps import (
    BatchTransform,
    Epoch,
    Loss,
    State,
    Training,
    collect,
    measured,
    take_step,
)
from demur.training.stopping import Best, EarlyStopping, ended, look

Scheduler = Callable[[Optimizer, int], LRScheduler]
"""(optimizer, total number of steps) -> the scheduler of its learning rate."""

CHECKPOINT_SECONDS = 30.0
CHECK_STEPS = 50  # losses are read this often: each reading waits for a GPU


def fit(
    network: nn.Module,
    images: Tensor | DataLoader[Any],
    labels: Tensor | None = None,
    *,
    epochs: int,
    batch_size: int | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adadelta,
    scheduler: Scheduler | None = None,
    transform: BatchTransform | None = None,
    loss: Loss | None = None,
    max_gradient_norm: float | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    stopping: EarlyStopping | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    checkpoint: Path | str | None = None,
    data_key: str | None = None,
    fabric: Fabric | None = None,
) -> list[Epoch]:
    """Train a network in place by minimising cross-entropy.

    The network is in evaluation mode afterwards, on the device that was used. The same arguments
    give the same weights, on the same kind of machine with the same number of threads. Progress
    goes to the logger `demur` at level INFO (see `demur.progress`).

    Parameters
    ----------
    network : nn.Module
        Images (N, C, H, W) in [0, 1] to scores (N, outputs).
    images : Tensor of shape (N, ...) or DataLoader
        uint8, or float in [0, 1]. A tensor stays on its device, and only batches are copied; each
        epoch leaves out the images that do not fill a batch, different ones each time. A DataLoader
        has a length and gives batches (images, labels).
    labels : Tensor of shape (N,)
        Integers in 0..outputs-1. None with a DataLoader.
    epochs : int
        Passes over the images.
    batch_size : int, default=128
        Images a step, over all devices. None with a DataLoader.
    optimizer : callable, default=adadelta
        Makes the optimizer from the parameters.
    scheduler : callable, optional
        ``scheduler(optimizer, total_steps)`` makes a scheduler of the learning rate. It is stepped
        after every step of the optimizer.
    transform : callable, optional
        ``transform(network, images, labels, step)`` changes each batch before its step.
    loss : callable, optional
        ``loss(network, images, labels, epoch)`` computes the loss of a batch and its scores, in
        place of the cross-entropy, for example `CertifiedLoss`. `epoch` counts the epochs that are
        done, with a fraction. It calls the network itself, in float32, so one process alone can use
        it.
    max_gradient_norm : float, optional
        Gradients of a larger Euclidean norm are shortened to it.
    validation : pair of Tensor, optional
        Images and labels that the network is measured on after each epoch, in float32.
    stopping : EarlyStopping, optional
        Keeps the weights of the best epoch, and ends a training that does not improve. One process
        alone can use it.
    seed : int, default=0
        Seed of the order of the images and of all draws inside the network. Each step has its own
        seed, so a resumed training repeats them. With a DataLoader it also seeds, for each epoch,
        the random states that datasets and samplers draw from.
    device : {"auto", "cpu", "cuda"}
        Ignored if `fabric` is given.
    precision : {"auto", "float32", "bfloat16"}
        Precision of the forward and backward passes; the weights keep theirs. ``"auto"`` is
        bfloat16 where the hardware has it. Ignored if `fabric` is given.
    checkpoint : path, optional
        File to resume from if it belongs to the same training: every argument counts, `transform`
        and the values that it refers to included (see `files.fingerprint`). It is written every
        half minute, with a DataLoader only at the end of an epoch, and removed at the end.
    data_key : str, optional
        A text that names the images of the DataLoader and their augmentation. A checkpoint needs
        it, because the images of a DataLoader cannot be compared.
    fabric : Fabric, optional
        A launched Fabric, for data-parallel training. Each process takes its share of each batch,
        and batch normalisation takes its statistics from that share. With a DataLoader, the sampler
        must be a DistributedSampler.

    Returns
    -------
    list of Epoch
        Results of each epoch.

    Raises
    ------
    DemurError
        For arguments that do not fit each other, or a loss that is not finite (the message names
        the step).

    Examples
    --------
    >>> from demur import data
    >>> digits = data.load("digits", "test")
    >>> network = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    >>> _ = network(digits.to_float())
    >>> first, second = fit(network, digits.images, digits.labels, epochs=2, batch_size=32)
    >>> second.loss < first.loss
    True
    """
    _check_can_learn(network)
    _check_counted(epochs, validation)
    fabric = _alone(fabric or _fabric(device, precision, network), stopping, loss)
    batches = make_batches(
        images, labels, batch_size, data_key, seed, fabric.global_rank, fabric.world_size
    )
    network.to(memory_format=torch.channels_last)
    made = optimizer(network.parameters())
    key = ""
    if checkpoint:
        batches.check_resumable()
        key = checkpoints.training_key(
            fabric.device,
            network=network,
            batches=batches.identity(),
            run=(epochs, seed, fabric.strategy.precision.precision, fabric.world_size),
            optimizer=_identity(optimizer, made),
            rest=(scheduler, transform, validation, stopping, loss, max_gradient_norm),
        )
    schedule = _schedule(scheduler, made, epochs * batches.steps)
    model, wrapped = fabric.setup(network, made)
    training = Training(
        fabric=fabric,
        network=network,
        model=model,
        optimizer=wrapped,
        schedule=schedule,
        batches=batches,
        transform=transform,
        validation=validation,
        total=epochs * batches.steps,
        seed=seed,
        checkpoint=Path(checkpoint) if checkpoint else None,
        key=fabric.broadcast(key),  # all processes resume, or none
        stopping=stopping,
        loss=loss,
        max_gradient_norm=max_gradient_norm,
    )
    return _train(training)


def _check_can_learn(network: nn.Module) -> None:
    if torch.is_inference_mode_enabled():
        raise DemurError("leave torch.inference_mode: a training needs gradients.")
    device_of(network, torch.device("cpu"))
    parameters = list(network.parameters())
    if any(is_lazy(one) for one in parameters):
        raise DemurError("the network has lazy layers: score some images with it first.")
    if not any(one.requires_grad for one in parameters):
        raise DemurError(
            "the network has no parameter that requires a gradient: nothing can learn."
        )


def _check_counted(epochs: int, validation: tuple[Tensor, Tensor] | None) -> None:
    check_counts(epochs=epochs)
    if validation is not None:
        check_labelled(*validation, "validation")


def _identity(make: Callable[[Iterable[nn.Parameter]], Optimizer], made: Optimizer) -> object:
    """Give what tells an optimizer from others."""
    return make, type(made), made.defaults, made.state_dict()["param_groups"]


def _alone(fabric: Fabric, stopping: EarlyStopping | None, loss: Loss | None) -> Fabric:
    for given, what in ((stopping, "early stopping"), (loss, "a loss of your own")):
        if given is not None and fabric.world_size > 1:
            raise DemurError(f"{what} is for a training in one process.")
    return fabric


def _train(training: Training) -> list[Epoch]:
    state = _resumed(training)
    with raising_module_errors():
        training.network.train()
    loader = isinstance(training.batches, LoaderBatches)
    randomness = preserved_randomness() if loader else torch.random.fork_rng()
    gradients = torch.enable_grad()
    with tuned(), randomness, gradients, job("training", training.total) as progress:
        progress.advance(state.step)
        if state.best is None:
            state.best = look(training.stopping, training.network, 0, None)
        while state.step < training.total and not _stops(training, state):
            _epoch(training, state, progress)
    if state.best is not None:
        training.network.load_state_dict(state.best.weights)
    if training.checkpoint and training.fabric.is_global_zero:
        training.checkpoint.unlink(missing_ok=True)
    with raising_module_errors():
        training.network.eval()
    return state.history


def _stops(training: Training, state: State) -> bool:
    return ended(training.stopping, state.step // training.batches.steps, state.best)


def _epoch(training: Training, state: State, progress: Job) -> None:
    """Train to the end of the epoch that the state is in."""
    fabric = training.fabric
    steps = training.batches.steps
    epoch, start = divmod(state.step, steps)
    if start == 0:
        state.sums = torch.zeros(3, dtype=torch.float64)
    for batch in training.batches.epoch(epoch, start):
        names = ("step", state.step, fabric.global_rank)
        seed_step(fabric.device, seeds.derive(training.seed, *names))
        state.pending.append(take_step(training, batch, state.step))
        state.step += 1
        ends = state.step % steps == 0
        if len(state.pending) < CHECK_STEPS and not ends:
            continue
        collect(state, progress, f"epoch {epoch + 1} of {training.total // steps}")
        if ends:
            state.history.append(measured(training, state.sums))
            state.best = look(training.stopping, training.network, epoch + 1, state.best)
        saves = training.batches.resumes_within_epochs or ends
        if training.checkpoint and saves and state.step < training.total:
            _save_if_due(training, training.checkpoint, state)


def _fabric(device: str, precision: str, network: nn.Module) -> Fabric:
    chosen = pick_device(device)
    if precision not in ("auto", "float32", "bfloat16"):
        raise DemurError(f"precision must be auto, float32 or bfloat16, not {precision!r}.")
    double = any(one.dtype == torch.float64 for one in network.parameters())
    if double and precision == "bfloat16":
        raise DemurError("a network of float64 weights is trained in float64: leave precision out.")
    # Autocast leaves float64 alone, and gives it bfloat16 beside it.
    half = precision == "bfloat16" or (
        precision == "auto" and has_fast_bfloat16(chosen) and not double
    )
    # As a plugin: Fabric logs a line if the precision is given by name.
    plugin = MixedPrecision("bf16-mixed", chosen.type) if half else Precision()
    return Fabric(accelerator=chosen.type, devices=1, plugins=plugin)


def _schedule(scheduler: Scheduler | None, made: Optimizer, total: int) -> LRScheduler | None:
    if scheduler is None:
        return None
    schedule = scheduler(made, total)
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        raise DemurError(
            "scheduler must return a torch.optim.lr_scheduler.LRScheduler that is stepped without "
            f"a metric, not {type(schedule).__name__}."
        )
    return schedule


def _save_if_due(training: Training, path: Path, state: State) -> None:
    due = time.monotonic() - state.saved_at > CHECKPOINT_SECONDS
    if not due or not training.fabric.is_global_zero:
        return
    schedule = training.schedule
    saved = {
        "network": training.network.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": None if schedule is None else schedule.state_dict(),
        "step": state.step,
        "sums": state.sums,
        "history": [asdict(epoch) for epoch in state.history],
        "best": None if state.best is None else vars(state.best),
    }
    checkpoints.save(path, training.key, saved)
    state.saved_at = time.monotonic()


def _resumed(training: Training) -> State:
    """Load the checkpoint into the network and its optimizer; return its state, or a new one."""
    path = training.checkpoint
    saved = None if path is None else checkpoints.load(path, training.key)
    if saved is None:
        return State()
    training.network.load_state_dict(saved["network"])
    training.optimizer.load_state_dict(saved["optimizer"])
    if training.schedule is not None:
        training.schedule.load_state_dict(saved["scheduler"])
    history = [Epoch(**epoch) for epoch in saved["history"]]
    # The sums are those of all processes: they count once.
    sums = saved["sums"] * training.fabric.is_global_zero
    best = None if saved["best"] is None else Best(**saved["best"])
    return State(saved["step"], history, sums, best=best)
