"""What texts of a user are called in the store: legal, distinct, and as long as it takes, by real stores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_sweep_cluster import database, free_port, postgresql, start_server, stop_server  # noqa: F401  (fixtures)

from dann_experiments import load_config
from dann_experiments.config import InputError, flatten
from dann_experiments.config.store_names import LONGEST_LABEL, is_key, labels_in_store, shortened
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.sender import Sender
from dann_experiments.tracking.store import Store, open_store
from dann_experiments.training.monitor import metrics_to_choose_by
from dann_experiments.training.scoring import Scores

CLASSES = (
    "tree", "Tree", "low veg. 2-a", "a/b", "a_b", "a:b", "建物", "道路", "Straße", "", ".", "..", "x" * 300,
    "x" * 299 + "y", "😀", "😁", " lead", "trail ", "ä", "a\u0308", "a\nb", "C:\\x", "100 %", "'\"`",
)  # fmt: skip


def log_everything(store: Store, folder: Path) -> str:
    """A run whose texts are all as hard as they get; its id."""
    scores = Scores(np.eye(len(CLASSES), dtype=np.int64), 0.5, np.ones(len(CLASSES)))
    long = "建" * 20_000
    with tracked_run(store, long, "x", {"dann.arm": long, "note": "é" * 9000}, folder, use_claimed=False) as run:
        run.log_metrics(scores.all_metrics("target_test", CLASSES), step=0)
        run.log_params({"data.source.train": [f"file {i}.tif" for i in range(5000)], "data.class_names": list(CLASSES)})
        run.set_tags({"dann.verdict": "not " * 4000})
        run.log_input(long, "0" * 32, "source train", ", ".join([long, '"\\\n\x01' * 9000]), '{"images": 5000}')
    return run.run_id


def check_everything(store: Store, run_id: str) -> None:
    run = store.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for kind in ("class_iou", "precision", "recall", "f1", "ap", "share", "true_share"):
        found = [name for name in run.data.metrics if name.startswith(f"{kind}/target_test/")]
        assert len(found) == len(CLASSES)
        expected = 1 / len(CLASSES) if "share" in kind else 1.0
        assert all(run.data.metrics[name] == pytest.approx(expected) for name in found)
    assert "(cut: " in run.data.params["cfg.data.source.train"]
    assert len(run.data.params["cfg.data.source.train"]) == 6000
    assert run.data.params["cfg.data.class_names"] == str(list(CLASSES))
    assert run.info.run_name.startswith("建建")
    assert "(cut: 20000 letters" in run.info.run_name
    assert all("(cut: " in run.data.tags[key] for key in ("dann.arm", "note", "dann.verdict"))
    (item,) = run.inputs.dataset_inputs
    assert "(cut: 20000 letters" in item.dataset.name
    assert "(cut: " in json.loads(item.dataset.source)["uri"]
    name = f"class_iou/target_test/{labels_in_store(CLASSES)['建物']}"
    found = store.client.search_runs([store.experiment_id], f"metrics.`{name}` > 0.5")
    assert [one.info.run_id for one in found] == [run_id]


def test_a_sqlite_store_takes_every_text(workplace):
    store = open_store(None, "texts")
    check_everything(store, log_everything(store, workplace / "outputs"))


def test_a_server_takes_every_text(server, workplace):
    store = open_store(server, "texts")
    check_everything(store, log_everything(store, workplace / "outputs"))


@pytest.mark.slow
def test_postgresql_which_keeps_to_its_columns_takes_every_text(workplace, database):  # noqa: F811
    store = open_store(database, "texts")
    check_everything(store, log_everything(store, workplace / "outputs"))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["low_veg 2.0-a", "tree"], ["low_veg 2.0-a", "tree"]),
        (["Straße/Weg (asphalt)"], ["Stra_e_Weg _asphalt_"]),  # as earlier versions called it
        (["建物", "道路", "tree"], ["建物", "道路", "tree"]),
        (["建物"], ["建物"]),
        (["Tree", "tree"], ["Tree", "tree"]),
    ],
)
def test_labels_are_called_by_their_letters(labels, names):
    assert list(labels_in_store(labels).values()) == names


def test_a_label_that_would_be_called_as_another_gets_a_digest_and_the_plain_one_stays():
    called = labels_in_store(["a/b", "a_b", "a:b"])
    assert called["a_b"] == "a_b"
    assert called["a/b"].startswith("a_b-")
    assert called["a:b"].startswith("a_b-")
    assert len(set(called.values())) == 3


def test_a_label_that_is_another_s_name_with_its_digest_takes_nobody_s_name():
    trap = labels_in_store(["a/b", "a_b"])["a/b"]
    called = labels_in_store(["a/b", "a_b", trap])
    assert called[trap] == trap
    assert len(set(called.values())) == 3


def longest_names(labels: Sequence[str]) -> list[str]:
    called = labels_in_store(labels)
    return [f"{start}{called[label]}{end}" for label in labels for start, end in (
        ("class_iou/target_test/", ""), ("precision/source_test/", ""), ("true_share/source_test/", ""),
        ("compare/source_test/", "/mean"))]  # fmt: skip


def test_whatever_the_labels_their_names_are_legal_and_distinct():
    generator = np.random.default_rng(0)
    signs = np.array(list("ab AB_-./:\\,;\n\x00é建😀%'\"0"))
    for _ in range(300):
        labels = list({"".join(generator.choice(signs, generator.integers(0, 5))) for _ in range(30)})
        names = longest_names(labels)
        assert len(set(names)) == len(names)
        assert all(map(is_key, names)), [name for name in names if not is_key(name)]


def test_the_longest_label_still_fits_the_longest_name():
    assert all(map(is_key, longest_names(["x" * LONGEST_LABEL, "y" * 5000])))


def test_the_rule_of_names_is_mlflow_s():
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric

    for name in ("a", "a/b", "a//b", "/a", "a/", ".", "..", "../a", "a/../b", "a/./b", "", "a,b", "a:b", "größe/建", "x" * 250,
                 "x" * 251, " ", "a b", "a\nb", "...", "..a", "a\n"):  # fmt: skip
        try:
            _validate_metric(name, 1.0, 0, 0)
            taken = name != ""
        except MlflowException:
            taken = False
        assert is_key(name) <= taken, name
        assert is_key(name) == taken or name in ("..a", "...", "a\n"), name


@pytest.mark.parametrize("name", ["a,b", "x" * 251, "a//b", "/a", ".."])
def test_a_metric_that_mlflow_would_never_take_is_refused_at_once(tmp_path, name):
    sender = Sender(None, "0" * 32, tmp_path / "run")
    with pytest.raises(ValueError, match="MLflow allows letters"):
        sender.put({name: 1.0}, step=0)
    sender._given_up = True


def test_a_tag_that_mlflow_would_not_take_is_told_before_a_run_is_made(workplace):
    store = open_store(None, "tags")
    with (
        pytest.raises(InputError, match="tag 'a,b'"),
        tracked_run(store, None, "x", {"a,b": 1}, workplace / "outputs", use_claimed=False),
    ):
        raise AssertionError
    assert store.client.search_runs([store.experiment_id]) == []


def test_a_text_that_is_cut_says_so_and_different_texts_stay_different():
    assert shortened("x" * 100, 100) == "x" * 100
    first, second = shortened("x" * 300 + "a", 100), shortened("x" * 300 + "b", 100)
    assert len(first) == len(second) == 100
    assert first != second
    assert "(cut: 301 letters, digest " in first


def test_an_experiment_name_that_mlflow_does_not_take_is_told_by_its_setting(workplace):
    with pytest.raises(InputError, match=r"tracking\.experiment has 501 characters"):
        open_store(None, "x" * 501)


def test_every_setting_is_a_legal_param():
    assert all(is_key(f"cfg.{key}") for key in flatten(load_config()))


def test_classes_that_would_be_called_alike_can_each_choose_the_checkpoint(squares):
    names = ["建物", "道路"]
    config = load_config(None, {"data.class_names": names, "model.classes": 2})
    known = metrics_to_choose_by(config.class_names)
    assert {f"class_iou/target_val/{name}" for name in names} <= set(known)
    assert len(set(known)) == len(known)
