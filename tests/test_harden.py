"""`demur harden`: each defence and combinations, thresholds, resuming, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch import nn

import demur
from command import demur as command
from demur import Classifier, DemurError, data, load_model
from demur.classifier import Preprocess
from demur.commands import harden_tuning
from demur.commands.harden_layers import default_layers
from demur.commands.harden_run import HardenRun
from demur.commands.harden_settings import STEPS, chosen_steps
from demur.commands.harden_threshold import ThresholdRule, set_threshold
from demur.data import read_images, without
from demur.defenses import ConfidenceThreshold, DeepNeuralRejection, EitherRejects
from demur.defenses.descriptions import leaf_of
from demur.defenses.saving import CONFIG, WEIGHTS
from demur.metrics.intervals import clopper_pearson
from demur.networks import timm_network, torchvision_network
from demur.training import loop
from small_networks import trained, written

QUICK = {"epochs": 1, "steps": 2}


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.fixture(scope="module")
def source(tmp_path_factory, network):
    return written(tmp_path_factory.mktemp("net"), network)


def settings_of(names):
    """Few epochs and short attacks, where a defence has them."""
    found = {}
    for name in names:
        for key, value in QUICK.items():
            if key in STEPS[name].__dataclass_fields__:
                found[f"{name}.{key}"] = value
    return found


def hardened(network, names, **options):
    given = {"settings": settings_of(names), "num_samples": 600, **options}
    return demur.harden(network, data.load("digits"), names, **given)


@pytest.mark.parametrize("name", STEPS)
def test_each_defence_keeps_most_clean_images_and_its_bundle_gives_equal_scores(
    network, name, tmp_path
):
    found = hardened(network, [name], out=tmp_path / "b")
    assert found.before.accuracy > 0.85
    assert found.after.accuracy > 0.6
    again = load_model(tmp_path / "b", trained_copy(network))
    images = data.load("digits", "test").to_float()[:40]
    assert torch.equal(again.scores(images), found.classifier.scores(images))
    assert again.provenance == found.classifier.provenance
    assert again.provenance.request["with"] == [name]
    assert again.class_names == found.classifier.class_names
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [CONFIG, WEIGHTS]
    assert not (tmp_path / ".b.harden").exists()
    if again.rejects:
        assert found.after.rejection_rate < 0.15


def trained_copy(network):
    return type(network)(*network)


def test_defences_are_combined_from_the_inside_out(network, tmp_path):
    names = ["gaussian-blur", "background-class", "neural-rejection", "deep-neural-rejection"]
    found = hardened(network, names, out=tmp_path / "b")
    outer = found.classifier
    assert isinstance(outer, EitherRejects) and isinstance(outer.first, DeepNeuralRejection)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    kinds = []

    def walk(part):
        if isinstance(part, dict):
            kinds.extend([part["kind"]] if "kind" in part else [])
            for key in ("network", "first", "second"):
                walk(part.get(key))

    walk(config)
    assert kinds[:2] == ["EitherRejects", "DeepNeuralRejection"]
    assert kinds.count("GaussianBlur") == kinds.count("BackgroundClass") >= 2
    again = load_model(tmp_path / "b", trained_copy(network))
    images = data.load("digits", "test").to_float()[:20]
    assert torch.equal(again.scores(images), outer.scores(images))


@pytest.mark.slow
def test_the_images_that_a_model_was_made_with_are_left_out_of_audits(source, tmp_path):
    """R17."""
    out = tmp_path / "b"
    done = command("harden", source, "--num-classes", 10, "--data", "digits", "--out", out)
    assert done.returncode == 2 and "name at least one defence" in done.stderr
    done = command(
        *("harden", source, "--num-classes", 10, "--data", "digits", "--out", out),
        *("--with", "confidence-threshold", "--set", "score=margin"),
    )
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and f"demur audit {out} --data digits" in done.stdout
    made = load_model(out, arch=source)
    train = read_images("digits", "train")
    rest, left_out = without(train, made.provenance.images)
    assert left_out == len(set(made.provenance.images)) and len(rest) > 200
    words = done.stdout.split("Audit it: demur ")[1].split()
    audited = command(*words, "--split", "train", "--num-samples", 20, "--out", tmp_path / "a")
    assert audited.returncode == 0, audited.stderr
    report = json.loads((tmp_path / "a" / "results.json").read_text())
    assert any(f"Left out: {left_out:,} images" in note for note in report["notes"])


def test_files_that_a_model_was_made_with_are_left_out_of_audits(network, tmp_path):
    """R17: the hashes are those of the files, as an audit of the same folder has them."""
    digits = data.load("digits", "test")
    for place, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
        folder = tmp_path / "photos" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{place}.png")
    classifier = demur.wrap(
        trained_copy(network), preprocess=Preprocess((28, 28), channels=1), num_classes=10
    )
    made = demur.harden(classifier, tmp_path / "photos", ["confidence-threshold"]).classifier
    known = set(made.provenance.images)
    files = read_images(tmp_path / "photos", preprocess=classifier.preprocess)
    rest, left_out = without(files, known)
    assert left_out == len(known) > 200
    assert 40 < len(rest) < 120


OWN = "from demur.networks import localized_network\ndef make():\n    return localized_network(10)"


@pytest.mark.parametrize("described", [True, False])
def test_the_command_that_audits_the_result_can_load_it(source, described, tmp_path):
    """A network of demur is described in the bundle, and then its code is refused."""
    if described:
        (tmp_path / "own.py").write_text(OWN)
        source = f"py:{tmp_path / 'own.py'}:make"
    options = {"num_classes": 10, "preprocess": Preprocess((28, 28), channels=1)}
    found = demur.harden(
        source,
        "digits",
        ["confidence-threshold"],
        num_samples=600,
        out=tmp_path / "b",
        device="cpu",
        model_options=options,
    )
    words = found.audit_command.split()
    assert ("--arch" in words) != described
    arch = {} if described else {"arch": words[words.index("--arch") + 1]}
    assert load_model(tmp_path / "b", **arch).rejects


# Thresholds


class Fixed(nn.Module):
    """Scores that are written into the image."""

    def forward(self, images):
        return 10 * images.flatten(1)[:, :3]


def scored(n, wrong, seed=0):
    """Images whose class scores are known, of which some are wrong."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 1, 3), generator=generator, dtype=torch.uint8)
    labels = pixels.flatten(1).float().argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return pixels, labels


@pytest.mark.parametrize("score", ["max-prob", "margin", "energy"])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1, 0.37])
def test_a_false_rejection_rate_is_reached_and_never_exceeded(score, rate):
    images, labels = scored(300, 20)
    classifier = ConfidenceThreshold(Fixed(), 3, score=score, threshold=0.5)
    set_threshold(classifier, images, labels, ThresholdRule(rate))
    rejected = int((classifier.predict(data.to_float(images)) == -1).sum())
    ties = 300 - len({tuple(one) for one in images.flatten(1).tolist()})
    assert rate * 300 - 1 - 3 * ties - 8 * (score != "energy") <= rejected <= rate * 300


@pytest.mark.parametrize("wrong", [0, 3, 40, 150])
def test_the_bound_of_wrong_and_accepted_holds_at_the_smallest_threshold(wrong):
    images, labels = scored(400, wrong)
    rule = ThresholdRule(max_wrong=0.03, confidence=0.9)
    classifier = ConfidenceThreshold(Fixed(), 3, score="margin", threshold=0.5)
    said = set_threshold(classifier, images, labels, rule)
    assert "at most" in said

    def bound():
        decided = classifier.predict(data.to_float(images))
        bad = int(((decided != labels) & (decided != -1)).sum())
        return clopper_pearson(bad, 400, 0.9, "upper")[1]

    assert bound() <= 0.03
    if wrong > 20:  # brute force: each smaller threshold that accepts one more wrong image fails
        scores = classifier.scores(data.to_float(images))
        acceptance = classifier._acceptance(scores)
        mistaken = scores[:, :3].argmax(1) != labels
        limit = classifier.threshold
        lower = acceptance[mistaken & (acceptance < limit)].max()
        classifier.set_threshold(float(lower) - 1e-9)
        assert bound() > 0.03


def test_the_bound_holds_as_often_as_it_says():
    """An independent check of the guarantee, by the share on many fresh images."""
    misses = 0
    for seed in range(30):
        images, labels = noisy(500, seed)
        classifier = ConfidenceThreshold(Fixed(), 3, score="margin", threshold=0.5)
        set_threshold(classifier, images, labels, ThresholdRule(max_wrong=0.1, confidence=0.8))
        fresh, true = noisy(4000, 1000 + seed)
        decided = classifier.predict(data.to_float(fresh))
        misses += float(((decided != true) & (decided != -1)).double().mean()) > 0.1
    assert misses <= 12  # 6 are expected at most; 12 or more have probability .01


def noisy(n, seed):
    """Labels that follow the scores the better, the larger their margin is."""
    images, labels = scored(n, 0, seed)
    best = images.flatten(1).float().topk(2, 1).values
    margin = (best[:, 0] - best[:, 1]) / 255
    lost = torch.rand(n, generator=torch.Generator().manual_seed(seed + 7)) > 0.5 + margin / 2
    return images, torch.where(lost, (labels + 1) % 3, labels)


def test_a_bound_that_no_threshold_can_keep_is_said():
    images, labels = scored(50, 0)
    classifier = ConfidenceThreshold(Fixed(), 3, threshold=0.5)
    with pytest.raises(DemurError, match=r"no threshold keeps .* takes at least 299"):
        set_threshold(classifier, images, labels, ThresholdRule(max_wrong=0.01))


# Layers and networks of libraries


def test_the_last_activations_are_read():
    image = torch.rand(1, 3, 64, 64)
    resnet = torchvision_network("resnet18", 5, {})
    assert default_layers(resnet, image, 3) == ["layer3.1.relu", "layer4.0.relu", "layer4.1.relu"]
    vgg = timm_network("test_resnet", 5, {})
    assert len(default_layers(vgg, image, 3)) == 3
    functional = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 3))
    assert default_layers(functional, torch.rand(1, 3, 2, 2), 3) == ["1"]


@pytest.mark.parametrize("name", ["background-class", "deep-neural-rejection"])
def test_a_librarys_network_is_hardened_into_a_bundle_that_loads_alone(name, tmp_path):
    network = timm_network("test_resnet", 3, {})
    preprocess = Preprocess((32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    classifier = demur.wrap(network, preprocess=preprocess, class_names=tuple("abc"))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(150, 3, 32, 32, generator=generator)
    found = demur.harden(
        classifier,
        (images, torch.arange(150) % 3),
        [name],
        settings=settings_of([name]),
        false_rejection_rate=0.1,
        out=tmp_path / "b",
    )
    again = load_model(tmp_path / "b")
    assert torch.equal(again.scores(images[:9]), found.classifier.scores(images[:9]))
    assert again.class_names == tuple("abc") and again.preprocess == preprocess


def test_a_frozen_network_changes_in_its_head_alone(network):
    names = ["background-class"]
    given = {**settings_of(names), "frozen": "true"}
    found = hardened(network, names, settings=given)
    before, after = (part.state_dict() for part in (network, leaf_of(found.classifier)))
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("6."))
    assert after["6.weight"].shape == (11, 32)


def test_early_stopping_keeps_the_best_weights(network):
    """With a learning rate that destroys the network, it keeps what it came with."""
    names = ["median-blur"]
    found = hardened(network, names, settings={"learning_rate": 3.0, "epochs": 3, "patience": 1})
    assert found.after.accuracy > 0.6


# Resuming


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop", ["training", "second step", "saving"])
@pytest.mark.slow
def test_a_hardening_that_was_killed_goes_on_to_the_same_bundle(
    network, tmp_path, monkeypatch, stop
):
    names = ["adversarial-training", "deep-neural-rejection"]
    hardened(network, names, out=tmp_path / "whole")
    module, name = {
        "training": (loop, "take_step"),
        "second step": (DeepNeuralRejection, "fit"),
        "saving": (demur.commands.harden_run, "save_classifier"),
    }[stop]
    original = getattr(module, name)
    calls = [0]

    def killed(*given, **options):
        calls[0] += 1
        if calls[0] > (2 if stop == "training" else 0):
            raise KeyboardInterrupt
        return original(*given, **options)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECK_STEPS", 1)
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        hardened(network, names, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(module, name, original)
    trained_again = [0]
    real = loop.take_step

    def counted(*given):
        trained_again[0] += 1
        return real(*given)

    monkeypatch.setattr(loop, "take_step", counted)
    hardened(network, names, out=tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(tmp_path / "whole")
    assert not (tmp_path / ".b.harden").exists()
    assert trained_again[0] == 0 or stop == "training"
    # A finished bundle is not made again, and another request is refused.
    again = hardened(network, names, out=tmp_path / "b")
    assert again.notes == ("The bundle was finished already.",)
    with pytest.raises(DemurError, match="holds another bundle"):
        hardened(network, names, out=tmp_path / "b", seed=1)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bundle(source, tmp_path):
    words = ["-m", "demur.cli", "harden", source, "--num-classes", "10", "--data", "digits"]
    words += ["--with", "background-class", "--with", "neural-rejection", "--set", "epochs=6"]

    def start(out):
        return subprocess.Popen([sys.executable, *words, "--out", out])

    assert start(tmp_path / "whole").wait() == 0
    for seconds in (3, 5, 7, 9):
        process = start(tmp_path / "b")
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "b").exists():
            break
    assert start(tmp_path / "b").wait() == 0
    assert files_of(tmp_path / "b") == files_of(tmp_path / "whole")


# What is refused


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        ([], {}, "at least one defence"),
        (["gausian-blur"], {}, "Did you mean 'gaussian-blur'"),
        (["confidence-threshold", "certified-consistency"], {}, "without a reject column"),
        (["median-blur", "median-blur"], {}, "named twice"),
        (["neural-rejection", "gaussian-blur"], {}, "write --with gaussian-blur before"),
        (["background-class", "confidence-threshold"], {}, "without a reject column"),
        (["gaussian-blur"], {"sigam": 1}, "unknown setting 'sigam'"),
        (["gaussian-blur"], {"sigma": "x"}, "must be float, not 'x'"),
        (["median-blur"], {"size": "3.5"}, "must be int, not '3.5'"),
        (["gaussian-blur", "median-blur"], {"epochs": 1}, r"gaussian-blur.epochs or median"),
        (["gaussian-blur"], {"median-blur.size": 3}, "unknown defence of a setting"),
    ],
)
def test_names_and_settings_that_do_not_fit_are_refused(names, settings, said):
    with pytest.raises(DemurError, match=said) as error:
        chosen_steps(names, settings)
    assert "\n" not in str(error.value)


def test_settings_have_the_types_of_their_defaults():
    deep, blur = chosen_steps(
        ["deep-neural-rejection", "gaussian-blur"][::-1],
        {"deep-neural-rejection.gamma": "0.5", "sigma": "2", "frozen": "true", "images": "50"},
    )[::-1]
    assert deep.gamma == 0.5 and deep.images == 50 and type(deep.images) is int
    assert blur == harden_tuning.Gaussian(sigma=2.0, frozen=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_wrong": 0.01, "false_rejection_rate": 0.1}, "not both"),
        ({"max_wrong": 2}, "above 0 and below 1"),
        ({"false_rejection_rate": 1.0}, r"must be in \[0, 1\)"),
        ({"background": "."}, "add --with background-class"),
        ({"num_samples": 40}, "at least 5 images; the smallest has"),
        ({"settings": {"layers": "nowhere"}}, "unknown layer 'nowhere'"),
        ({"settings": {"folds": 1}}, "folds"),
    ],
)
def test_options_that_do_not_fit_are_refused(network, options, said, tmp_path):
    with pytest.raises(DemurError, match=said):
        hardened(network, ["neural-rejection"], out=tmp_path / "b", **{"settings": {}, **options})
    assert not (tmp_path / "b").exists()


def threshold_set(n, wrong, rule):
    """What is said of the threshold of n images."""
    return set_threshold(ConfidenceThreshold(Fixed(), 3, threshold=0.5), *scored(n, wrong), rule)


def test_too_few_held_out_images_for_the_rate_are_refused():
    """They would set a threshold below all their scores, and the model would hardly reject."""
    with pytest.raises(DemurError, match=r"49 held-out images are too few .* from 50 held-out"):
        threshold_set(49, 3, ThresholdRule(0.02))
    assert "2 % of them are rejected" in threshold_set(50, 3, ThresholdRule(0.02))
    assert "0 % of them are rejected" in threshold_set(49, 3, ThresholdRule(0.0))


def test_too_few_images_are_said_before_anything_is_trained(network, monkeypatch, tmp_path):
    monkeypatch.setattr(HardenRun, "made", lambda *given: pytest.fail("it was made"))
    monkeypatch.setattr(HardenRun, "written", lambda *given: pytest.fail("it was made"))
    for options, said in (
        ({}, "too few to set a threshold"),
        ({"max_wrong": 0.01}, "no threshold"),
    ):
        for out in (None, tmp_path / "b"):
            with pytest.raises(DemurError, match=said):
                hardened(network, ["confidence-threshold"], num_samples=90, out=out, **options)


def test_one_wrong_image_is_counted_in_the_singular():
    said = threshold_set(300, 1, ThresholdRule(max_wrong=0.05))
    assert ", 1 is wrong and accepted." in said


def test_the_figures_before_and_after_have_intervals(network):
    found = hardened(network, ["confidence-threshold"], num_samples=300)
    low, high = clopper_pearson(found.after.correct, found.after.n)
    share = 100 * found.after.accuracy
    said = f"after: {share:.1f} ({100 * low:.1f}-{100 * high:.1f}) % correct"
    assert said in str(found)


def test_a_bound_without_a_rejection_is_refused(network):
    with pytest.raises(DemurError, match="this model never rejects"):
        hardened(network, ["gaussian-blur"], max_wrong=0.1)


def saved(images, folder):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return folder


def test_a_background_folder_is_read_and_a_wrong_one_refused(network, tmp_path):
    digits = data.load("digits")
    for label in range(10):
        saved(digits.images[digits.labels == label][:40], tmp_path / "data" / f"c{label}")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60, 1, 28, 28), generator=generator, dtype=torch.uint8)
    saved(noise, tmp_path / "noise" / "more")
    options = {"settings": {"epochs": 1}, "data_options": {"split": "train"}}

    def run(background):
        return demur.harden(
            Classifier(network, 10),
            tmp_path / "data",
            ["background-class"],
            background=background,
            **options,
        )

    assert run(tmp_path / "noise").after.accuracy > 0.6
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "data" / "c3", tmp_path / "own" / "others")
    saved(noise, tmp_path / "named" / "c4")
    for folder, said in (
        ("empty", "has no image"),
        ("missing", "is no folder"),
        ("own", "holds 40 images of the data"),
        ("named", "holds a folder 'c4'"),
    ):
        with pytest.raises(DemurError, match=said):
            run(tmp_path / folder)


def test_a_folder_with_other_files_is_refused(network, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(DemurError, match="holds no bundle"):
        hardened(network, ["confidence-threshold"], out=tmp_path / "b")
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


def test_a_corrected_request_goes_on_in_the_folder_of_a_refused_one(network, tmp_path):
    names = ["gaussian-blur", "confidence-threshold"]
    with pytest.raises(DemurError, match="sigma"):
        hardened(network, names, settings={"sigma": -1, "epochs": 0}, out=tmp_path / "b")
    settings = {"sigma": 0.5, "epochs": 0}
    found = hardened(network, names, settings=settings, num_samples=500, out=tmp_path / "b")
    assert (tmp_path / "b").is_dir()
    assert not (tmp_path / ".b.harden").exists()
    assert any("not trained on" in note for note in found.notes)
