"""Descriptions in MLflow: what a run is, its result, and links; an experiment's description only where no user wrote one."""

from __future__ import annotations

import pytest

from dann_experiments.names import Tag
from dann_experiments.tracking.notes import (
    description,
    escaped,
    experiment_description,
    iou_changes,
    link,
    links_of,
    near_floors,
    note_to_set,
    run_page,
)
from dann_experiments.tracking.store import open_store

PAGES = "?workflowType=machine_learning"


def test_a_description_opens_with_what_the_run_is_and_its_result():
    before = {"iou/target_val": 0.5124, "iou/source_val": 0.95}
    after = {"iou/target_val": 0.6231, "iou/source_val": 0.94, "iou/target_test": 0.6, "da/probe_acc": 0.7}
    told = description("DANN mnist-m seed 0", iou_changes(before, after), ["[a](#b)"], "raise lambda_da\nor so")
    assert told.split("\n\n") == [
        "**DANN mnist-m seed 0**: target val IoU 0.512 → 0.623, source val IoU 0.950 → 0.940, target test IoU 0.600.",
        "[a](#b)",
        "raise lambda\\_da or so",
    ]
    assert description("x", []) == "**x**."
    assert iou_changes({"iou/target_val": float("nan")}, {"iou/target_val": 0.5, "iou/source_val": float("nan")}) == [
        "target val IoU 0.500"
    ]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a_b_c *x* `y`", r"a\_b\_c \*x\* \`y\`"),
        ("[click](http://x)", r"\[click\](http://x)"),
        ("<script>1</script> & co", "&lt;script&gt;1&lt;/script&gt; &amp; co"),
        ("two\n\n# lines\\", r"two # lines\\"),
    ],
)
def test_names_are_text_and_never_markup(name, shown):
    assert escaped(name) == shown


def test_links_name_the_pages_of_runs_and_files():
    assert run_page("1", "ab") == f"#/experiments/1/runs/ab{PAGES}"
    assert run_page("1", "ab", "figures/a b.png") == f"#/experiments/1/runs/ab/artifacts/figures/a%20b.png{PAGES}"
    assert link("a]b", "#/x?y='(1)'") == r"[a\]b](#/x?y='%281%29')"
    tags = {Tag.COMPARISON: "c1", Tag.SWEEP_RUN_ID: "s1", "seed": 0}
    assert links_of(tags, "7") == [
        f"Made for [comparison](#/experiments/7/runs/c1{PAGES})", f"Made for [sweep](#/experiments/7/runs/s1{PAGES})"
    ]  # fmt: skip


def test_an_adaptation_links_to_its_source_model_and_its_curves(shared_runs):
    result, source = shared_runs.result("adapt"), shared_runs.result("pretrain")
    client = open_store(result.tracking_uri, None).client
    tags = client.get_run(result.run_id).data.tags
    opening, links, explained = tags[Tag.NOTE].split("\n\n")
    was, now = result.baseline["iou/target_val"], result.metrics["iou/target_val"]
    floor = result.metrics["floor/target_val"]
    assert opening.startswith(f"**DANN target seed 0**: target val IoU {was:.3f} → {now:.3f} (floor {floor:.3f}")
    assert ", source val IoU " in opening
    at = source.experiment_id
    assert f"[source model source seed 0](#/experiments/{at}/runs/{source.run_id}{PAGES})" in links
    assert f"[curves](#/experiments/{at}/runs/{result.run_id}/artifacts/figures/curves.png{PAGES})" in links
    assert "figures/curves.png" in [item.path for item in client.list_artifacts(result.run_id, "figures")]
    assert explained == escaped(tags[Tag.ALIGNMENT])
    assert (
        client.get_run(source.run_id).data.tags[Tag.NOTE].startswith("**source model source seed 0**: target val IoU ")
    )


def test_an_experiment_is_described_once_and_a_user_s_own_words_are_kept(workplace):
    store = open_store(None, "described")

    def tags() -> dict[str, str]:
        open_store(None, "described")
        return store.client.get_experiment(store.experiment_id).tags

    assert tags()[Tag.NOTE] == experiment_description()
    assert note_to_set(tags()) == {}
    old = {Tag.NOTE: "of an earlier version", Tag.NOTE_DIGEST: note_digest("of an earlier version")}
    for key, text in old.items():
        store.client.set_experiment_tag(store.experiment_id, key, text)
    assert tags()[Tag.NOTE] == experiment_description()
    store.client.set_experiment_tag(store.experiment_id, Tag.NOTE, experiment_description() + " And ours.")
    assert tags()[Tag.NOTE].endswith(" And ours.")
    store.client.set_experiment_tag(store.experiment_id, Tag.NOTE, " ")
    assert tags()[Tag.NOTE] == experiment_description()


def note_digest(text: str) -> str:
    from dann_experiments.tracking import notes

    return notes._digest(text)


def test_looking_at_an_experiment_does_not_describe_it(workplace):
    store = open_store(None, "looked at")
    number = store.client.create_experiment("of others")
    open_store(None, "of others", for_runs=False)
    assert Tag.NOTE not in store.client.get_experiment(number).tags


def test_a_score_stands_beside_its_floor_and_one_near_it_is_said_to_be():
    after = {"iou/target_val": 0.326, "floor/target_val": 0.315, "iou/source_val": 0.8, "floor/source_val": 0.4}
    assert iou_changes({"iou/target_val": 0.283}, after) == [
        "target val IoU 0.283 → 0.326 (floor 0.315, not clearly above it)",
        "source val IoU 0.800 (floor 0.400)",
    ]
    (said,) = near_floors(after)
    assert said.startswith("iou/target_val 0.326 is not clearly above its floor: 0.315 is")
    assert (
        near_floors({"iou/target_val": 0.326}) == near_floors({"iou/target_val": 0.35, "floor/target_val": 0.315}) == []
    )
