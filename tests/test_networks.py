import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import parallel_fit
from demur import DemurError
from demur.networks import adadelta, background_class_network, fit, localized_network, rejection_network, stepwise_sgd, wide_network
from demur.progress import Silent, reporting


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
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 2))


def weights(network):
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


def test_the_network_is_table_2_of_the_background_class_paper():
    for outputs in (10, 11):
        network = background_class_network(outputs)
        kinds = " ".join(type(layer).__name__ for layer in network)
        convolutional = "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d MaxPool2d ReLU Flatten"
        assert kinds == f"Centre {convolutional} Linear BatchNorm1d ReLU Linear BatchNorm1d"
        learnt = sum(parameter.numel() for parameter in network.parameters())
        by_hand = (9 * 32 + 32) + 64 + (9 * 32 * 64 + 64) + 128 + (9216 * 128 + 128) + 256 + (128 * outputs + outputs) + 2 * outputs
        assert learnt == by_hand
        assert network.eval()(torch.rand(2, 1, 28, 28)).shape == (2, outputs)
    with pytest.raises(DemurError, match="even size"):
        background_class_network(10, size=27)


def test_the_localized_network_is_that_of_madrys_mnist_challenge():
    network = localized_network(seed=1)
    learnt = [tuple(parameter.shape) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert learnt == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert float(network[7].weight.abs().max()) <= 0.2 and bool((network[7].bias == 0.1).all())
    assert float(network[7].weight.std()) == pytest.approx(0.088, rel=0.02)  # a normal's, cut at two deviations
    assert torch.equal(network[0].weight, localized_network(seed=1)[0].weight)
    assert localized_network(4, channels=3, size=32)(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(DemurError, match="divisible by 4"):
        localized_network(size=30)


def test_the_wide_network_is_w32_10():
    """Five units of two convolutions in each of three groups, one convolution before and one layer after: 32; 46 million weights."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in wide_network().parameters()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == pytest.approx(45.9e6, rel=0.01)
    small = wide_network(7, widen=1, units=2, seed=2).eval()
    images = torch.rand(3, 3, 32, 32)
    assert small(images).shape == (3, 7)
    torch.testing.assert_close(small(0.5 * images + 0.1), small(images), rtol=1e-3, atol=1e-4)  # each image is standardized
    assert sum(isinstance(layer, nn.Conv2d) for layer in small.modules()) == 1 + 3 * 2 * 2
    flat = small(torch.full((1, 3, 32, 32), 0.5))
    assert bool(torch.isfinite(flat).all())


def test_stepwise_descent_slows_down_after_a_half_and_three_quarters():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = stepwise_sgd([weight], steps=8, rate=0.1)
    rates = []
    for _ in range(8):
        weight.grad = torch.ones(1)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_the_rejection_network_is_table_1_of_the_rejection_paper():
    network = rejection_network(seed=3)
    shapes = [tuple(parameter.shape) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 1, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (200, 3136), (200, 200), (10, 200)]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert float(network[7].weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    limit = (6 / (3136 + 200)) ** 0.5  # Glorot & Bengio 2010, eq. 16
    assert 0.99 * limit < float(network[11].weight.detach().abs().max()) <= limit
    assert torch.equal(network[0].weight, rejection_network(seed=3)[0].weight)
    assert sum(isinstance(layer, torch.nn.Dropout) for layer in network) == 1
    for options in ({"num_outputs": 1}, {"size": 30}):
        with pytest.raises(DemurError, match="rejection network"):
            rejection_network(**options)


def test_pooling_before_the_rectifier_is_the_same_network():
    network = background_class_network(10).eval()
    printed = list(network)
    printed[6], printed[7] = printed[7], printed[6]
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(network(images), nn.Sequential(*printed)(images))


@pytest.mark.parametrize("outputs", [0, 1])
def test_a_network_without_a_choice_is_refused(outputs):
    with pytest.raises(DemurError, match="at least 2 outputs"):
        background_class_network(outputs)


def test_pixels_are_centred_inside_the_network():
    assert torch.equal(background_class_network(10)[0](torch.tensor([0.0, 0.25, 1.0])), torch.tensor([-0.5, -0.25, 0.5]))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = background_class_network(10, seed=3)
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(background_class_network(10, seed=3)))
    assert not torch.equal(weights(first), weights(background_class_network(10, seed=4)))


def test_adadelta_is_the_papers():
    (group,) = adadelta([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["rho"], group["eps"]) == (1.0, 0.95, 1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fitting_learns_and_leaves_evaluation_mode_and_float32_weights(precision):
    images, labels = problem()
    network = small()
    history = fit(network, images, labels, epochs=5, batch_size=64, optimizer=sgd, precision=precision)
    assert len(history) == 5 and history[-1].loss < history[0].loss and history[-1].accuracy > 0.95
    assert not network.training and all(parameter.dtype == torch.float32 for parameter in network.parameters())
    test_images, test_labels = problem(seed=1)
    assert float((network(test_images / 255).argmax(1) == test_labels).float().mean()) > 0.97


def test_one_float32_step_is_plain_pytorch():
    images, labels = problem(64)
    ours, plain = small().requires_grad_(True), small()
    ours[3].p = plain[3].p = 0.0
    fit(ours, images, labels, epochs=1, batch_size=64, optimizer=sgd, precision="float32")
    optimizer = sgd(plain.train().parameters())
    nn.functional.cross_entropy(plain(images.float() / 255), labels).backward()
    optimizer.step()
    assert torch.allclose(weights(ours), weights(plain), atol=1e-6)


def test_same_seed_same_weights_and_uint8_or_float_alike():
    images, labels = problem()
    fitted = []
    for given, seed in ((images, 5), (images / 255, 5), (images, 6)):
        network = small()
        fit(network, given, labels, epochs=2, batch_size=64, optimizer=sgd, seed=seed)
        fitted.append(weights(network))
    assert torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[0], fitted[2])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [7, 13, 18, 26])
def test_a_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, killed_at):
    """R10: also inside an epoch, with dropout, momentum and batch statistics."""
    monkeypatch.setattr("demur.networks.training.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("demur.networks.training.CHECK_STEPS", 3)
    images, labels = problem()
    settings = {"epochs": 3, "batch_size": 64, "optimizer": sgd, "seed": 1}
    whole = small()
    history = fit(whole, images, labels, **settings)

    def kill(network, given, given_labels, step):
        if step == killed_at:
            raise Killed
        return given, given_labels

    broken, checkpoint = small(), tmp_path / "fit.checkpoint"
    with pytest.raises(Killed):
        fit(broken, images, labels, **settings, transform=kill, checkpoint=checkpoint)
    assert checkpoint.exists()
    steps = []
    resumed = small()

    def watch(network, given, given_labels, step):
        steps.append(step)
        return given, given_labels

    again = fit(resumed, images, labels, **settings, transform=watch, checkpoint=checkpoint)
    assert steps[0] > 0 and not checkpoint.exists()
    assert torch.equal(weights(whole), weights(resumed)) and again == history


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("content", ["", "rubbish", "other weights", "another optimizer"])
def test_a_broken_or_foreign_checkpoint_is_ignored(tmp_path, monkeypatch, content):
    images, labels = problem(128)
    checkpoint = tmp_path / "fit.checkpoint"
    if content.startswith(("other", "another")):
        monkeypatch.setattr("demur.networks.training.CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr("demur.networks.training.CHECK_STEPS", 1)

        def kill(network, given, given_labels, step):
            if step == 1:
                raise Killed
            return given, given_labels

        start, optimizer = (small(seed=9), sgd) if content == "other weights" else (small(), adam)
        with pytest.raises(Killed):
            fit(start, images, labels, epochs=1, batch_size=64, optimizer=optimizer, transform=kill, checkpoint=checkpoint)
        assert checkpoint.exists()
    else:
        checkpoint.write_text(content)
    network, plain = small(), small()
    fit(network, images, labels, epochs=1, batch_size=64, optimizer=sgd, checkpoint=checkpoint)
    fit(plain, images, labels, epochs=1, batch_size=64, optimizer=sgd)
    assert torch.equal(weights(network), weights(plain))


def test_a_transform_changes_what_is_trained_on():
    images, labels = problem()
    seen = []

    def swap(network, given, given_labels, step):
        assert network.training and float(given.max()) <= 1
        seen.append(step)
        return given, 1 - given_labels

    network = small()
    fit(network, images, labels, epochs=3, batch_size=64, optimizer=sgd, transform=swap)
    assert seen == list(range(27))
    assert float((network(images / 255).argmax(1) == 1 - labels).float().mean()) > 0.95


def test_each_epoch_leaves_other_images_out():
    images, labels = problem(70)
    sums = []

    def keep(network, given, given_labels, step):
        sums.append(given.sum().item())
        return given, given_labels

    fit(small(), images, labels, epochs=3, batch_size=64, optimizer=sgd, transform=keep)
    assert len(set(sums)) == 3


def test_a_loss_that_is_not_finite_names_the_step():
    images, labels = problem()

    def poison(network, given, given_labels, step):
        return (given * torch.nan if step == 4 else given), given_labels

    with pytest.raises(DemurError, match="not finite at step 4"):
        fit(small(), images, labels, epochs=2, batch_size=64, optimizer=sgd, transform=poison)


def test_the_callers_random_state_and_denormals_are_left_alone():
    images, labels = problem(64)
    state = torch.get_rng_state()
    fit(small(), images, labels, epochs=1, batch_size=64, optimizer=sgd)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.tensor([1e-39]) * torch.tensor([1.0])).item() > 0


def test_progress_and_loss_are_reported():
    class Listening(Silent):
        total, done, notes = 0.0, 0.0, ()

        def start(self, job, total):
            self.total = total
            return 0

        def advance(self, job, amount, note):
            self.done += amount
            self.notes += (note,)

    listening = Listening()
    with reporting(listening):
        fit(small(), *problem(256), epochs=2, batch_size=64, optimizer=sgd)
    assert listening.done == listening.total == 8 and "loss" in listening.notes[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.tensor([0, 1])}, "one label for each"),
        ({"labels": torch.tensor([0, 1] * 31 + [0, 5])}, "a label is 5, but the network has 2 outputs"),
        ({"labels": torch.full((64,), -1)}, "from 0 up"),
        ({"epochs": 0}, "at least 1"),
        ({"device": "gpu"}, "unknown device"),
        ({"precision": "float16"}, "precision"),
        ({"images": torch.rand(64, 1, 8, 8) + 1}, "lie in"),
    ],
)
def test_bad_input_ends_at_the_boundary(change, said):
    images, labels = problem(64)
    given = {"images": images, "labels": labels, "epochs": 1, "batch_size": 32, **change}
    with pytest.raises(DemurError, match=said):
        fit(small(), given.pop("images"), given.pop("labels"), **given)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DemurError, match="no CUDA GPU"):
        fit(small(), *problem(64), epochs=1, device="cuda")


def test_two_processes_train_as_one_does(tmp_path):
    """Data parallelism: each rank takes its share of each batch, and the weights and the history are those of one process."""
    out = tmp_path / "fit.pt"
    done = subprocess.run([sys.executable, Path(parallel_fit.__file__), out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    together = torch.load(out, weights_only=True)
    alone = parallel_fit.network()
    images, labels = parallel_fit.problem()
    history = fit(alone, images, labels, epochs=2, batch_size=64, optimizer=parallel_fit.sgd, precision="float32")
    assert torch.allclose(weights(alone), torch.cat([value.flatten().double() for value in together["weights"].values()]), atol=1e-6)
    assert together["losses"] == pytest.approx([epoch.loss for epoch in history], abs=1e-6)
