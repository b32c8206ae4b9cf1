"""How well target-free scores choose: rank correlation and regret of tables with known answers."""

import math

import numpy as np
import pandas as pd
import pytest

from dann_experiments.comparison.selection_quality import COLUMNS, per_epoch_choices, score_quality

ORACLE = "iou/target_val"
NAN = math.nan


def table(group="run", **columns):
    """Candidates; `entropy` stands for select/entropy and so on."""
    names = {"oracle": ORACLE, "source": "iou/source_val", "kept": "select/source_kept"}
    renamed = {names.get(name, f"select/{name}"): values for name, values in columns.items()}
    return pd.DataFrame({"group": group} | renamed)


def quality(choices):
    return score_quality(choices, ORACLE).set_index("score")


def test_a_perfect_score_correlates_by_1_and_costs_nothing_in_either_direction():
    found = quality(table(oracle=[0.3, 0.5, 0.4], infomax=[0.1, 0.9, 0.2], entropy=[0.8, 0.1, 0.7]))
    assert found.spearman[["select/infomax", "select/entropy"]].tolist() == pytest.approx([1, 1])
    assert found.regret[["select/infomax", "select/entropy"]].tolist() == [0, 0]
    assert found.better[["select/infomax", "select/entropy"]].tolist() == ["max", "min"]


def test_a_misleading_score_correlates_by_minus_1_and_costs_the_whole_range():
    found = quality(table(oracle=[0.3, 0.5, 0.4], infomax=[0.9, 0.1, 0.2], entropy=[0.1, 0.8, 0.7]))
    assert found.spearman[["select/infomax", "select/entropy"]].tolist() == pytest.approx([-1, -1])
    assert found.regret[["select/infomax", "select/entropy"]].tolist() == pytest.approx([0.2, 0.2])


def test_ranks_count_and_groups_weigh_equally():
    # ranks of oracle 1 2 3 4 against 1 2 4 3: 1 - 6 * 2 / (4 * 15) = 0.8; the second group is upside down
    one = table("a", oracle=[0.1, 0.2, 0.3, 0.4], bnm=[0.1, 0.2, 100.0, 0.5])
    two = table("b", oracle=[0.5, 0.7], bnm=[0.6, 0.5])
    found = quality(pd.concat([one, two])).loc["select/bnm"]
    assert found.spearman == pytest.approx((0.8 - 1) / 2)
    assert found.regret == pytest.approx((0.1 + 0.2) / 2)
    assert (found.groups, found.candidates) == (2, 6)


def test_candidates_are_ranked_within_their_group_also_when_groups_alternate():
    choices = pd.concat([table("a", oracle=[0.1, 0.2], snd=[0.5, 0.6]), table("b", oracle=[0.8, 0.9], snd=[0.1, 0.2])])
    found = quality(choices.iloc[[0, 2, 1, 3]]).loc["select/snd"]
    assert (found.spearman, found.regret, found.groups) == (pytest.approx(1), 0, 2)


def test_the_naive_choice_and_the_last_candidate_stand_beside_the_scores():
    found = quality(table(oracle=[0.3, 0.6, 0.5], source=[0.9, 0.7, 0.8], entropy=[0.5, 0.2, 0.1]))
    assert found.index.tolist() == ["select/entropy", "iou/source_val", "last"]
    assert found.regret.tolist() == pytest.approx([0.1, 0.3, 0.1])
    assert found.spearman.tolist() == pytest.approx([0.5, -1, 0.5])
    assert score_quality(table(oracle=[0.3]), ORACLE).columns.tolist() == list(COLUMNS)


def test_of_equal_scores_the_first_is_chosen():
    found = quality(table(oracle=[0.3, 0.4, 0.6], bnm=[0.1, 0.7, 0.7], entropy=[0.2, 0.2, 0.2]))
    assert found.regret[["select/bnm", "select/entropy"]].tolist() == pytest.approx([0.2, 0.3])


@pytest.mark.filterwarnings("error")
def test_groups_that_cannot_be_ranked_are_left_out_of_the_correlation_alone():
    varied = table("a", oracle=[0.1, 0.2], bnm=[0.3, 0.4])
    constant = table("b", oracle=[0.1, 0.2], bnm=[0.3, 0.3])
    same_truth = table("c", oracle=[0.2, 0.2], bnm=[0.3, 0.4])
    single = table("d", oracle=[0.1], bnm=[0.3])
    found = quality(pd.concat([varied, constant, same_truth, single])).loc["select/bnm"]
    assert found.spearman == pytest.approx(1)
    assert found.regret == pytest.approx(0.1 / 4)
    assert found.groups == 4
    assert math.isnan(quality(constant).loc["select/bnm"].spearman)


def test_only_candidates_that_keep_the_source_may_be_chosen_for_regret_kept():
    found = quality(
        table(oracle=[0.6, 0.3, 0.5, 0.2], kept=[0, 1, 1, 0], source=[0.9, 0.5, 0.6, 0.3], infomax=[0.9, 0.4, 0.3, 0.1],
              entropy=[0.3, 0.2, 0.1, 0.0])
    )  # fmt: skip
    assert found.regret[["select/infomax", "select/entropy", "iou/source_val", "last"]].tolist() == pytest.approx(
        [0, 0.4, 0, 0.4]
    )
    # the best of all, 0.6, is what they are held against
    assert found.regret_kept[["select/infomax", "select/entropy", "iou/source_val", "last"]].tolist() == pytest.approx(
        [0.3, 0.1, 0.1, 0.1]
    )


def test_where_no_candidate_keeps_the_source_a_score_takes_the_first_and_the_others_choose_among_all():
    found = quality(table(oracle=[0.3, 0.6], kept=[0, 0], source=[0.1, 0.2], snd=[0.1, 0.2]))
    assert found.regret_kept.tolist() == pytest.approx([0.3, 0, 0])
    assert found.regret.tolist() == [0, 0, 0]


def test_without_the_source_s_state_regret_kept_is_not_known():
    assert quality(table(oracle=[0.3, 0.6], snd=[0.1, 0.2])).regret_kept.isna().to_numpy().all()


def test_a_score_that_is_nan_counts_as_its_worst_and_a_candidate_without_truth_not_at_all():
    found = quality(table(oracle=[0.5, 0.1, NAN, 0.4], entropy=[0.9, NAN, 0.0, 0.8], infomax=[0.2, NAN, 0.9, 0.0],
                          source=[0.3, NAN, 0.9, 0.2]))  # fmt: skip
    assert found.regret[["select/entropy", "select/infomax", "iou/source_val"]].tolist() == pytest.approx([0.1, 0, 0])
    assert found.spearman[["select/entropy", "select/infomax", "iou/source_val"]].tolist() == pytest.approx([0.5, 1, 1])
    assert found.candidates.tolist() == [3, 3, 3, 3]


def test_a_group_without_any_value_of_a_score_does_not_count_for_it():
    choices = pd.concat([table("a", oracle=[0.1, 0.4], snd=[NAN, NAN]), table("b", oracle=[0.1, 0.3], snd=[0.5, 0.4])])
    found = quality(choices)
    assert found.loc["select/snd", ["groups", "candidates"]].tolist() == [1, 2]
    assert found.loc["select/snd", "regret"] == pytest.approx(0.2)
    assert found.loc["last", "groups"] == 2


def test_no_candidates_give_a_table_without_numbers():
    found = quality(table(oracle=[], source=[], snd=[]))
    assert found.groups.tolist() == [0, 0, 0]
    assert found[["spearman", "regret", "regret_kept"]].isna().to_numpy().all()


def test_by_chance_a_score_correlates_by_0_on_average():
    generator = np.random.default_rng(0)
    groups = [table(str(i), oracle=generator.random(10), bnm=generator.random(10)) for i in range(300)]
    assert abs(quality(pd.concat(groups)).loc["select/bnm", "spearman"]) < 0.06


HISTORY = {
    ORACLE: [(0, 0.3), (10, 0.4), (20, 0.5), (30, 0.6)],
    "iou/source_val": [(0, 0.9), (10, 0.8), (20, 0.7), (30, 0.6)],
    "select/entropy": [(0, 0.5), (10, 0.4), (30, 0.2)],
    "select/snd": [(0, 0.1), (10, 0.2), (20, 0.3), (30, 0.4)],
    "select/source_kept": [(10, 1.0), (30, 0.0)],
    "da/lambda": [(step, 0.5) for step in range(30)],
}


def test_a_run_gives_a_candidate_for_each_validation_with_oracle_and_scores():
    found = per_epoch_choices(HISTORY, "run 1")
    assert found.columns.tolist() == [
        "group", "step", ORACLE, "iou/source_val", "select/entropy", "select/snd", "select/source_kept"
    ]  # fmt: skip
    assert found["step"].tolist() == [0, 10, 30]
    assert found["group"].tolist() == ["run 1"] * 3
    assert found[ORACLE].tolist() == [0.3, 0.4, 0.6]
    assert found["select/entropy"].tolist() == [0.5, 0.4, 0.2]
    assert found["select/source_kept"].tolist() == pytest.approx([NAN, 1, 0], nan_ok=True)


def test_candidates_stand_in_order_of_steps_and_the_last_value_of_a_step_counts():
    history = {ORACLE: [(1000, 0.5), (7, 0.4), (1000, 0.7)], "select/bnm": [(7, 0.1), (1000, 0.2)]}
    found = per_epoch_choices(history, "a")
    assert found["step"].tolist() == [7, 1000]
    assert found[ORACLE].tolist() == [0.4, 0.7]
    assert found["iou/source_val"].isna().to_numpy().all()


@pytest.mark.parametrize("missing", [[ORACLE], ["select/entropy", "select/snd"]])
def test_a_run_without_oracle_or_without_scores_gives_no_candidates(missing):
    found = per_epoch_choices({name: points for name, points in HISTORY.items() if name not in missing}, "a")
    assert len(found) == 0
    assert {"group", ORACLE, "iou/source_val"} <= set(found)


def test_the_candidates_of_several_runs_go_into_one_table_of_quality():
    choices = pd.concat([per_epoch_choices(HISTORY, "a"), per_epoch_choices(HISTORY, "b")])
    found = quality(choices)
    assert found.loc["select/entropy", ["groups", "candidates"]].tolist() == [2, 6]
    assert found.regret["select/entropy"] == 0
    assert found.regret_kept["select/entropy"] == pytest.approx(0.2)
    assert found.regret["iou/source_val"] == pytest.approx(0.3)
