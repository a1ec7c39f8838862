"""The engine ray: the same records as the local one, whatever happens to workers."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal

import plans
from demur import DemurError
from demur.evaluation import engines, on_images
from demur.evaluation.engines import Ray
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.scoring import Row
from demur.evaluation.store import Store
from recipes import TinyTraining

ray = pytest.importorskip("ray", reason="the ray extra is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Workers get one thread each, so that two of them fit on two cores; shards are small."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import recipes
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(on_images, "SHARD", 5)
    yield
    torch.set_num_threads(before)


def started(workers):
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)


@pytest.fixture(autouse=True)
def stopped():
    yield
    ray.shutdown()


def on_ray(folder, asked=None, workers=1):
    started(workers)
    try:
        return plans.run(folder, asked, engine=Ray(Environment.here("cpu")))
    finally:
        ray.shutdown()


def test_one_and_two_workers_give_the_records_of_the_local_engine(tmp_path):
    expected = plans.comparable(plans.run(tmp_path / "local").records())
    for workers in (1, 2):
        found = on_ray(tmp_path / str(workers), workers=workers).records()
        assert_frame_equal(plans.comparable(found), expected)


@dataclass(frozen=True)
class Dying:
    """Kills its worker the first time."""

    mark: str

    def train(self, given):
        if not os.path.exists(self.mark):  # noqa: PTH110
            open(self.mark, "w").close()  # noqa: PTH123
            os.kill(os.getpid(), signal.SIGKILL)
        return TinyTraining().train(given)


def test_the_task_of_a_killed_worker_runs_again(tmp_path):
    model = plans.trained()
    dying = Train(Dying(str(tmp_path / "mark")), model.data, 0, name="plain")
    shown = plans.images(5)
    found = on_ray(tmp_path / "ray", [Evaluate(dying, shown, None)]).records()
    assert (tmp_path / "mark").exists()
    expected = plans.run(tmp_path / "local", [Evaluate(model, shown, None)]).records()
    names = ["prediction", "class_margin", "outcome"]
    assert_frame_equal(found.select(names), expected.select(names))


def fails():
    raise DemurError("no such thing.")


def test_an_error_of_a_worker_is_one_line(tmp_path):
    with pytest.raises(DemurError, match=r"^no such thing\.$"):
        on_ray(tmp_path, [Measure(fails, ())])


def sleeps(mark):
    open(mark, "w").close()  # noqa: PTH123
    time.sleep(60)
    return [Row("slept", 1.0)]


def test_an_interruption_cancels_the_tasks(tmp_path):
    started(1)
    engine = Ray(Environment.here("cpu"))
    whole = engine._ray.wait
    mark = tmp_path / "mark"

    def interrupted(*given, **options):
        while not mark.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    engine._ray.wait = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(
                [Measure(sleeps, (str(mark),))],
                Store(tmp_path / "store"),
                engine,
                Environment.here("cpu"),
            )
    finally:
        engine._ray.wait = whole
    begin = time.monotonic()
    while ray.available_resources().get("CPU", 0) < 1 and time.monotonic() - begin < 30:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 1  # the sleeping task is gone


def test_models_are_shipped_once(tmp_path, monkeypatch):
    started(1)
    engine = Ray(Environment.here("cpu"))
    sent = []
    put = engine._ray.put
    monkeypatch.setattr(engine._ray, "put", lambda value: sent.append(type(value)) or put(value))
    plans.run(tmp_path, plans.plan(), engine=engine)
    # Two data sets' worth of training images are one, and the two models are sent once each.
    assert len(sent) == 3


def test_too_few_cores_and_a_missing_cluster_are_one_line(monkeypatch):
    started(1)
    with pytest.raises(DemurError, match="no node of the Ray cluster has 64 CPUs"):
        Ray(Environment("cpu", "float32", 64, "x"))
    ray.shutdown()
    monkeypatch.setattr(engines.importlib, "import_module", missing)
    with pytest.raises(DemurError, match=r"pip install 'demur\[ray\]'"):
        Ray(Environment.here("cpu"))


def missing(name):
    raise ImportError(name)
