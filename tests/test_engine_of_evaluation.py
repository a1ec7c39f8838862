"""The evaluation engine: keys, the store, plans and records."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import demur
import plans
from demur import Classifier, DemurError, ThreatModel, attacks
from demur.attacks import DDN, FGSM, PGD, Target
from demur.evaluation import on_images, plan
from demur.evaluation.code import closure, code_fingerprint
from demur.evaluation.costs import Costs
from demur.evaluation.engines import Local
from demur.evaluation.folder import claimed
from demur.evaluation.keys import Environment, Keys
from demur.evaluation.nodes import Load, Measure, Train
from demur.evaluation.on_images import Certify, Evaluate
from demur.evaluation.records import OUTCOMES, SCHEMA, worst_case
from demur.evaluation.store import Store
from demur.progress import Silent, reporting

HERE = Environment("cpu", "float32", 1, "AVX2")


class Listening(Silent):
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


class Counting(Local):
    """Counts the tasks that are computed."""

    def __init__(self):
        super().__init__()
        self.tasks = []

    def submit(self, number, task):
        self.tasks.append(task)
        super().submit(number, task)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    plans.run(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(store):
    return plans.run(store)


def linear(pixels=784):
    torch.manual_seed(0)
    return Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, 10)), 10)


def loaded(fingerprint="a"):
    return Load(linear, fingerprint)


# Keys


def keys_of(*variants):
    keys = Keys(HERE)
    return [keys.of(one) for one in variants]


def test_every_field_that_can_change_a_result_changes_the_key():
    images = plans.images(5)
    threat = ThreatModel("linf", 0.1)
    first = Evaluate(loaded(), images, threat, PGD(steps=2))
    vary = dataclasses.replace
    others = [
        vary(first, on=loaded("b")),
        vary(first, images=images.subset([0, 1])),
        vary(first, images=dataclasses.replace(images, labels=images.labels.flip(0))),
        vary(first, threat=ThreatModel("linf", 0.2)),
        vary(first, threat=ThreatModel("l2", 0.1)),
        vary(first, threat=ThreatModel("linf", 0.1, goal=Target(1))),
        vary(first, threat=ThreatModel("linf", 0.1, mask=torch.ones(28, 28))),
        vary(first, threat=ThreatModel("linf", 0.1, mask=torch.zeros(28, 28))),
        vary(first, attack=PGD(steps=3)),
        vary(first, attack=FGSM()),
        vary(first, seed=1),
        vary(first, batch_size=2),
        vary(first, keep="stored"),
        vary(first, through=loaded("c")),
        Evaluate(loaded(), images, None),
    ]
    assert len(set(keys_of(first, *others))) == 1 + len(others)


def test_labels_and_names_do_not_change_the_key():
    first = Evaluate(loaded(), plans.images(5), ThreatModel("linf", 0.1), PGD(steps=2))
    renamed = dataclasses.replace(first.on, name="other")
    same = dataclasses.replace(first, on=renamed, attacker="strongest", split="x", repeat=3)
    assert len(set(keys_of(first, same))) == 1


@pytest.mark.parametrize(
    "change", [{"device": "cuda"}, {"precision": "bfloat16"}, {"threads": 2}, {"processor": "x"}]
)
def test_d1_the_kind_of_machine_and_the_threads_are_part_of_the_key(change):
    node = Evaluate(loaded(), plans.images(5), None)
    assert Keys(HERE).of(node) != Keys(dataclasses.replace(HERE, **change)).of(node)


def test_a_key_is_the_same_in_every_process():
    script = (
        "import plans; from demur.evaluation.keys import *; "
        "k = Keys(Environment('cpu', 'float32', 1, 'AVX2')); "
        "print([k.of(one) for one in plans.plan()])"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == str(keys_of(*plans.plan())), done.stderr


CHANGES = {
    "a constant of one attack": ("attacks/pgd.py", "PATIENCE = 5", "PATIENCE = 6"),
    "decide": ("classifier/decisions.py", "def decide(", "EXTRA = 1\n\n\ndef decide("),
    "a comment": ("attacks/pgd.py", "PATIENCE = 5", "PATIENCE = 5  # steps"),
    "a docstring": ("attacks/pgd.py", '"""Projected gradient descent, in', '"""Descent, in'),
    "training": ("training/loop.py", "\ndef fit(", "\nEXTRA = 1\n\n\ndef fit("),
}
AGAIN = {"a comment", "a docstring", "decide", "training"}
"""Changes like another one: only `make test-all` tries them."""
AFFECTED = {
    "a constant of one attack": {1, 4},
    "decide": {0, 1, 2, 3, 4, 5},
    "a comment": set(),
    "a docstring": set(),
    "training": {0, 1, 2, 3, 4, 5},
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(one, marks=pytest.mark.slow) if one in AGAIN else one for one in CHANGES],
)
def test_d3_exactly_the_nodes_that_use_changed_code_are_computed_again(change, tmp_path, store):
    """On a copy of the package: PGD is used by the nodes 1 and 4 of the plan."""
    copied = tmp_path / "demur"
    shutil.copytree(Path(demur.__file__).parent, copied)
    path = copied / CHANGES[change][0]
    text = path.read_text()
    assert text.count(CHANGES[change][1]) == 1
    path.write_text(text.replace(*CHANGES[change][1:]))
    script = (
        "import plans; from demur.evaluation.keys import *; import demur; "
        "k = Keys(Environment('cpu', 'float32', 1, 'AVX2')); "
        "print(demur.__file__); print([k.of(one) for one in plans.plan()])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    where, found = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    before = keys_of(*plans.plan())
    changed = {place for place, key in enumerate(eval(found)) if key != before[place]}
    assert changed == AFFECTED[change]


def test_the_closure_of_an_attack_leaves_other_attacks_and_exports_out():
    path = Path(sys.modules[PGD.__module__].__file__).resolve()
    names = {one.name for one in closure([path])}
    assert {"pgd.py", "base.py", "engine.py", "state.py", "decisions.py"} <= names
    assert not {"square.py", "apgd.py", "fast_gradient.py", "strongest.py"} & names
    assert code_fingerprint([PGD]) != code_fingerprint([FGSM])


# Plans and the store


def test_a_second_run_computes_nothing(store):
    engine = Counting()
    plans.run(store, engine=engine)
    assert engine.tasks == []


def test_a_corrected_plan_computes_only_what_is_new(store, tmp_path):
    copied = shutil.copytree(store, tmp_path / "store")
    engine = Counting()
    plans.run(copied, plans.plan(steps=3), engine=engine)
    functions = [task.function.__name__ for task in engine.tasks]
    # PGD with another number of steps twice: with its images in 8 bits, and to be transferred.
    assert sorted(functions) == ["attack", "attack", "transfer"]


def test_images_are_attacked_once_for_all_models_that_score_them(tmp_path):
    shown = plans.images(5)
    threat = ThreatModel("linf", 0.1)
    asked = [
        Evaluate(loaded("a"), shown, threat, PGD(steps=2), through=loaded(name)) for name in "bcd"
    ]
    engine = Counting()
    plans.run(tmp_path, asked, engine=engine)
    names = [task.function.__name__ for task in engine.tasks]
    assert names == ["attack", "transfer", "transfer", "transfer"]


def test_shards_change_nothing_but_the_cost(monkeypatch, outputs, tmp_path):
    """R10: random draws depend on the image, and not on its shard."""
    mine = plans.comparable(outputs.records())
    monkeypatch.setattr(on_images, "SHARD", 7)
    other = plans.run(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 20
    assert_frame_equal(mine, plans.comparable(other.records()), abs_tol=1e-4)


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [3, 100, 0.5, -1])
def test_a_flipped_bit_in_any_stored_file_is_found_and_computed_again(place, store, tmp_path):
    copied = shutil.copytree(store, tmp_path / "store")
    before = plans.run(copied).records()
    files = sorted(copied.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        flipped(path, int(size * place) if isinstance(place, float) else place)
    listening = Listening()
    with reporting(listening):
        after = plans.run(copied).records()
    assert_frame_equal(plans.comparable(before), plans.comparable(after))
    warned = [text for text in listening.texts if "damaged" in text]
    assert len(warned) == len(files)


def test_a_result_that_is_altered_during_the_run_is_an_error(store, tmp_path):
    copied = shutil.copytree(store, tmp_path / "store")
    outputs = plans.run(copied)
    for path in copied.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DemurError, match="Run the same command again"):
        outputs.records()


def test_stale_results_are_used_again_only_when_asked_and_named(store, tmp_path, monkeypatch):
    copied = shutil.copytree(store, tmp_path / "store")
    monkeypatch.setattr(plan.Keys, "code", lambda self, node: "0" * 16)
    again = Counting()
    reused = plans.run(copied, engine=again, reuse_stale=True)
    assert again.tasks == []
    assert len(reused.stale) == len(list(store.glob("*.safetensors")))
    fresh = Counting()
    assert plans.run(copied, engine=fresh).stale == {}
    assert len(fresh.tasks) == len(list(store.glob("*.safetensors")))


def test_what_is_made_from_a_stale_result_stays_stale(store, tmp_path, monkeypatch):
    """A later run without the flag computes it from fresh results."""
    copied = shutil.copytree(store, tmp_path / "store")
    monkeypatch.setattr(plan.Keys, "code", lambda self, node: "0" * 16)
    first = Counting()
    made = plans.run(copied, plans.plan(steps=3), engine=first, reuse_stale=True)
    assert len(first.tasks) == 3
    assert len(made.stale) >= 3 + len(first.tasks)
    second = Counting()
    plans.run(copied, plans.plan(steps=3), engine=second)
    assert len(second.tasks) >= 3 + len(first.tasks)


def test_an_estimate_comes_from_measured_costs(store, tmp_path):
    environment = Environment.here("cpu")
    assert plan.estimate(plans.plan(), Store(store), environment) == 0
    shutil.copy(store / "costs.jsonl", tmp_path)
    whole = plan.estimate(plans.plan(), Store(tmp_path), environment)
    measured = sum(cost.seconds for cost in plans.run(store).costs())
    assert whole == pytest.approx(measured, rel=0.5)
    (tmp_path / "costs.jsonl").write_text("[1, 2\nnull\n")
    assert Costs(tmp_path).known == {}


# Records


def test_records_have_the_schema_and_a_row_for_each_image(outputs):
    records = outputs.records()
    assert records.schema == SCHEMA
    assert records.height == 5 * 20
    assert records["image"].n_unique() == 20
    assert set(records["model"].unique()) == {"plain", "copy"}
    assert records.filter(pl.col("attacker") == "none")["attack"].is_null().all()


def test_records_say_what_the_attack_did(outputs):
    records = outputs.records()
    attacked = records.filter(pl.col("attack") == "PGD(steps=2)", model="plain")
    node = plans.plan()[1]
    model = outputs.model(node.on)
    clean = node.images.to_float()
    result = node.attack(model, clean, node.images.labels, node.threat)
    assert attacked["success"].to_list() == result.success.tolist()
    assert attacked["forwards"].to_list() == result.forwards.tolist()
    assert attacked["prediction"].to_list() == model.predict(result.candidates).tolist()
    found = demur.outcomes(model, result.candidates, node.images.labels)
    assert attacked["outcome"].to_list() == [OUTCOMES[one] for one in found.tolist()]
    largest = attacks.sizes(clean, result.candidates)
    for norm in ("linf", "l2", "l1", "l0"):
        assert attacked[norm].to_list() == pytest.approx(largest[norm].tolist())
    assert attacked["eps"].unique().to_list() == [0.1]
    assert attacked["mask"].null_count() == 0


def test_transferred_records_are_scored_on_the_other_model(outputs):
    rows = outputs.records().filter(model="copy")
    same = outputs.records().filter(pl.col("attack") == "PGD(steps=2)", model="plain")
    # The copy is the same network: what the attack sends does the same there.
    assert rows["prediction"].to_list() == same["prediction"].to_list()
    assert rows["forwards"].is_null().all()


def test_parquet_opens_in_polars_as_it_was(outputs, tmp_path):
    from demur.evaluation.records import write_parquet

    write_parquet(outputs.records(), tmp_path / "records.parquet")
    again = pl.read_parquet(tmp_path / "records.parquet")
    assert_frame_equal(again, outputs.records())


def test_a_smallest_change_and_an_eps_for_each_image_are_recorded(tmp_path):
    shown = plans.images(4)
    sizes = torch.tensor([0.0, 0.1, 0.2, math.inf])
    asked = [
        Evaluate(loaded(), shown, ThreatModel("l2"), DDN(steps=5)),
        Evaluate(loaded(), shown, ThreatModel("l2", sizes), PGD(steps=5)),
    ]
    records = plans.run(tmp_path, asked).records()
    assert records["eps"].to_list()[:4] == [None] * 4
    assert records["eps"].to_list()[4:] == pytest.approx(sizes.tolist())


def test_the_worst_case_takes_the_worst_outcome_of_each_image(outputs):
    records = outputs.records().filter(model="plain")
    worst = worst_case(records)
    assert worst.height == 20
    order = {name: place for place, name in enumerate(OUTCOMES)}
    for row in worst.iter_rows(named=True):
        all_of = records.filter(index=row["index"])["outcome"].to_list()
        assert order[row["outcome"]] == max(order[one] for one in all_of)


def test_measurements_are_a_table(outputs):
    table = outputs.measurements()
    assert table.columns == ["node", "name", "value", "n", "low", "high"]
    clean = outputs.records([plans.plan()[0]])
    assert table["value"].to_list() == pytest.approx([clean["class_margin"].mean()])
    assert table["n"].to_list() == [20]


@dataclasses.dataclass(frozen=True)
class NothingCertified:
    def certify(self, classifier, images, labels, threat):
        return torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images))


def test_a_certifier_fills_its_columns(tmp_path):
    asked = [Certify(loaded(), plans.images(3), ThreatModel("linf", 0.1), NothingCertified())]
    records = plans.run(tmp_path, asked).records()
    assert records["certified"].to_list() == [False] * 3
    assert records["certified_radius"].to_list() == [0.0] * 3


def test_a_node_that_makes_no_sense_is_refused():
    with pytest.raises(DemurError, match="an attack needs a threat"):
        Evaluate(loaded(), plans.images(2), None, PGD())
    with pytest.raises(DemurError, match="nothing to transfer"):
        Evaluate(loaded(), plans.images(2), None, through=loaded("b"))


def test_an_error_of_a_task_reaches_the_caller_and_keeps_what_was_computed(tmp_path):
    asked = [*plans.plan()[:1], Measure(fail, ())]
    with pytest.raises(DemurError, match="no such thing"):
        plans.run(tmp_path, asked)
    engine = Counting()
    plans.run(tmp_path, asked[:1], engine=engine)
    assert engine.tasks == []


def fail():
    raise DemurError("no such thing.")


def test_a_recipe_that_changes_its_base_changes_no_other_result(tmp_path):
    model = plans.trained()
    changed = Train(Zeroed(), model.data, 0, base=model, name="zeroed")
    shown = plans.images(5)
    asked = [Evaluate(changed, shown, None), Evaluate(model, shown, None)]
    found = plans.run(tmp_path / "both", asked).records().filter(model="plain")
    alone = plans.run(tmp_path / "alone", asked[1:]).records()
    assert found["class_margin"].to_list() == alone["class_margin"].to_list()


@dataclasses.dataclass(frozen=True)
class Zeroed:
    def train(self, given):
        with torch.no_grad():
            for parameter in given.base.parameters():
                parameter.zero_()
        return given.base


def test_two_models_of_one_name_are_refused(tmp_path):
    shown = plans.images(3)
    asked = [Evaluate(loaded(one), shown, None) for one in "ab"]
    with pytest.raises(DemurError, match="two models of the plan are called 'model'"):
        plans.run(tmp_path, asked).records()


def test_code_that_no_fingerprint_can_follow_is_refused():
    with pytest.raises(DemurError, match="needs a function of a module"):
        Keys(HERE).of(Measure(lambda: []))
    namespace = {"__name__": "nowhere", "dataclass": dataclasses.dataclass}
    exec("@dataclass(frozen=True)\nclass Loose:\n    a: int = 1", namespace)
    node = dataclasses.replace(plans.trained(), recipe=namespace["Loose"]())
    with pytest.raises(DemurError, match="not defined in a file"):
        Keys(HERE).of(node)


# The folder of a run


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_one_works(tmp_path):
    folder = tmp_path / "run"
    said = f"in use by process {os.getpid()}"
    with claimed(folder, {"a": 1}), pytest.raises(DemurError, match=said):
        claimed(folder, {"a": 1}).__enter__()
    with claimed(folder, {"a": 1}):  # free again
        pass


def test_a_folder_of_another_run_or_with_other_files_is_refused_and_stays_as_it_is(tmp_path):
    with claimed(tmp_path / "run", {"a": 1}):
        pass
    with (
        pytest.raises(DemurError, match="another configuration"),
        claimed(tmp_path / "run", {"a": 2}),
    ):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(DemurError, match="holds no run"), claimed(other, {"a": 1}):
        pass
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DemurError, match="is a file"), claimed(tmp_path / "file", {"a": 1}):
        pass


@pytest.mark.slow
def test_a_lock_of_a_killed_process_does_not_stay(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from demur.evaluation.folder import claimed\n"
        "with claimed(Path(sys.argv[1]), {'a': 1}): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")])
    assert (tmp_path / "run" / ".lock.json").exists()
    with claimed(tmp_path / "run", {"a": 1}):
        assert json.loads((tmp_path / "run" / ".lock.json").read_text())[0] == os.getpid()
