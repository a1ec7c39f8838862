"""Bundles: defences come back with equal scores, and damaged files are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from demur import Classifier, DemurError, data, networks
from demur.attacks import PGD, masks
from demur.defenses import (
    AdversarialTraining,
    BackgroundClass,
    CertifiedConsistency,
    DeepNeuralRejection,
    EitherRejects,
    GaussianBlur,
    LocalizedAdversarialTraining,
    MedianBlur,
    NeuralRejection,
)
from demur.defenses.saving import CONFIG, WEIGHTS
from demur.files import file_digest
from demur.loading import load_model, save_model
from demur.threat import ThreatModel

FEW = {"epochs": 1, "batch_size": 16}
MASK = masks.outside(masks.centre_box((28, 28), 14, 14))
KINDS = [
    "plain",
    "background",
    "adversarial",
    "adversarial, masked",
    "localized",
    "gaussian",
    "median",
    "neural rejection",
    "deep neural rejection",
    "blur under rejection",
    "combined",
    "certified consistency",
]


def small(outputs=10, seed=0):
    return networks.localized_network(outputs, size=28, seed=seed)


def train():
    found = data.load("digits", "train")
    return found.images[:128], found.labels[:128]


def test_images():
    return data.load("digits", "test").to_float()[:40]


test_images.__test__ = False


def made(name):
    images, labels = train()
    attack = PGD(steps=2)
    if name == "plain":
        return Classifier(small(11), 10, rejects=True)
    if name == "background":
        return BackgroundClass(small(11), 10).fit(images, labels, 255 - images[:20], **FEW)
    if name == "adversarial":
        return AdversarialTraining(small(), 10, attack, "linf:8/255").fit(images, labels, **FEW)
    if name == "adversarial, masked":
        threat = ThreatModel("l2", 1.5, mask=MASK)
        options = {"adversarial_fraction": 0.5, "mask_after_attack": True}
        return AdversarialTraining(small(), 10, attack, threat, **options).fit(
            images, labels, **FEW
        )
    if name == "localized":
        trained = LocalizedAdversarialTraining(small(), 10, attack, "linf:0.3", mask=MASK)
        return trained.fit(images, labels, **FEW)
    if name == "gaussian":
        return GaussianBlur(small(), 10, 1.25).fit(images, labels, **FEW)
    if name == "median":
        return MedianBlur(small(), 10, 5).fit(images, labels, **FEW)
    if name == "neural rejection":
        rejecting = NeuralRejection(small(), 10, "7", scores="decision", threshold=-0.25)
        return rejecting.fit(images, labels)
    if name == "deep neural rejection":
        options = {"C": [1.0, 10], "gamma": 1, "false_rejection_rate": 0.25, "folds": 3}
        return DeepNeuralRejection(small(), 10, ["4", "7"], **options).fit(images, labels)
    if name == "certified consistency":
        network = networks.certified_cnn(10)
        labels = Classifier(network, 10).predict(images / 255)
        return CertifiedConsistency(network, 10, false_rejection_rate=0.3).fit(images, labels)
    blurred = GaussianBlur(small(11), 10, 1.0).fit(images, labels, **FEW)
    layers = ["module.network.4", "module.network.7"]
    deep = DeepNeuralRejection(blurred, 10, layers, C=1.0, threshold=0.05).fit(images, labels)
    return deep if name == "blur under rejection" else EitherRejects(deep, blurred)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each kind, made and saved once."""
    root = tmp_path_factory.mktemp("bundles")
    found = {}

    def get(name):
        if name not in found:
            classifier = made(name)
            folder = root / name
            save_model(classifier, folder)
            found[name] = classifier, folder
        return found[name]

    return get


@pytest.mark.parametrize("name", KINDS)
def test_what_was_saved_comes_back_with_equal_scores(saved, name):
    classifier, folder = saved(name)
    images = test_images()
    again = load_model(folder)
    assert type(again) is type(classifier)
    assert torch.equal(again.scores(images), classifier.scores(images))
    assert torch.equal(again.predict_proba(images), classifier.predict_proba(images))
    assert again.rejects == classifier.rejects and again.threshold == classifier.threshold
    assert not any(part.training for part in again.modules())
    before, after = classifier.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if hasattr(classifier, "hyperparameters"):
        assert again.hyperparameters() == classifier.hyperparameters()
        assert again.learned() == classifier.learned()
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", ["background", "blur under rejection", "combined"])
def test_a_loaded_model_is_saved_to_the_same_files(saved, name, tmp_path):
    _, folder = saved(name)
    save_model(load_model(folder), tmp_path)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", ["background", "gaussian", "neural rejection", "combined"])
def test_a_moved_threshold_comes_back(saved, name, tmp_path):
    original, folder = saved(name)
    classifier = load_model(folder)
    images = test_images()
    if not original.rejects:
        with pytest.raises(DemurError, match="no reject score"):
            classifier.set_threshold(1.0)
        return
    classifier.set_threshold(0.125)
    classifier.save(tmp_path)
    again = load_model(tmp_path)
    assert again.threshold == 0.125
    assert torch.equal(again.scores(images), classifier.scores(images))


def test_the_config_is_plain_json_with_the_schema_and_the_architecture(saved):
    _, folder = saved("deep neural rejection")
    config = json.loads((folder / CONFIG).read_text())
    assert config["schema"] == 2 and config["kind"] == "DeepNeuralRejection"
    assert config["network"] == small().architecture
    assert config["parameters"]["gamma"] == [1.0, 1.0]
    assert len(config["fitted"]["gammas"]) == 3
    _, folder = saved("combined")
    config = json.loads((folder / CONFIG).read_text())
    assert config["first"]["network"]["network"]["name"] == "localized_network"
    assert config["second"]["kind"] == "GaussianBlur"


def test_adversarial_training_goes_on_after_loading(saved):
    images, labels = train()
    _, folder = saved("adversarial, masked")
    again = load_model(folder)
    assert again.attack == PGD(steps=2) and str(again.threat) == "l2:1.5"
    assert torch.equal(again.mask, MASK)
    again.fit(images[:32], labels[:32], **FEW)


def test_a_callable_mask_is_not_stored_and_says_so_when_it_is_needed(tmp_path):
    images, labels = train()

    def mask(images, labels):
        return masks.outside(masks.foreground(images))

    trained = LocalizedAdversarialTraining(small(), 10, PGD(steps=1), "linf:0.3", mask=mask)
    trained.fit(images[:32], labels[:32], **FEW).save(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.scores(test_images()), trained.scores(test_images()))
    with pytest.raises(DemurError, match=r"callable mask.*set model.mask"):
        again.fit(images[:32], labels[:32], **FEW)
    again.mask = mask
    again.fit(images[:32], labels[:32], **FEW)


def test_a_network_that_demur_did_not_build_is_given_at_loading(tmp_path):
    def network(outputs=10):
        return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, outputs))

    images, labels = train()
    deep = DeepNeuralRejection(network(), 10, ["1", "2"], C=1.0).fit(images, labels)
    deep.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["network"] is None
    with pytest.raises(DemurError, match=r"load_model\(folder, network=...\).*--arch py:"):
        load_model(tmp_path)
    given = network()
    before = given[2].weight.clone()
    again = load_model(tmp_path, given)
    assert torch.equal(again.scores(test_images()), deep.scores(test_images()))
    assert torch.equal(given[2].weight, before)  # it was copied
    with pytest.raises(DemurError, match="do not fit"):
        load_model(tmp_path, network(11))


def test_a_changed_network_is_not_described_as_the_builders(tmp_path):
    network = small()
    network[1] = nn.Tanh()
    save_model(Classifier(network, 10), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["network"] is None
    again = load_model(tmp_path, network)
    assert isinstance(again.module[1], nn.Tanh)


def test_a_network_is_not_given_in_vain(saved):
    with pytest.raises(DemurError, match="do not give another"):
        load_model(saved("plain")[1], small())


def test_d32_shared_half_precision_and_empty_tensors_are_stored(tmp_path):
    """D32."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Linear(10, 10))
    module.add_module("3", module[2])
    module[1].register_buffer("view", module[1].weight.detach()[:, ::2].T)
    module[1].register_buffer("nothing", torch.zeros(0, 3))
    classifier = Classifier(module.to(torch.bfloat16), 10)
    save_model(classifier, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["module.1.weight"].dtype == torch.bfloat16
    again = load_model(tmp_path, module)
    assert next(again.parameters()).dtype == torch.bfloat16
    assert torch.equal(again.scores(test_images()), classifier.scores(test_images()))


def test_the_precision_of_the_weights_comes_back(tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        classifier = Classifier(small().to(dtype), 10)
        save_model(classifier, tmp_path)
        again = load_model(tmp_path)
        assert next(again.parameters()).dtype == dtype
        assert torch.equal(again.scores(test_images()), classifier.scores(test_images()))


# What is refused


def spoiled(folder, target, change=None, tensors=None):
    """A copy of a bundle with another config or other tensors, and a digest that fits."""
    config = json.loads((folder / CONFIG).read_text())
    stored = load_file(folder / WEIGHTS)
    if tensors is not None:
        tensors(stored)
    target.mkdir(exist_ok=True)
    save_file(stored, target / WEIGHTS)
    config["sha256"] = file_digest(target / WEIGHTS)
    if change is not None:
        change(config)
    (target / CONFIG).write_text(json.dumps(config))
    return target


def set_to(*path_and_value):
    *path, last, value = path_and_value

    def change(config):
        for key in path:
            config = config[key]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_to("schema", 3), r"schema '3', which demur 0.1.0 wrote; .* reads schema 2"),
        (lambda config: config.pop("schema"), "schema 'None'"),
        (set_to("kind", "BackgroundClas"), "Did you mean 'BackgroundClass'"),
        (set_to("kind", ["x"]), "do not fit"),
        (set_to("kind", "Defense"), "unknown kind of model"),
        (set_to("num_classes", 10.0), "num_classes"),
        (set_to("num_classes", 1), "at least 2 classes"),
        (set_to("rejects", "yes"), "rejects is 'yes'"),
        (set_to("threshold", "0"), "threshold '0'"),
        (set_to("threshold", float("nan")), "is not JSON"),
        (set_to("parameters", {"C": float("inf")}), "is not JSON"),
        (set_to("parameters", "other", 1), "do not fit"),
        (set_to("parameters", "layers", ["nowhere"]), "nowhere"),
        (set_to("parameters", []), "do not fit"),
        (set_to("network", {"name": "os.system", "arguments": {}}), "unknown architecture"),
        (set_to("network", None), "network="),
        (set_to("network", []), "an architecture must be"),
        (lambda config: config.pop("network"), "do not fit"),
        (set_to("fitted", "gammas", None), "gammas"),
        (set_to("fitted", {}), "gammas"),
        (set_to("fitted", "gammas", [0.1]), "gammas"),
        (set_to("fitted", "gammas", [0.1, -1, 0.1]), "positive"),
        (set_to("channels_last", None), "channels_last"),
        (set_to("channels_last", ["module.threshold"]), "module.threshold"),
        (set_to("channels_last", ["\x1b[31m"]), r"'\\x1b\[31m'"),
        (set_to("sha256", "0"), "damaged"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(saved, tmp_path, change, said):
    _, folder = saved("deep neural rejection")
    with pytest.raises(DemurError, match=said) as error:
        load_model(spoiled(folder, tmp_path / "x", change))
    message = str(error.value)
    assert "\n" not in message and message.isprintable()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda stored: stored.pop("module.extractor.network.0.bias"), "do not fit"),
        (lambda stored: stored.pop("module.machines.1.weights"), "machines.1.weights"),
        (lambda stored: stored.update({"\x1b[31mred": torch.zeros(1)}), "do not fit"),
        (lambda stored: stored.update({"module.threshold": torch.zeros(2)}), "do not fit"),
        (lambda stored: stored.update({"module.combiner.platt": torch.zeros(3, 2)}), "platt"),
        (
            lambda stored: stored.update(
                {"module.combiner.intercepts": torch.zeros(10, dtype=torch.int64)}
            ),
            "intercepts",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(saved, tmp_path, tensors, said):
    _, folder = saved("deep neural rejection")
    with pytest.raises(DemurError, match=said) as error:
        load_model(spoiled(folder, tmp_path / "x", tensors=tensors))
    message = str(error.value)
    assert "\n" not in message and message.isprintable()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": NaN}', "[" * 5000, "\xff\xfe"])
def test_text_that_is_no_config_is_refused(saved, tmp_path, text):
    _, folder = saved("plain")
    copy = spoiled(folder, tmp_path / "x")
    (copy / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(DemurError, match=r"config.json is (damaged|not JSON|not a text file)"):
        load_model(copy)


def test_missing_and_damaged_files_are_refused(saved, tmp_path, monkeypatch):
    _, folder = saved("plain")
    with pytest.raises(DemurError, match="is no saved model"):
        load_model(tmp_path / "nothing")
    with pytest.raises(DemurError, match="is no saved model"):
        load_model(folder / CONFIG)
    copy = spoiled(folder, tmp_path / "x")
    whole = (copy / WEIGHTS).read_bytes()
    config = (copy / CONFIG).read_text()
    (copy / WEIGHTS).unlink()
    with pytest.raises(DemurError, match=f"has no file {WEIGHTS}"):
        load_model(copy)
    for damaged in (b"", whole[:-10], b"\x80\x04K\x01.", whole[:1000] + b"?" + whole[1001:]):
        (copy / WEIGHTS).write_bytes(damaged)
        with pytest.raises(DemurError, match="damaged"):
            load_model(copy)
        changed = {**json.loads(config), "sha256": file_digest(copy / WEIGHTS)}
        if damaged[:100] != whole[:100] or len(damaged) != len(whole):
            (copy / CONFIG).write_text(json.dumps(changed))
            with pytest.raises(DemurError, match=r"cannot read|not a whole file of weights"):
                load_model(copy)
            (copy / CONFIG).write_text(config)
    (copy / CONFIG).unlink()
    with pytest.raises(DemurError, match=f"has no file {CONFIG}"):
        load_model(copy)
    monkeypatch.setenv("DEMUR_LIMITS", "1e-6")
    with pytest.raises(DemurError, match="more than the limit"):
        load_model(folder)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path, monkeypatch):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return "text"

    class Own(Classifier):
        pass

    for classifier, said in (
        (Classifier(Stateful(4, 2), 2), "is no tensor"),
        (Own(nn.Linear(4, 2), 2), "Own cannot be saved"),
        (GaussianBlur(BackgroundClass(small(11), 10), 10), "BackgroundClass is not fitted"),
        (nn.Linear(4, 2), "Wrap it"),
    ):
        with pytest.raises(DemurError, match=said):
            save_model(classifier, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DemurError, match="cannot write"):
        save_model(Classifier(small(), 10), tmp_path / "file")
    with pytest.raises(DemurError, match="cannot write"):
        save_model(Classifier(small(), 10), tmp_path / ("x" * 300))

    def full(path, text, encoding):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DemurError, match="No space left"):
        save_model(Classifier(small(), 10), tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_while_saving_keeps_the_older_bundle(saved, tmp_path, monkeypatch):
    _, folder = saved("plain")
    copy = spoiled(folder, tmp_path / "x")
    before = load_model(copy).scores(test_images())

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("demur.defenses.saving.save_file", full)
    with pytest.raises(DemurError, match="No space left"):
        save_model(Classifier(small(), 10), copy)
    assert torch.equal(load_model(copy).scores(test_images()), before)
    assert sorted(path.name for path in copy.iterdir()) == [CONFIG, WEIGHTS]


def test_a_bundle_replaces_an_older_one(tmp_path):
    for outputs in (10, 11):
        classifier = Classifier(small(outputs, seed=outputs), 10)
        save_model(classifier, tmp_path)
        found = load_model(tmp_path).scores(test_images())
        assert torch.equal(found, classifier.scores(test_images()))


@pytest.mark.parametrize("rejects", [False, None])
def test_a_threshold_without_a_reject_column_is_refused(tmp_path, rejects):
    """Once it was added to the last class."""
    save_model(Classifier(small(), 10, rejects=rejects), tmp_path / "a")
    change = set_to("threshold", 1e6)
    with pytest.raises(DemurError, match=f"threshold is 1000000.0, but rejects is {rejects}"):
        load_model(spoiled(tmp_path / "a", tmp_path / "b", change))
