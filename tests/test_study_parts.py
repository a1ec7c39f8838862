"""Parts that several studies use: figures from records, thresholds, models without rejection."""

from pathlib import Path

import polars as pl
import pytest
import torch

from demur import DemurError
from demur.data import ImageSet
from demur.defenses import BackgroundClass
from demur.evaluation.records import SCHEMA
from demur.evaluation.results import Measurement, Table
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.tables import figures, lookup, mean_of, outcome_series, share_of
from demur.networks import background_class_network
from demur.studies.material import check_square, load_first
from demur.studies.recipes import FalseRejectionRate, WithoutReject, rejected
from demur.studies.reported import read_reported, read_texts


def records(*outcomes, **values):
    rows = [
        {"repeat": 0, "image": str(place), "model": "m", "outcome": outcome, "l2": place, **values}
        for place, outcome in enumerate(outcomes)
    ]
    names = ("repeat", "image", "model", "outcome", "l2", "eps", "success")
    return pl.DataFrame(rows, schema={name: SCHEMA[name] for name in names})


def test_shares_may_join_outcomes_and_count_some_records_only():
    found = records("correct", "rejected", "wrong", "wrong")
    columns = {
        "answered": share_of("correct", "wrong"),
        "right": share_of("correct", among=pl.col("outcome") != "rejected"),
        "none": share_of("wrong", among=pl.col("outcome") == "no such"),
    }
    answered, right, none = figures(found, columns)
    assert (answered.row, answered.measured, answered.n) == ("m", 75, 4)
    assert right.measured == pytest.approx(100 / 3) and right.n == 3
    assert none.measured is None and none.note == "no images"


def test_means_are_over_repetitions_and_n_counts_images():
    found = pl.concat([records("wrong", "wrong", repeat=0), records("wrong", repeat=1)])
    (figure,) = figures(found, {"L2": mean_of(pl.col("l2").mean())}, group="outcome")
    assert (figure.group, figure.measured, figure.splits, figure.n) == ("wrong", 0.25, 2, 2)
    (missing,) = figures(found, {"L2": mean_of(pl.col("l2").mean(), among=pl.col("l2") > 9)})
    assert missing.measured is None and missing.note == "none was found"


def test_a_curve_has_the_outcomes_at_each_x():
    found = pl.concat([records("correct", "wrong", eps=0.0), records("wrong", "wrong", eps=0.1)])
    (series,) = outcome_series(found, "on " + pl.col("model"), "eps")
    assert (series.name, series.wrong, series.correct, series.n) == ("on m", [0.5, 1], [0.5, 0], 2)


def test_figures_of_a_table_are_looked_up_by_group_row_and_column():
    table = Table("T", [Measurement("row", "a", "g", measured=1.0), Measurement("row", "b", "g")])
    found = lookup(table)["g"]["row"]
    assert found["a"] == 1 and found["b"] != found["b"]


def given(base, images):
    labels = torch.arange(len(images)) % 3
    data = ImageSet(images, labels, ("a", "b", "c"))
    return TrainingInputs(data, None, base, 0, "cpu", Path("none"))


@pytest.fixture
def base():
    return BackgroundClass(background_class_network(4, size=6), 3, prefit=True).eval()


IMAGES = torch.randint(
    0, 256, (30, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


def test_a_threshold_is_set_to_a_rate_of_false_rejections(base):
    model = FalseRejectionRate(0.2).train(given(base, IMAGES))
    assert [row.value for row in rejected(model, ("clean", IMAGES))] == [pytest.approx(0.2)]


def test_a_model_without_its_reject_output_has_the_same_other_scores(base):
    alone = WithoutReject().train(given(base, IMAGES))
    clean = given(base, IMAGES).data.to_float()
    assert torch.allclose(alone.scores(clean), base.scores(clean)[:, :3], atol=1e-6)
    assert rejected(alone, ("clean", IMAGES))[0].value == 0


def test_the_first_data_set_that_is_there_is_taken(tmp_path):
    found = load_first(("mnist", "digits"), tmp_path)
    assert (found.entry, found.where) == ("digits", "embedded") and "mnist" in found.missing


def test_images_that_are_not_square_are_refused():
    images = ImageSet(torch.zeros(2, 1, 6, 8, dtype=torch.uint8), torch.arange(2), ("a", "b"))
    with pytest.raises(DemurError, match="those of own are 6x8"):
        check_square(images, "own")


def test_figures_and_texts_of_the_background_class_are_read():
    texts = read_texts("background_class")
    assert {one.table for one in read_reported("background_class")} <= set(texts)
