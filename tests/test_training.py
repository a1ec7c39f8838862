"""The training loop, its checkpoints, and the fingerprints that recognise them."""

import ast
import copy
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import demur
import parallel_fit
from demur import Classifier, DemurError, hardware
from demur.files import fingerprint
from demur.progress import Silent, reporting
from demur.training import (
    CropAndFlip,
    Epoch,
    adadelta,
    fit,
    one_cycle_sgd,
    rejection_sgd,
    stepwise_sgd,
)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def problem(count=600, seed=0):
    """Bright left or bright right: learnt in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images[labels == 1, :, :, 4:] += 100
    return images, labels


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(144, 2),
        )


def weights(network):
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


class Killed(BaseException):
    pass


class Listening(Silent):
    """Keeps what is reported; kills the training at the report number `kill_at`."""

    def __init__(self, kill_at=None):
        self.kill_at = kill_at
        self.amounts = []
        self.notes = []
        self.messages = []
        self.total = 0

    def start(self, job, total):
        self.total = total
        return 0

    def advance(self, job, amount, note):
        if len(self.amounts) == self.kill_at:
            raise Killed
        self.amounts.append(amount)
        self.notes.append(note)

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def eager(monkeypatch):
    """Checkpoints after every step."""
    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("demur.training.loop.CHECK_STEPS", 1)


def killed(kill_at, network, *data, **options):
    """Train until the report number `kill_at`; a checkpoint is left."""
    with reporting(Listening(kill_at)), pytest.raises(Killed):
        fit(network, *data, **options)
    assert options["checkpoint"].exists()


def resumed(network, *data, **options):
    """Train to the end; give the history, the step that it began with, and the messages."""
    listening = Listening()
    with reporting(listening):
        history = fit(network, *data, **options)
    assert sum(listening.amounts) == listening.total and not options["checkpoint"].exists()
    return history, listening.amounts[0], listening.messages


# Optimizers


def test_adadelta_is_the_papers():
    (group,) = adadelta([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["rho"], group["eps"]) == (1.0, 0.95, 1e-7)


def rates(make, steps):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    found = []
    for _ in range(steps):
        weight.grad = torch.ones(1)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return found


def test_stepwise_descent_slows_down_after_a_half_and_three_quarters():
    found = rates(lambda parameters: stepwise_sgd(parameters, steps=8, rate=0.1), 8)
    assert found == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_the_rejection_papers_rate_decays_as_in_keras():
    assert rates(rejection_sgd, 3) == [0.1, 0.1 / (1 + 1e-6), 0.1 / (1 + 2e-6)]


def test_one_cycle_rises_and_falls_once():
    found = rates(lambda parameters: one_cycle_sgd(parameters, steps=10, rate=0.9), 10)
    assert found == pytest.approx([0.45, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(lambda parameters: one_cycle_sgd(parameters, steps=1, rate=0.9), 1) == [0.9]


# Augmentation


def test_each_image_is_shifted_and_half_are_mirrored():
    images = torch.arange(200.0 * 2 * 5 * 6).view(200, 2, 5, 6) + 1
    torch.manual_seed(0)
    changed, labels = CropAndFlip(2)(nn.Identity(), images, torch.arange(200), 0)
    assert changed.shape == images.shape and labels.tolist() == list(range(200))
    padded = nn.functional.pad(images, [2] * 4)
    seen = set()
    for image, whole in zip(changed, padded, strict=True):
        fits = [
            (down, right, mirrored)
            for mirrored in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(
                image.flip(2) if mirrored else image, whole[:, down : down + 5, right : right + 6]
            )
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert {place[:2] for place in seen} == {
        (down, right) for down in range(5) for right in range(5)
    }
    assert {place[2] for place in seen} == {False, True}
    torch.manual_seed(0)
    assert torch.equal(changed, CropAndFlip(2)(nn.Identity(), images, labels, 3)[0])
    whole, _ = CropAndFlip(2, flip=False)(nn.Identity(), images, labels, 0)
    assert bool((whole.diff(dim=3)[:, :, 2:3, 2:3] == 1).all())
    with pytest.raises(DemurError, match="padding"):
        CropAndFlip(0)


# The loop


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fitting_learns_and_leaves_evaluation_mode_and_float32_weights(precision):
    images, labels = problem()
    network = small()
    options = {"epochs": 5, "batch_size": 64, "optimizer": sgd, "precision": precision}
    history = fit(network, images, labels, **options)
    assert len(history) == 5 and history[-1].loss < history[0].loss and history[-1].accuracy > 0.95
    assert not network.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    test_images, test_labels = problem(seed=1)
    assert float((network(test_images / 255).argmax(1) == test_labels).float().mean()) > 0.97


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_d27_networks_of_another_precision_are_trained_in_it(dtype):
    """D27"""
    images, labels = problem()
    network = small().to(dtype)
    options = {"epochs": 3, "batch_size": 64, "optimizer": sgd}
    history = fit(network, images, labels, **options, validation=problem(seed=1))
    assert history[-1].accuracy > 0.9 and history[-1].validation_accuracy > 0.9
    assert network[0].weight.dtype == dtype


def plain_step(network, images, labels):
    optimizer = sgd(network.train().parameters())
    nn.functional.cross_entropy(network(images.float() / 255), labels).backward()
    optimizer.step()


def test_one_float32_step_is_plain_pytorch():
    images, labels = problem(64)
    ours, plain = small(), small()
    ours[3].p = plain[3].p = 0.0
    fit(ours, images, labels, epochs=1, batch_size=64, optimizer=sgd, precision="float32")
    plain_step(plain, images, labels)
    assert torch.allclose(weights(ours), weights(plain), atol=1e-6)


def test_same_seed_same_weights_and_uint8_or_float_alike():
    images, labels = problem()
    fitted = []
    for given_images, seed in ((images, 5), (images / 255, 5), (images, 6)):
        network = small()
        fit(network, given_images, labels, epochs=2, batch_size=64, optimizer=sgd, seed=seed)
        fitted.append(weights(network))
    assert torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[0], fitted[2])


def test_a_transform_changes_what_is_trained_on():
    images, labels = problem()
    seen = []

    def swap(network, some, true, step):
        assert network.training and float(some.max()) <= 1
        seen.append(step)
        return some, 1 - true

    network = small()
    fit(network, images, labels, epochs=3, batch_size=64, optimizer=sgd, transform=swap)
    assert seen == list(range(27))
    assert float((network(images / 255).argmax(1) == 1 - labels).float().mean()) > 0.95


def test_a_transform_may_enlarge_a_batch():
    def double(network, some, true, step):
        return torch.cat([some, some]), torch.cat([true, true])

    (epoch,) = fit(small(), *problem(), epochs=1, optimizer=sgd, transform=double)
    assert 0.5 < epoch.accuracy <= 1


def test_each_epoch_leaves_other_images_out():
    images, labels = problem(70)
    sums = []

    def keep(network, some, true, step):
        sums.append(some.sum().item())
        return some, true

    fit(small(), images, labels, epochs=3, batch_size=64, optimizer=sgd, transform=keep)
    assert len(set(sums)) == 3


def test_a_loss_that_is_not_finite_names_the_step():
    def poison(network, some, true, step):
        return (some * torch.nan if step == 4 else some), true

    with pytest.raises(DemurError, match="not finite at step 4"):
        fit(small(), *problem(), epochs=2, batch_size=64, optimizer=sgd, transform=poison)


def test_the_callers_random_state_and_denormals_are_left_alone():
    state = torch.get_rng_state()
    fit(small(), *problem(64), epochs=1, batch_size=64, optimizer=sgd)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.tensor([1e-39]) * torch.tensor([1.0])).item() > 0


def test_progress_and_loss_are_reported():
    listening = Listening()
    with reporting(listening):
        fit(small(), *problem(256), epochs=2, batch_size=64, optimizer=sgd)
    assert sum(listening.amounts) == listening.total == 8 and "loss" in listening.notes[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.tensor([0, 1])}, "one label for each"),
        ({"labels": torch.tensor([0, 1] * 31 + [0, 5])}, "label is 5, but the network has 2"),
        ({"labels": torch.full((64,), -1)}, "from 0 up"),
        ({"labels": None}, "as tensors"),
        ({"images": [1, 2]}, "as tensors"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"device": "gpu"}, "unknown device"),
        ({"precision": "float16"}, "precision"),
        ({"images": torch.rand(64, 1, 8, 8) + 1}, "lie in"),
        ({"data_key": "mnist"}, "data_key"),
        ({"validation": (torch.rand(3, 1, 8, 8), torch.zeros(2).long())}, "validation needs one"),
        ({"validation": (torch.rand(3, 1, 8, 8), torch.full((3,), 2))}, "validation label is 2"),
        ({"scheduler": lambda optimizer, total: None}, "scheduler must return"),
        ({"scheduler": lambda o, total: lr_scheduler.ReduceLROnPlateau(o)}, "without a metric"),
    ],
)
def test_bad_input_ends_at_the_boundary(change, said):
    images, labels = problem(64)
    options = {"images": images, "labels": labels, "epochs": 1, "batch_size": 32, **change}
    with pytest.raises(DemurError, match=said):
        fit(small(), options.pop("images"), options.pop("labels"), **options)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DemurError, match="no CUDA GPU"):
        fit(small(), *problem(64), epochs=1, device="cuda")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Each takes its share of each batch; weights and history are those of one process."""
    out = tmp_path / "fit.pt"
    done = subprocess.run(
        [sys.executable, Path(parallel_fit.__file__), out],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together = torch.load(out, weights_only=True)
    assert "DistributedSampler" in together.pop("refused")
    images, labels = parallel_fit.problem()
    alone = {
        "tensors": parallel_fit.train(images, labels, batch_size=64),
        "loader": parallel_fit.train(DataLoader(TensorDataset(images, labels), batch_size=64)),
    }
    for way, expected in alone.items():
        for name, value in expected["weights"].items():
            assert torch.allclose(together[way]["weights"][name], value, atol=1e-6), way
        for ours, epoch in zip(together[way]["epochs"], expected["epochs"], strict=True):
            assert ours == pytest.approx(epoch, abs=1e-6)


# Validation and schedulers


def test_validation_measures_the_network_after_each_epoch_and_changes_nothing():
    images, labels = problem()
    held_out = problem(700, seed=1)  # more than one batch
    plain, measured = small(), small()
    options = {"epochs": 2, "batch_size": 64, "optimizer": sgd, "precision": "float32"}
    without = fit(plain, images, labels, **options)
    history = fit(measured, images, labels, **options, validation=held_out)
    assert torch.equal(weights(plain), weights(measured))
    assert [(one.loss, one.accuracy) for one in history] == [
        (one.loss, one.accuracy) for one in without
    ]
    assert without[0] == Epoch(without[0].loss, without[0].accuracy, None, None)
    with torch.no_grad():
        scores = measured(held_out[0] / 255)
    loss = nn.functional.cross_entropy(scores, held_out[1])
    assert history[-1].validation_loss == pytest.approx(float(loss), rel=1e-5)
    accuracy = float((scores.argmax(1) == held_out[1]).double().mean())
    assert history[-1].validation_accuracy == pytest.approx(accuracy)


def one_cycle(optimizer, total):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=total + 1)


def milestones(optimizer, total):
    return lr_scheduler.MultiStepLR(optimizer, [total // 3, total // 2])


def warm_up(optimizer, total):
    parts = [
        lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 5),
        lr_scheduler.CosineAnnealingLR(optimizer, total - 5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


def test_the_scheduler_is_stepped_after_every_step():
    seen = []

    def make(optimizer, total):
        assert total == 6
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

        def watch(network, some, true, step):
            seen.append(optimizer.param_groups[0]["lr"])
            return some, true

        make.watch = watch
        return scheduler

    def transform(*batch):
        return make.watch(*batch)

    options = {"epochs": 2, "batch_size": 64, "optimizer": sgd, "transform": transform}
    fit(small(), *problem(192), **options, scheduler=make)
    assert seen == pytest.approx([0.1 * 0.5**step for step in range(6)])


@pytest.mark.parametrize("scheduler", [one_cycle, milestones, warm_up])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_a_scheduler_resumes_with_the_same_bits(tmp_path, eager, scheduler):
    options = {"epochs": 3, "batch_size": 64, "optimizer": sgd, "scheduler": scheduler}
    whole, plain = small(), small()
    history = fit(whole, *problem(320), **options)
    fit(plain, *problem(320), **{**options, "scheduler": None})
    assert not torch.equal(weights(whole), weights(plain))
    options["checkpoint"] = tmp_path / "fit"
    killed(8, small(), *problem(320), **options)
    network = small()
    again, first, _ = resumed(network, *problem(320), **options)
    assert first == 7 and again == history and torch.equal(weights(network), weights(whole))


# DataLoaders


class Augmented(Dataset):
    """Images with noise from torch, numpy and Python, as data sets of others have it."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return (self.images[index] / 255 + 0.1 * noise).clamp(0, 1), self.labels[index]


def loader(count=300, **options):
    return DataLoader(Augmented(*problem(count)), **{"batch_size": 64, "shuffle": True, **options})


def test_an_epoch_of_a_loader_is_plain_pytorch():
    images, labels = problem(100)
    ours, plain = small(), small()
    ours[3].p = plain[3].p = 0.0
    batches = DataLoader(TensorDataset(images, labels), batch_size=100)
    (epoch,) = fit(ours, batches, epochs=1, optimizer=sgd, precision="float32")
    plain_step(plain, images, labels)
    assert torch.allclose(weights(ours), weights(plain), atol=1e-6)
    assert 0 < epoch.accuracy <= 1


def test_means_over_a_loader_count_each_image_once():
    images, labels = problem(100)
    network = small()
    network[3].p = 0.0
    network[1].momentum = 0.0
    batches = DataLoader(TensorDataset(images, labels), batch_size=30)
    still = partial(torch.optim.SGD, lr=0.0)
    (epoch,) = fit(network, batches, epochs=1, optimizer=still, precision="float32")
    parts = [network.train()(some.float() / 255).detach() for some in images.split(30)]
    loss = nn.functional.cross_entropy(torch.cat(parts), labels)
    assert epoch.loss == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"generator": torch.Generator()}])
def test_the_order_and_augmentation_of_a_loader_follow_the_seed(options):
    fitted = []
    for seed in (5, 5, 6):
        np.random.seed(len(fitted))  # noqa: NPY002
        random.seed(len(fitted))
        torch.manual_seed(len(fitted))
        network = small()
        fit(network, loader(128, **options), epochs=2, optimizer=sgd, seed=seed)
        fitted.append(weights(network))
    assert torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[0], fitted[2])


def test_what_the_network_draws_does_not_change_the_augmentation():
    def seen(draws):
        sums = []

        def transform(network, images, labels, step):
            torch.rand(draws)
            sums.append(float(images.sum()))
            return images, labels

        fit(small(), loader(128), epochs=2, optimizer=sgd, transform=transform)
        return sums

    assert seen(0) == seen(7)


def test_a_loader_leaves_the_callers_random_states_alone():
    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return fingerprint((torch.get_rng_state(), random.getstate(), numpy_state))

    before = states()
    fit(small(), loader(64), epochs=1, optimizer=sgd)
    assert states() == before


@pytest.mark.parametrize("kill_at", [7, 12])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_on_a_loader_resumes_at_the_end_of_an_epoch(tmp_path, eager, kill_at, workers):
    """R10"""
    options = {"epochs": 3, "optimizer": sgd, "seed": 1}
    whole, network = small(), small()
    history = fit(whole, loader(num_workers=workers), **options)
    options |= {"checkpoint": tmp_path / "fit", "data_key": "problem"}
    killed(kill_at, small(), loader(num_workers=workers), **options)
    again, first, _ = resumed(network, loader(num_workers=workers), **options)
    assert first == (kill_at - 1) // 5 * 5 > 0
    assert torch.equal(weights(whole), weights(network)) and again == history


@pytest.mark.parametrize(
    ("change", "changed_loader"),
    [
        ({"data_key": "other"}, {}),
        ({}, {"batch_size": 60}),
        ({}, {"shuffle": False}),
        ({}, {"collate_fn": lambda rows: torch.utils.data.default_collate(rows[:60])}),
    ],
)
def test_a_training_on_another_loader_does_not_resume(tmp_path, eager, change, changed_loader):
    options = {"epochs": 2, "optimizer": sgd, "data_key": "a", "checkpoint": tmp_path / "fit"}
    killed(7, small(), loader(), **options)
    _, first, messages = resumed(small(), loader(**changed_loader), **{**options, **change})
    assert first == 0 and "another training" in messages[0]


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (lambda: loader(), {"labels": torch.zeros(300)}, "leave labels out"),
        (lambda: loader(), {"batch_size": 64}, "leave batch_size out"),
        (lambda: loader(), {"checkpoint": Path("fit")}, "needs data_key"),
        (
            lambda: loader(num_workers=1, persistent_workers=True),
            {"checkpoint": Path("fit"), "data_key": "a"},
            "persistent_workers=False",
        ),
        (lambda: DataLoader(Endless()), {}, "no length"),
        (lambda: loader(10, drop_last=True), {}, "no batches"),
        (lambda: DataLoader(TensorDataset(torch.rand(4, 3))), {}, "pairs.*list of 1"),
        (lambda: DataLoader([torch.rand(3)] * 4), {}, "pairs.*Tensor"),
        (lambda: DataLoader([(torch.rand(1, 8, 8), 0.5)] * 4), {}, "from 0 up"),
        (lambda: DataLoader([(torch.rand(1, 8, 8), 2)] * 4), {}, "label is 2"),
        (lambda: DataLoader([(torch.rand(1, 8, 8) + 1, 1)] * 4), {}, "lie in"),
    ],
)
def test_a_loader_that_does_not_fit_is_one_clear_line(made, options, said):
    with pytest.raises(DemurError, match=said):
        fit(small(), made(), epochs=1, **options)


# Checkpoints


class Watch:
    """A transform that changes nothing and may kill; its state does not count."""

    def __init__(self, kill_at=None):
        self.kill_at = kill_at
        self.steps = []

    def fingerprint(self):
        return "watch"

    def __call__(self, network, images, labels, step):
        if step == self.kill_at:
            raise Killed
        self.steps.append(step)
        return images, labels


@pytest.mark.parametrize("kill_at", [7, 13, 18, 26])
def test_a_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, kill_at):
    """R10: also inside an epoch, with dropout, momentum and batch statistics."""
    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("demur.training.loop.CHECK_STEPS", 3)
    images, labels = problem()
    settings = {"epochs": 3, "batch_size": 64, "optimizer": sgd, "seed": 1}
    whole = small()
    history = fit(whole, images, labels, **settings)
    settings["checkpoint"] = tmp_path / "fit.checkpoint"
    with pytest.raises(Killed):
        fit(small(), images, labels, **settings, transform=Watch(kill_at))
    assert settings["checkpoint"].exists()
    watch, network = Watch(), small()
    again = fit(network, images, labels, **settings, transform=watch)
    assert watch.steps[0] > 0 and not settings["checkpoint"].exists()
    assert torch.equal(weights(whole), weights(network)) and again == history


@pytest.mark.parametrize("content", ["", "rubbish"])
def test_a_broken_checkpoint_is_ignored(tmp_path, content):
    checkpoint = tmp_path / "fit.checkpoint"
    checkpoint.write_text(content)
    network, plain = small(), small()
    options = {"epochs": 1, "batch_size": 64, "optimizer": sgd}
    _, first, messages = resumed(network, *problem(128), **options, checkpoint=checkpoint)
    fit(plain, *problem(128), **options)
    assert torch.equal(weights(network), weights(plain))
    assert first == 0 and "damaged" in messages[0]


def test_d13_a_checkpoint_that_cannot_be_written_is_one_clear_line(tmp_path, eager, monkeypatch):
    """D13: torch raises RuntimeError where the disk is full."""

    def full(state, path):
        raise RuntimeError("PytorchStreamWriter failed\nwriting file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DemurError, match=r"cannot write .*fit: the disk is full"):
        fit(small(), *problem(256), epochs=2, checkpoint=tmp_path / "fit", optimizer=sgd)
    assert list(tmp_path.iterdir()) == []


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def rate(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def attack(eps):
    """As a defence makes it: eps is in the closure."""
    return lambda network, images, labels, step: ((images + eps).clamp(0, 1), labels)


def brighten(network, images, labels, step, eps=0.5):
    return (images + eps).clamp(0, 1), labels


EPS = 0.5


def by_global(network, images, labels, step):
    return helper(images), labels


def helper(images):
    return (images + EPS).clamp(0, 1)


class Defence(nn.Module):
    """Its setting is a plain attribute: neither in its state dict nor in its repr."""

    def __init__(self, eps):
        super().__init__()
        self.inner = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.inner.weight)
        self.eps = eps

    def batch(self, network, images, labels, step):
        return (images + self.eps).clamp(0, 1), labels

    def transform(self):
        return lambda *batch: self.batch(*batch)


@dataclass(frozen=True)
class Attack:
    eps: float

    def __call__(self, network, images, labels, step):
        return (images + self.eps).clamp(0, 1), labels


def scheduler(gamma):
    return lambda optimizer, total: lr_scheduler.ExponentialLR(optimizer, gamma)


def frozen(seed=0):
    network = small(seed)
    network[0].requires_grad_(False)
    return network


def hooked():
    network = small()
    network[0].register_forward_hook(lambda module, given_images, output: 2 * output)
    return network


CHANGES = {
    "epochs": ({"epochs": 2}, {"epochs": 3}),
    "batch size": ({}, {"batch_size": 60}),
    "seed": ({}, {"seed": 2}),
    "precision": ({"precision": "float32"}, {"precision": "bfloat16"}),
    "optimizer": ({}, {"optimizer": adam}),
    "optimizer's rate": ({"optimizer": rate(0.1)}, {"optimizer": rate(0.2)}),
    "partial optimizer": (
        {"optimizer": partial(rejection_sgd, rate=0.1)},
        {"optimizer": partial(rejection_sgd, rate=0.2)},
    ),
    "optimizer's later decay": (
        {"optimizer": partial(stepwise_sgd, steps=10)},
        {"optimizer": partial(stepwise_sgd, steps=20)},
    ),
    "scheduler": ({}, {"scheduler": scheduler(0.9)}),
    "scheduler's closure": ({"scheduler": scheduler(0.9)}, {"scheduler": scheduler(0.8)}),
    "transform": ({}, {"transform": brighten}),
    "transform's closure": ({"transform": attack(0.5)}, {"transform": attack(0.02)}),
    "partial transform": (
        {"transform": partial(brighten, eps=0.5)},
        {"transform": partial(brighten, eps=0.02)},
    ),
    "transform's object": ({"transform": Attack(0.5)}, {"transform": Attack(0.02)}),
    "transform's method": (
        {"transform": Defence(0.5).batch},
        {"transform": Defence(0.02).batch},
    ),
    "transform's module": (
        {"transform": Defence(0.5).transform()},
        {"transform": Defence(0.02).transform()},
    ),
    "validation": ({"validation": problem(64, 1)}, {"validation": problem(64, 2)}),
    "weights": ({}, {"network": lambda: small(9)}),
    "frozen layers": ({}, {"network": frozen}),
    "hooks": ({}, {"network": hooked}),
    "images": ({}, {"images": problem(320)[0].flip(0)}),
    "labels": ({}, {"labels": 1 - problem(320)[1]}),
}


def arguments(path, **change):
    images, labels = problem(320)
    options = {"epochs": 2, "batch_size": 64, "optimizer": sgd, "checkpoint": path, **change}
    network = options.pop("network", small)()
    return (network, options.pop("images", images), options.pop("labels", labels)), options


@pytest.mark.parametrize("changed", CHANGES)
def test_d6_only_the_same_training_resumes(tmp_path, eager, changed):
    """D6"""
    before, after = CHANGES[changed]
    path = tmp_path / "fit"
    data, options = arguments(path, **before)
    killed(5, *data, **options)
    kept = path.read_bytes()
    data, options = arguments(path, **{**before, **after})
    _, first, messages = resumed(*data, **options)
    assert first == 0 and "another training" in messages[0]
    path.write_bytes(kept)
    data, options = arguments(path, **before)
    _, first, messages = resumed(*data, **options)
    assert first == 4 and not messages


def test_d6_a_global_of_the_transforms_helper_counts(tmp_path, eager, monkeypatch):
    """D6, for scripts that keep their settings in globals."""
    data, options = arguments(tmp_path / "fit", transform=by_global)
    killed(5, *data, **options)
    monkeypatch.setattr(sys.modules[__name__], "EPS", 0.02)
    data, options = arguments(tmp_path / "fit", transform=by_global)
    assert resumed(*data, **options)[1] == 0


def test_d1_the_number_of_threads_counts_on_a_cpu(tmp_path, eager, monkeypatch):
    """D1"""
    data, options = arguments(tmp_path / "fit", device="cpu")
    killed(5, *data, **options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    data, options = arguments(tmp_path / "fit", device="cpu")
    assert resumed(*data, **options)[1] == 0


def test_a_transform_without_a_fingerprint_is_refused_only_with_a_checkpoint(tmp_path):
    stream = (number for number in range(9))

    def transform(network, images, labels, step):
        next(stream)
        return images, labels

    data, options = arguments(None, transform=transform)
    fit(*data, **options | {"epochs": 1})
    with pytest.raises(DemurError, match="generator cannot be fingerprinted"):
        fit(*data, **options | {"checkpoint": tmp_path / "fit"})


# Fingerprints

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 3), inner, max_size=3)
        | st.frozensets(ATOMS, max_size=3)
        | st.frozensets(ATOMS, max_size=3).map(set)
    ),
    max_leaves=6,
)


def canonical(value):
    """An independent text for each value, with its types."""
    if isinstance(value, dict):
        parts = sorted(f"{canonical(key)}: {canonical(held)}" for key, held in value.items())
    elif isinstance(value, set | frozenset):
        parts = sorted(map(canonical, value))
    elif isinstance(value, list | tuple):
        parts = list(map(canonical, value))
    else:
        parts = [repr(value)]
    return f"{type(value).__name__}({', '.join(parts)})"


@given(VALUES, VALUES)
@pytest.mark.slow
def test_digests_are_equal_where_values_are_equal(first, second):
    assert (fingerprint(first) == fingerprint(second)) == (canonical(first) == canonical(second))
    assert fingerprint(copy.deepcopy(first)) == fingerprint(first)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.randoms())
def test_the_order_of_a_dict_does_not_count(value, randomness):
    items = list(value.items())
    randomness.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(value)


def test_shared_parts_count_as_equal_parts():
    part = [1, 2]
    assert fingerprint([part, part]) == fingerprint([[1, 2], [1, 2]])


def deep(levels):
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


def test_shared_parts_are_hashed_once():
    assert fingerprint(deep(60)) != fingerprint(deep(61))


def cyclic(number):
    found = [number]
    found.append({"self": found})
    return found


def test_cycles_end():
    assert fingerprint(cyclic(1)) == fingerprint(cyclic(1)) != fingerprint(cyclic(2))


def tied(shares):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    if shares:
        second.weight = first.weight
    return nn.Sequential(first, second)


def test_modules_count_by_what_they_compute_and_learn():
    network = small()
    assert fingerprint(network) == fingerprint(copy.deepcopy(network).eval())
    assert fingerprint(network) == fingerprint(small().to(memory_format=torch.channels_last))
    assert fingerprint(Defence(0.5)) != fingerprint(Defence(0.02))
    torch.manual_seed(0)
    together = tied(True)
    torch.manual_seed(0)
    assert fingerprint(together) != fingerprint(tied(False))
    other = small()
    other[3].p = 0.4
    assert fingerprint(other) != fingerprint(network)


MAKERS = [
    lambda: torch.arange(3),
    lambda: torch.arange(3).reshape(3, 1),
    lambda: torch.arange(3).float(),
    lambda: torch.tensor([0, 1, 2], dtype=torch.bfloat16),
    lambda: torch.zeros(0),
    lambda: torch.tensor(1.0),
    lambda: torch.zeros(1).expand(4),
    lambda: torch.tensor([1j]).conj(),
    lambda: np.arange(3),
    lambda: np.arange(3.0),
    lambda: np.float32(1),
    lambda: np.array([1, "a"], dtype=object),
    lambda: torch.float32,
    lambda: torch.device("cpu"),
    lambda: torch.Generator().manual_seed(3),
    lambda: threading.RLock(),
    lambda: Path("a"),
    lambda: Attack(0.5),
    lambda: attack(0.5),
    lambda: partial(attack, 0.5),
    lambda: Attack(0.5).__call__,
    lambda: len,
    lambda: [].append,
    lambda: Attack,
    lambda: ast,
    lambda: 10**5000,
    lambda: "\ud800",
    lambda: slice(1, 2),
]


@pytest.mark.parametrize("make", MAKERS)
def test_digests_of_one_value_agree_and_differ_from_all_others(make):
    found = fingerprint(make())
    assert found == fingerprint(make())
    assert sum(fingerprint(other()) == found for other in MAKERS) == 1


def nested(levels):
    found = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "value",
    [
        (number for number in range(3)),
        memoryview(b"a"),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        nested(3000),
    ],
    ids=["generator", "memoryview", "meta", "sparse", "nested"],
)
def test_what_cannot_be_fingerprinted_is_one_clear_line(value):
    with pytest.raises(DemurError, match="cannot be fingerprinted"):
        fingerprint({"a": [value]})


ELSEWHERE = """
import sys
from test_training import *
from demur.networks import wide_resnet
assert isinstance(hash("a"), int)
print(fingerprint([
    {"b", "a", "c"}, frozenset("xyz"), {"b": 1, "a": {"d", "e"}}, attack(0.5), by_global, brighten,
    lambda x: x in {"p", "q", "r"}, partial(brighten, eps=1), Attack(0.5), Defence(0.5),
    Defence(1).batch, wide_resnet(widen=1, units=1), problem(10), stepwise_sgd, one_cycle, warm_up,
    Path("a"), torch.float32, torch.Generator().manual_seed(0), np.float32(1), cyclic(1), Killed,
    threading.Lock(), torch.relu, nn.functional.relu, Watch(), hooked(), loader().collate_fn,
]))
print("|".join({"alpha", "beta", "gamma", "delta"}))
"""


@pytest.mark.slow
def test_digests_are_the_same_in_every_process(tmp_path):
    found = set()
    for seed in ("0", "1"):
        done = run_python(ELSEWHERE, PYTHONHASHSEED=seed)
        found.add(tuple(done.splitlines()))
    assert len({first for first, _ in found}) == 1
    assert len({second for _, second in found}) > 1  # the processes do hash differently


def run_python(code, **environment):
    tests = Path(__file__).parent
    source = Path(demur.__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (source, tests)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_files_is_imported_and_used_without_torch():
    run_python(
        "import sys; from demur.files import fingerprint; fingerprint([1, {2}, len, lambda: 3]);"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )


# Hardware


def test_d37_only_commands_tell_malloc_to_keep_buffers():
    """D37"""
    source = Path(demur.__file__).parent
    users = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (getattr(node, "id", None), getattr(node, "attr", None))
            imported = {
                alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")
            }
            if "keep_buffers" in {*names, *imported}:
                users.add(path.relative_to(source).parts[0].removesuffix(".py"))
    # The engine ray calls it in worker processes of its own.
    assert users <= {"cli", "commands", "evaluation"}


@pytest.mark.slow
def test_d37_the_library_does_not_touch_malloc():
    """D37: mallopt is called by nothing but keep_buffers, and keep_buffers by nothing here."""
    code = """
import ctypes, torch
from torch import nn
from demur import Classifier, hardware
from demur.training import fit
calls = []
class Library:
    def mallopt(self, parameter, value):
        calls.append(parameter)
        return 1
network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
images, labels = torch.rand(8, 1, 4, 4), torch.zeros(8).long()
hardware.ctypes.CDLL = lambda name: Library()
Classifier(network, 2).predict(images)
fit(network, images, labels, epochs=1, device="cpu")
assert not calls, calls
hardware.sys.platform = "linux"
assert hardware.keep_buffers() and len(calls) == 3
"""
    run_python(code)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_d39_private_functions_of_torch_may_be_missing(monkeypatch, machine, error):
    """D39"""

    class Gone:
        def __getattr__(self, name):
            raise error(name)

    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    for name in ("cpu", "_C", "ops"):
        monkeypatch.setattr(hardware.torch, name, Gone())
    assert hardware._cpu_has_bfloat16() is False


def test_a_classifier_is_predicted_with_after_its_fit():
    network = small()
    fit(network, *problem(), epochs=3, batch_size=64, optimizer=sgd)
    images, labels = problem(seed=1)
    predicted = Classifier(network, 2).predict(images / 255)
    assert float((predicted == labels).float().mean()) > 0.9


def test_a_checkpoint_may_be_named_by_text(tmp_path):
    images, labels = problem(64)
    one, other = small(), small()
    fit(one, images, labels, epochs=1, batch_size=32, checkpoint=str(tmp_path / "c"))
    fit(other, images, labels, epochs=1, batch_size=32)
    assert torch.equal(weights(one), weights(other))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "options", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)), {}, "one row of scores"),
        (nn.Conv2d(1, 3, 1), {}, r"one row of scores .* not \(8, 3, 8, 8\)"),
        (small(), {"epochs": 1.5}, "epochs must be an integer"),
        (small(), {"epochs": True}, "epochs must be an integer"),
        (small(), {"batch_size": 8.0}, "batch_size must be an integer"),
    ],
)
def test_what_no_training_can_use_is_one_clear_line(network, options, said):
    images, labels = problem(16)
    with pytest.raises(DemurError, match=said):
        fit(network, images, labels, **{"epochs": 1, "batch_size": 8, **options})
