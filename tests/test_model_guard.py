"""The guard around a user's module: its images, its answers, its errors, its modes; and attacks
on odd modules. A number D is that of a reproduced defect of version 1.
"""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import demur
from demur import Classifier, DemurError, DemurWarning, ThreatModel, attacks, black_box, outcomes
from demur.attacks import DDN, FMN, PGD, CarliniWagnerL2, SigmaZero, Square, Strongest
from demur.classifier import evaluating, modes_kept
from demur.errors import ModuleError
from demur.evaluation.store import Store, computed
from demur.training import fit
from models import convolutional, images_of, linear

EXACT = {"precision": "float32"}


class Before(nn.Module):
    """A linear network behind a change of its input; it notes where its images lie in memory."""

    def __init__(self, change=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.change = change
        self.places = []

    def forward(self, images):
        self.places.append(images.data_ptr())
        return self.network(images if self.change is None else self.change(images))


def bits(images):
    return images.contiguous().view(torch.int64 if images.dtype == torch.float64 else torch.int32)


# Images


def test_d10_a_module_that_leaves_its_images_alone_is_copied_for_once():
    """Its first call is the probe; a copy at every call would make attacks slower."""
    module = Before()
    classifier = Classifier(module, 3).eval()
    images = images_of(4)
    for _ in range(3):
        classifier(images)
    assert module.places[0] != images.data_ptr()
    assert module.places[1:] == [images.data_ptr()] * 2
    assert not classifier.works_in_place


def by_numpy(images):
    images.detach().numpy()[...] *= 0.5  # torch does not count such a change
    return images


def by_clamp(images):
    return images.clamp_(0, 1)  # no pixel of the probe differs afterwards


@pytest.mark.parametrize("change", [lambda images: images.mul_(0.5), by_numpy, by_clamp])
def test_d10_attacks_on_a_module_that_works_in_place_are_valid(change):
    """R3."""
    classifier = Classifier(Before(change), 3)
    images = images_of(6)
    before = images.clone()
    labels = classifier.predict(images)
    for attack, threat in ((PGD(steps=5), "linf:0.1"), (DDN(steps=10), "l2"), (Square(9), "l2:1")):
        result = attack(classifier, images, labels, threat)
        found = classifier.predict(result.images) != labels
        assert torch.equal(found, result.success)
    assert torch.equal(images, before) and torch.equal(classifier.predict(images), labels)
    assert classifier.works_in_place


def test_d10_a_module_that_changes_its_images_later_is_refused_once():
    """It looked harmless when it was probed."""
    module = Before(lambda images: images.mul_(0.5) if len(images) == 3 else images)
    classifier = Classifier(module, 3)
    classifier.predict(images_of(4))
    with pytest.raises(ModuleError, match="changed its images in place, which it did not do"):
        classifier.predict(images_of(3))
    images = images_of(3)
    expected = module.network(images * 0.5).argmax(1)
    assert torch.equal(classifier.predict(images), expected)
    assert torch.equal(images, images_of(3))


def test_answers_in_one_memory_are_all_kept():
    """As those of a session with bound outputs."""

    class OneMemory(Before):
        def forward(self, images):
            return torch.mm(
                images.flatten(1), self.network[1].weight.T, out=self.out[: len(images)]
            )

    module = OneMemory()
    module.out = torch.zeros(2, 3)
    classifier = Classifier(module, 3)
    images = images_of(6)
    expected = images.flatten(1) @ module.network[1].weight.T
    torch.testing.assert_close(classifier.scores(images, 2), expected.detach())


# Answers and errors


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda scores: scores.to(torch.cfloat)])
def test_scores_that_are_no_dense_real_numbers_are_refused(change):
    class After(Before):
        def forward(self, images):
            return change(super().forward(images).detach())

    with pytest.raises(ModuleError, match="dense tensor of real numbers"):
        Classifier(After(), 3).predict(images_of(2))


def test_d29_counts_of_votes_are_scores():
    class Votes(Before):
        def forward(self, images):
            return (10 * super().forward(images)).long()

    classifier = Classifier(Votes(), 3)
    images = images_of(5)
    labels = classifier.predict(images)
    assert outcomes(classifier, images, labels).tolist() == [0] * 5
    result = Square(n_queries=20)(classifier, images, labels, "linf:0.3")
    assert torch.equal(classifier.predict(result.images) != labels, result.success)


class Failing(Before):
    """Raises an error of several lines for some batch sizes."""

    def __init__(self, fails, error=RuntimeError):
        super().__init__()
        self.fails = fails
        self.error = error

    def forward(self, images):
        if self.fails(len(images)):
            raise self.error(f"first line\n  {len(images)} images \x1b[31m")
        return super().forward(images)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, StopIteration])
def test_an_error_of_the_module_is_one_line_with_its_cause(error):
    classifier = Classifier(Failing(lambda count: count == 2, error), 3)
    said = r"^the module failed on float32 images of shape \(2, 1, 8, 8\): .*first line"
    labels = torch.tensor([0, 1])
    for call in (
        lambda: classifier.predict(images_of(2)),
        lambda: PGD(steps=2)(classifier, images_of(2), labels, "linf:0.1"),
        lambda: fit(classifier.module, images_of(2), labels, epochs=1, device="cpu"),
    ):
        with pytest.raises(ModuleError, match=said) as caught:
            call()
        assert isinstance(caught.value.__cause__, error)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_lack_of_memory_names_the_batch_size():
    classifier = Classifier(Failing(lambda count: count > 2, MemoryError), 3)
    with pytest.raises(ModuleError, match="3 images at once: use a smaller batch_size"):
        classifier.predict(images_of(3))
    assert len(classifier.predict(images_of(3), batch_size=2)) == 3


def test_an_error_in_the_backward_pass_is_one_line():
    def broken(images):
        grown = images.exp()
        return grown.add_(1)  # exp needs what it gave

    with pytest.raises(ModuleError, match="inplace operation"):
        PGD(steps=2)(Classifier(Before(broken), 3), images_of(2), torch.tensor([0, 1]), "linf:0.1")


# Modes


class Unwilling(Before):
    def train(self, mode=True):
        if not mode:
            raise ValueError("no evaluation mode")
        return super().train(mode)


def test_d9_a_module_whose_train_fails_is_refused_and_the_others_keep_their_modes():
    classifier = Classifier(Unwilling(), 3).train()
    with pytest.raises(ModuleError, match="no evaluation mode"):
        classifier.predict(images_of(1))
    assert all(part.training for part in classifier.modules())


def test_modes_are_kept_while_another_thread_evaluates():
    """R3. The two blocks overlap, as they do in two threads, in both orders."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    for outer, inner in ((modes_kept, evaluating), (evaluating, modes_kept)):
        network.train()
        first, second = outer(network), inner(network)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert network.training == (outer is evaluating)
        second.__exit__(None, None, None)
        assert all(part.training for part in network.modules())


def test_d8_threads_attack_one_classifier_one_after_the_other():
    """An attack lays out weights anew and freezes them: a second one must not see that."""
    classifier = convolutional(3).train()
    images = images_of(8)
    labels = classifier.predict(images)
    attack = PGD(steps=8, random_start=True)
    expected = attack(classifier, images, labels, "linf:0.05").candidates
    places = [parameter.data_ptr() for parameter in classifier.parameters()]
    wrong = []

    def work():
        for _ in range(3):
            found = attack(classifier, images, labels, "linf:0.05")
            if not torch.equal(found.candidates, expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [parameter.data_ptr() for parameter in classifier.parameters()] == places
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(part.training for part in classifier.modules())


def test_a_training_inside_no_grad_learns_and_inference_mode_is_refused():
    images = images_of(32)
    labels = images.flatten(1).mean(1).gt(0.5).long()
    weights = []
    for mode in (torch.enable_grad, torch.no_grad):
        network = Before().network
        with mode():
            fit(network, images, labels, epochs=1, batch_size=8, device="cpu", precision="float32")
        weights.append(network[1].weight.detach())
    assert torch.equal(*weights)
    with torch.inference_mode(), pytest.raises(DemurError, match="a training needs gradients"):
        fit(Before().network, images, labels, epochs=1)


# Gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_d2_an_ensemble_without_gradients_warns_and_says_so(mode):
    class Without(Before):
        def forward(self, images):
            with mode():
                return super().forward(images)

    images = images_of(6)
    plain = Classifier(Before(), 3)
    labels = plain.predict(images)
    ensemble = Strongest(steps=5, n_queries=20)
    with pytest.warns(DemurWarning, match="no gradient: of the ensemble, Square alone"):
        result = ensemble(Classifier(Without(), 3), images, labels, "linf:0.02")
    assert result.scores_only
    assert all(name.startswith("Square") for name in result.by if name)
    assert not ensemble(plain, images, labels, "linf:0.02").scores_only


def test_d2_weights_that_were_made_in_inference_mode_stay_as_they_are():
    with torch.inference_mode():
        classifier = convolutional(3)
    images = images_of(3)
    labels = classifier.predict(images)
    result = Square(n_queries=9)(classifier, images, labels, "linf:0.1")
    assert torch.equal(classifier.predict(result.images) != labels, result.success)
    with pytest.raises(ModuleError, match="Inference tensors cannot be saved"):
        PGD(steps=2)(classifier, images, labels, "linf:0.1")
    assert all(one.is_inference() and one.requires_grad for one in classifier.parameters())


# Pixels


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d26_denormal_pixels_keep_their_bits_where_nothing_may_change(norm, masked, dtype):
    images = images_of(6).to(dtype)
    images[:, :, 0] = torch.finfo(dtype).tiny / 3
    images[:, :, 1] = -0.0
    images[:, :, 2] = 2e-37
    assert images[0, 0, 0, 0] > 0
    classifier = linear(3, 64, 3)
    labels = classifier.predict(images)
    mask = torch.ones(1, 8, 8)
    mask[:, :3] = 0
    eps = {"linf": 0.3, "l2": 2.0, "l1": 8.0, "l0": 9.0}[norm]
    hit = 0
    for limit in (eps, eps * 1e-38):
        threat = ThreatModel(norm, limit, mask=mask if masked else None)
        result = PGD(steps=4, random_start=True)(classifier, images, labels, threat, **EXACT)
        hit += int(result.success.sum())
        changed = bits(result.candidates) != bits(images)
        assert not masked or not changed[:, :, :3].any()
        failures = ~result.success
        assert torch.equal(bits(result.images)[failures], bits(images)[failures])
        if norm == "l0":
            counted = (result.images != images).flatten(1).sum(1).double()
            assert torch.equal(counted[result.success], result.distance[result.success])
    assert hit
    if norm == "l0":
        found = SigmaZero(steps=30)(classifier, images, labels, threat, **EXACT)
        assert not masked or torch.equal(bits(found.candidates)[:, :, :3], bits(images)[:, :, :3])


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_images", [torch.float32, torch.float64])
def test_d27_attacks_on_modules_of_another_precision_decide_as_predict_does(dtype, of_images):
    classifier = linear(3, 64, 3).to(dtype)
    images = images_of(6).to(of_images)
    labels = classifier.predict(images)
    for attack, threat in (
        (PGD(steps=5), "linf:0.1"),
        (FMN(steps=10), "linf"),
        (CarliniWagnerL2(search_steps=2, steps=10), "l2"),
    ):
        result = attack(classifier, images, labels, threat)
        assert result.images.dtype == of_images and bool(result.success.any())
        assert bool((classifier.predict(result.images) != labels)[result.success].all())


def test_d27_the_default_type_of_the_caller_may_be_float64():
    images = images_of(6)
    single = linear(3, 64, 3)
    expected = single.predict(images)
    torch.set_default_dtype(torch.float64)
    try:
        classifier = Classifier(Before(), 3)  # of double weights
        assert torch.equal(single.predict(images), expected)
        for one in (classifier, single):
            labels = one.predict(images)
            for attack, threat in ((PGD(steps=5), "linf:0.1"), (DDN(steps=9), "l2")):
                result = attack(one, images, labels, threat)
                assert bool((one.predict(result.images) != labels)[result.success].all())
        history = fit(classifier.module, images, labels, epochs=1, batch_size=3, device="cpu")
        assert history[0].loss > 0
    finally:
        torch.set_default_dtype(torch.float32)


# Graphs


def made(kind, plain, images):
    if kind == "scripted":
        return torch.jit.script(plain)
    if kind == "frozen":
        return torch.jit.freeze(torch.jit.script(plain))
    if kind == "compiled":
        return torch.compile(plain, backend="eager")
    if kind == "parametrised":
        nn.utils.parametrizations.weight_norm(plain[1])
        return plain
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    return torch.export.export(plain, (images,), dynamic_shapes=(batch,)).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "frozen", "exported", "compiled", "parametrised"])
def test_d28_modules_that_are_graphs_are_attacked_as_the_plain_one(kind):
    images = images_of(6)
    plain = Before().network.eval()
    labels = Classifier(plain, 3).predict(images)
    attack = PGD(steps=5)
    expected = attack(Classifier(plain, 3), images, labels, "linf:0.02", **EXACT)
    classifier = Classifier(made(kind, plain, images), 3)
    result = attack(classifier, images, labels, "linf:0.02", **EXACT)
    assert torch.equal(result.success, expected.success)
    torch.testing.assert_close(result.candidates, expected.candidates)
    with evaluating(classifier):
        assert torch.equal(classifier.predict(images), labels)


def test_d30_a_black_box_of_one_image_at_a_time_is_attacked_with_batches_of_one():
    def one(array):
        if len(array) != 1:
            raise ValueError("one image, please")
        return array.reshape(1, -1)[:, :3]

    classifier = black_box(one, 3)
    images = images_of(5)
    labels = images.flatten(1)[:, :3].argmax(1)
    result = Square(n_queries=30)(classifier, images, labels, "linf:0.5", batch_size=1)
    found = classifier.predict(result.images, 1) != labels
    assert bool(result.success.any()) and torch.equal(found, result.success)
    with pytest.raises(ModuleError, match="one image, please"):
        Square(n_queries=3)(classifier, images, labels, "linf:0.5", batch_size=2)


def test_d31_attributes_of_the_user_may_have_the_names_of_demurs_own():
    class Named(Before):
        widened = 2.0
        wider_kernels = "mine"

    classifier = Classifier(Named(), 3)
    images = images_of(4)
    labels = classifier.predict(images)
    ensemble = Strongest(steps=4, n_queries=5)
    members = ensemble.attacks_for("linf:0.1", classifier, images)
    assert not any(isinstance(one, attacks.WithWiderKernels) for one in members)
    ensemble(classifier, images, labels, "linf:0.1")
    assert (classifier.module.widened, classifier.module.wider_kernels) == (2.0, "mine")


# The store, and what is imported


def test_d32_the_store_takes_half_precision_and_shared_tensors_and_gives_one_type(tmp_path):
    whole = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    tensors = {
        "whole": whole,
        "again": whole,
        "part": whole[:1],
        "turned": whole.T,
        "half": whole.half(),
        "nothing": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
    }
    values = {"pair": (1, 2), "by number": {1: "a", 2: ("b",)}, "text": "c"}
    fresh = computed("a key", (values, tensors), seconds=0.0)
    Store(tmp_path).write(fresh, {"a": 1})
    results = fresh, stored = fresh, Store(tmp_path).read("a key")
    assert fresh.values == stored.values
    assert fresh.values["pair"] == [1, 2] and fresh.values["by number"] == {"1": "a", "2": ["b"]}
    for name, tensor in tensors.items():
        for result in results:
            assert result.tensors[name].dtype == tensor.dtype
            assert torch.equal(result.tensors[name], tensor)


def test_d38_fabric_comes_without_the_rest_of_lightning():
    text = Path(demur.__file__).parents[2].joinpath("pyproject.toml").read_text()
    needed = re.findall(r'^  "([\w-]+)', text, re.MULTILINE)
    assert "lightning-fabric" in needed
    assert not {"lightning", "pytorch-lightning", "torchmetrics"} & set(needed)
    source = "\n".join(path.read_text() for path in Path(demur.__file__).parent.rglob("*.py"))
    assert not re.search(r"^\s*(from|import) (lightning|pytorch_lightning)\b", source, re.MULTILINE)


def test_d39_private_functions_of_torch_are_asked_in_one_file():
    private = re.compile(r"\._version\b|_bf16_supported|_has_mkldnn")
    source = Path(demur.__file__).parent
    users = [path for path in source.rglob("*.py") if private.search(path.read_text())]
    assert [path.relative_to(source).as_posix() for path in users] == ["hardware.py"]


def test_d39_where_torch_counts_no_changes_every_call_gets_a_copy(monkeypatch):
    monkeypatch.setattr("demur.classifier.guard.changes_of", lambda images: None)
    module = Before(lambda images: images.mul_(0.5) if len(images) == 3 else images)
    classifier = Classifier(module, 3)
    classifier.predict(images_of(4))
    images = images_of(3)
    assert torch.equal(classifier.predict(images), classifier.predict(images))
    assert np.array_equal(images.numpy(), images_of(3).numpy())
