"""Progress in Python: lines in the log, nothing on the terminal."""

import logging

import pytest
from torch import nn

from demur import Classifier, data, progress
from demur.attacks import PGD
from demur.defenses import ConfidenceThreshold, DeepNeuralRejection, NeuralRejection
from demur.progress import Logging, Silent, job, reporting
from demur.threat import ThreatModel
from demur.training import fit


@pytest.fixture
def digits():
    return data.load("digits", "test").sample(60, seed=0)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "demur")

    def said():
        assert {record.levelno for record in caplog.records} <= {logging.INFO}
        return [record.getMessage() for record in caplog.records if record.name == "demur"]

    return said


def network():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))


def test_a_training_says_its_epoch_and_its_loss(digits, lines, capsys):
    fit(network(), digits.images, digits.labels, epochs=2, batch_size=30, device="cpu")
    (line,) = lines()
    assert line.startswith("training: 100 % after ")
    assert "epoch 2 of 2, loss " in line
    said = capsys.readouterr()
    assert not said.out and not said.err


def test_each_fit_of_a_rejection_says_what_it_does(digits, lines):
    ConfidenceThreshold(network(), 10).fit(digits.images, digits.labels)
    body = nn.Sequential(nn.AvgPool2d(7), nn.Flatten())
    NeuralRejection(body, 10, "1", C=1.0, folds=2).fit(digits.images, digits.labels)
    deep = DeepNeuralRejection(body, 10, ["0", "1"], C=1.0, folds=2)
    deep.fit(digits.images, digits.labels)
    deep.search(digits.images, digits.labels, Cs=[1.0], gammas=[0.01])
    names = [line.split(":")[0] for line in lines()]
    assert names == ["threshold", "machines", "machines", "search of C and gamma"]
    assert all(": 100 % after " in line for line in lines())
    assert lines()[2].endswith("combiner")


def test_lines_come_at_most_every_few_seconds_and_name_all_jobs_under_way(lines, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with reporting(Logging()), job("outer", 2) as outer:
        for _ in range(2):
            with job("inner", 10) as inner:
                for _ in range(10):
                    clock[0] += 1
                    inner.advance(1, "loss 0.5")
            outer.advance(1, "half")
    said = lines()
    assert said[0] == "outer: 0 % after 5.0 s; inner: 50 % after 5.0 s, loss 0.5"
    assert said[-1] == "outer: 100 % after 20.0 s, half"
    assert len(said) == 5


def test_progress_can_be_silenced_and_an_error_ends_its_job(digits, lines):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 10)
    images, labels = digits.to_float(), digits.labels
    with reporting(Silent()):
        PGD(steps=1)(model, images, labels, ThreatModel("linf", 0.1))
    assert not lines()
    with pytest.raises(ValueError), job("broken", 4) as broken:
        broken.advance(1)
        raise ValueError
    assert lines()[-1].startswith("broken: 25 % after ")
    with job("next", 1) as following:
        following.advance(1)
    assert lines()[-1].startswith("next: 100 %")


def test_nothing_is_written_where_the_log_is_not_asked_for(digits, capfd):
    fit(network(), digits.images, digits.labels, epochs=1, batch_size=30, device="cpu")
    assert capfd.readouterr() == ("", "")
