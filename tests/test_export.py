"""Exported graphs decide as the original, for every defence; what cannot be exported is named."""

import json

import pytest
import torch
from torch import nn

import demur
import test_bundles
from command import demur as command
from demur import Classifier, DemurError
from demur.classifier import Preprocess
from demur.commands.export import export as export_command
from demur.defenses import ConfidenceThreshold, DeepNeuralRejection, MedianBlur
from demur.loading import export as exporting
from demur.loading import load_model, save_model
from demur.loading.export import Parity, ParityError, export, parity_images

QUICK = ["background", "max-prob"]
SLOW = ["margin", "energy", "median 7", "moved threshold"]
SLOW += [one for one in test_bundles.KINDS if one not in QUICK]
SHAPE = (1, 28, 28)


def made(kind):
    if kind in ("max-prob", "margin", "energy"):
        inner = test_bundles.small()
        images, labels = test_bundles.train()
        return ConfidenceThreshold(inner, 10, score=kind).fit(images, labels, 0.3)
    if kind == "median 7":
        return MedianBlur(Classifier(test_bundles.small(11), 10), 10, 7)
    if kind == "moved threshold":
        found = test_bundles.made("background")
        found.set_threshold(0.25)
        return found
    found = test_bundles.made(kind)
    if kind == "deep neural rejection":
        # Its threshold is the score of an image, and that of all images far from the digits.
        found.set_threshold(found.threshold - 1e-4)
    return found


def check(classifier, path, form):
    images = parity_images(SHAPE)
    parity = export(classifier.eval(), path, form, SHAPE, images)
    assert parity.n == parity.equal == 256
    assert parity.close, str(parity)
    assert path.is_file() and [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", QUICK)
def test_torch_export_decides_as_the_original(kind, tmp_path):
    check(made(kind), tmp_path / "m.pt2", "pt2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_torch_export_decides_as_the_original_of_each_defence(kind, tmp_path):
    check(made(kind), tmp_path / "m.pt2", "pt2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_onnx_decides_as_the_original(kind, tmp_path):
    check(made(kind), tmp_path / "m.onnx", "onnx")


@pytest.mark.slow
def test_a_nested_defence_decides_as_the_original_in_onnx_for_any_number_of_images(tmp_path):
    import onnx
    import onnxruntime

    classifier = test_bundles.made("combined")
    classifier.class_names = tuple("abcdefghij")
    classifier.preprocess = Preprocess((28, 28), channels=1)
    check(classifier, tmp_path / "m.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_inputs()[0].name == "images" and session.get_outputs()[0].name == "scores"
    for n in (1, 5):
        images = parity_images(SHAPE, n)
        (scores,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(scores), classifier.scores(images), atol=1e-4)
    about = {one.key: one.value for one in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(about["class_names"]) == list("abcdefghij")
    assert json.loads(about["preprocess"])["size"] == [28, 28] and about["rejects"] == "true"


@pytest.mark.slow
def test_normalisation_and_pooled_machines_are_in_the_graph(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    network.append(nn.Linear(32, 4))
    preprocess = Preprocess((12, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    classifier = demur.wrap(network.eval(), preprocess=preprocess)
    images = parity_images((3, 12, 12), 60)
    labels = torch.arange(60) % 4
    layers = ["module.network.1", "module.network.3"]
    options = {"gamma": "scale", "combiner_gamma": "scale", "max_features": 100}
    deep = DeepNeuralRejection(classifier, 4, layers, threshold=0.3, **options).fit(images, labels)
    assert deep.machines_[0].support.shape[1] == 72  # 8 channels of 3 x 3 windows
    deep.save(tmp_path / "b")
    assert torch.equal(load_model(tmp_path / "b", network).scores(images), deep.scores(images))
    for form in ("pt2", "onnx"):
        parity = export(deep, tmp_path / f"m.{form}", form, (3, 12, 12), parity_images((3, 12, 12)))
        assert parity.equal == 256 and parity.close


class Special(nn.Module):
    """An operation that ONNX does not have."""

    def forward(self, images):
        return torch.special.bessel_j0(images.flatten(1)[:, :3])


class Branching(nn.Module):
    """A decision in Python, which no graph can hold."""

    def forward(self, images):
        scores = images.flatten(1)[:, :3]
        return scores if float(images.sum()) > 0 else -scores


def test_what_a_format_does_not_have_is_named(tmp_path):
    images = parity_images((1, 4, 4), 8)
    for module, form, said in (
        (Special(), "onnx", "ONNX cannot hold this model: it has no operation .*bessel_j0"),
        (Branching(), "pt2", r"torch.export cannot hold this model: \w+"),
    ):
        classifier = Classifier(module, 3)
        with pytest.raises(DemurError, match=said) as error:
            export(classifier, tmp_path / "m", form, (1, 4, 4), images)
        assert "\n" not in str(error.value)
    with pytest.raises(DemurError, match="unknown format 'onx'"):
        export(classifier, tmp_path / "m", "onx", (1, 4, 4), images)
    assert not list(tmp_path.iterdir())


def test_another_decision_is_found_and_nothing_is_written(tmp_path, monkeypatch):
    """Negative control."""
    classifier = Classifier(test_bundles.small(), 10)
    classifier.preprocess = Preprocess((28, 28), channels=1)
    save_model(classifier, tmp_path / "b")
    original = exporting._pt2_module
    monkeypatch.setattr(
        exporting, "_pt2_module", lambda path: lambda images: -original(path)(images)
    )
    with pytest.raises(ParityError, match="decisions are equal"):
        export_command(tmp_path / "b", "pt2")
    done = command("export", tmp_path / "b", "--format", "pt2")
    assert done.returncode == 1 and "was not written" in done.stderr
    assert not (tmp_path / "b" / "model.pt2").exists()


def test_images_on_the_threshold_are_said_to_be_so():
    expected = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    found = expected + torch.tensor([0.0, 0.0, 1e-7])
    parity = exporting._compared(expected, found, 2)
    assert parity.equal == 1 and parity.ties and "on the threshold" in str(parity)
    parity = exporting._compared(expected, -expected, 2)
    assert parity.equal < 2 and not parity.ties


def test_the_command_writes_into_the_bundle_and_says_the_difference(tmp_path):
    classifier = Classifier(test_bundles.small(), 10)
    classifier.preprocess = Preprocess((28, 28), channels=1)
    save_model(classifier, tmp_path / "b")
    done = command("export", tmp_path / "b", "--format", "pt2", "--data", "digits")
    assert done.returncode == 0 and "256 of 256 decisions are equal" in done.stdout
    assert (tmp_path / "b" / "model.pt2").is_file()
    load_model(tmp_path / "b")
    classifier.preprocess = None
    save_model(classifier, tmp_path / "c")
    done = command("export", tmp_path / "c")
    assert done.returncode == 2 and "give --img-size N, or --data DATA" in done.stderr


def test_a_wrong_request_is_said_before_the_model_is_loaded(tmp_path):
    (tmp_path / "net.py").write_text("def make():\n    raise ValueError('loaded')")
    source = f"py:{tmp_path / 'net.py'}:make"
    for words, said in (
        (["--format", "onx"], "unknown format 'onx'. Did you mean 'onnx'"),
        (["--format", "pt2", "--data", "nowhere/"], "there is no folder nowhere/."),
        (["--format", "pt2"], "loaded"),  # negative control
    ):
        done = command("export", source, *words)
        assert done.returncode == 2 and said in done.stderr
        assert ("loaded" in done.stderr) == (said == "loaded")


def test_the_data_give_the_size_of_a_model_that_says_none(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))\n"
    )
    words = ["export", f"py:{tmp_path / 'net.py'}:make", "--format", "pt2"]
    words += ["--out", tmp_path / "model.pt2"]
    done = command(*words)
    assert done.returncode == 2 and "--img-size N" in done.stderr
    assert command(*words, "--data", "digits").returncode == 0
    assert (tmp_path / "model.pt2").is_file()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(exporting, "import_module", missing)
    with pytest.raises(DemurError, match=r"needs the package onnxruntime: pip install"):
        export(Classifier(Special(), 3), tmp_path / "m", "onnx", (1, 4, 4), torch.rand(2, 1, 4, 4))


def test_the_tolerance_is_relative_to_large_scores():
    assert Parity(1, 1, 9e-5, 1.0).close and not Parity(1, 1, 2e-4, 1.0).close
    assert Parity(1, 1, 2e-4, 10.0).close
