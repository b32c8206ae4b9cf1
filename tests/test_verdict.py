"""The verdict: each outcome on hand-made scores, and its error rates on scores drawn with a known answer (docs/verdict.md)."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dann_experiments.comparison.verdict import ClassScores, Interval, difference_table, judge, paired

SOURCE = {0: 0.50, 1: 0.52, 2: 0.49, 3: 0.51, 4: 0.50}
CASES = 400


def shifted(by, wobble=(0.004, -0.003, 0.001, -0.004, 0.002), base=SOURCE):
    """Scores that many above `base`, not by the same amount in each seed."""
    return {seed: score + by + wobble[seed] for seed, score in base.items()}


OTHER = (-0.002, 0.004, -0.003, 0.001, 0.0)
"""Another wobble."""


def verdict(adapted, control, source_only=SOURCE, **kwargs):
    return judge("DANN", "iou/target_test", adapted, control, source_only, **kwargs)


# --- the interval


def test_the_interval_is_students_t_of_the_paired_differences():
    a, b = {1: 0.60, 2: 0.66, 3: 0.61, 4: 0.70}, {1: 0.55, 2: 0.58, 3: 0.60, 4: 0.61}
    found = paired(a, b, confidence=0.9)
    differences = np.array([a[seed] - b[seed] for seed in a])
    low, high = stats.t.interval(0.9, 3, loc=differences.mean(), scale=stats.sem(differences))
    expected = (differences.mean(), low, high, differences.std(ddof=1))
    assert (found.mean, found.low, found.high, found.std) == pytest.approx(expected)
    assert found.n == 4


def test_seeds_that_only_one_arm_has_and_scores_that_are_missing_are_left_out():
    found = paired({0: 0.6, 1: 0.7, 2: math.nan, 3: 0.9, 5: 0.8}, {0: 0.5, 1: 0.5, 2: 0.5, 4: 0.1, 5: math.inf})
    assert (found.n, found.mean) == (2, pytest.approx(0.15))


def test_one_seed_has_a_difference_but_no_interval_and_no_seed_has_neither():
    one, none = paired({0: 0.6}, {0: 0.5}), paired({0: 0.6}, {1: 0.5})
    assert one.mean == pytest.approx(0.1)
    assert all(math.isnan(value) for value in (one.low, one.high, one.std, none.mean, none.low))
    assert (one.n, none.n) == (1, 0)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence is .*0\.95"):
        paired(SOURCE, SOURCE, confidence)


# --- the floor, and classes that are lost


def test_a_gain_near_the_floor_is_not_called_help():
    helped = verdict(shifted(0.1), shifted(0.02, OTHER), floor=0.5)
    assert helped.outcome == "helped"
    assert helped.against_floor == paired(shifted(0.1), dict.fromkeys(SOURCE, 0.5))
    near = verdict(shifted(0.1), shifted(0.02, OTHER), floor=0.602)
    assert near.outcome == "at the floor"
    assert "against the 60.2 of a map that is one class everywhere" in near.reason
    assert near.against_floor is not None
    assert near.against_floor.low < 0 < near.against_floor.high
    below = verdict(shifted(0.1), shifted(0.02, OTHER), floor=0.8)  # better than before, and worse than a constant
    assert below.outcome == "at the floor"


def test_what_the_control_gains_near_the_floor_is_not_explained_but_at_the_floor():
    assert verdict(shifted(0.1), shifted(0.1, OTHER)).outcome == "explained by BatchNorm statistics"
    assert verdict(shifted(0.1), shifted(0.1, OTHER), floor=0.6).outcome == "at the floor"


def test_less_than_a_point_above_the_floor_is_at_the_floor():
    steady = {seed: 0.6 + seed / 10_000 for seed in SOURCE}  # mean 60.02
    found = verdict(steady, shifted(0.02, OTHER), floor=0.594)
    assert found.against_floor is not None
    assert found.against_floor.low > 0
    assert found.outcome == "at the floor"
    assert verdict(steady, shifted(0.02, OTHER), floor=0.59).outcome == "helped"


@pytest.mark.parametrize("by", [-0.05, 0.0])
def test_the_floor_changes_nothing_for_an_arm_that_gains_nothing(by):
    for control in (shifted(0.0, OTHER), shifted(0.05, OTHER)):
        known, unknown = verdict(shifted(by), control, floor=0.5), verdict(shifted(by), control)
        assert (known.outcome, known.reason) == (unknown.outcome, unknown.reason)
        assert unknown.against_floor is None


def of_class(adapted, control=0.0, base=0.2, wobble=(0.004, -0.003, 0.001, -0.004, 0.002)):
    """A class whose IoU in D and C is that much above its IoU in S, which is near `base`."""
    source = {seed: base + (score - 0.5) / 10 for seed, score in SOURCE.items()}
    return ClassScores(shifted(adapted, wobble, source), shifted(control, OTHER, source), source)


@pytest.mark.parametrize(
    ("tree", "outcome"),
    [
        (of_class(0.02), "helped"),
        (of_class(-0.09), "helped"),  # the mean gains 10: the others give what this class pays for
        (of_class(-0.11), "at the cost of a class"),  # by more than the mean gains
        (of_class(-0.17), "at the cost of a class"),
        (of_class(-0.05, base=0.09), "at the cost of a class"),  # by less than the mean gains, but to 4
        (of_class(-0.02, base=0.06), "helped"),  # to 4 as well, but it was near 0 and kept most of it
        (of_class(-0.009, base=0.01), "helped"),  # less than a point
    ],
)
def test_a_gain_that_a_class_pays_for_is_not_called_help(tree, outcome):
    found = verdict(shifted(0.1), shifted(0.0, OTHER), classes={"ground": of_class(0.3), "tree": tree})
    assert found.outcome == outcome
    if outcome != "helped":
        assert "against source only the IoU of tree falls by" in found.reason
        assert "ground" not in found.reason
    assert verdict(shifted(0.1), shifted(0.0, OTHER)).outcome == "helped"


def test_a_class_that_the_control_gained_and_the_adversary_gives_up_is_a_cost_too():
    tree = of_class(0.0, control=0.2)  # the control finds trees; DANN does not, and gains 8 points over it by the rest
    found = verdict(shifted(0.1), shifted(0.02, OTHER), classes={"tree": tree})
    assert found.outcome == "at the cost of a class"
    assert "but against the control the IoU of tree falls by 20.0 points to 20.0" in found.reason


def test_a_class_lost_within_noise_is_no_evidence_of_help():
    wide = (0.25, -0.25, 0.2, -0.2, 0.0)
    tree = of_class(-0.15, base=0.4, wobble=wide)
    found = verdict(shifted(0.1), shifted(0.0, OTHER), classes={"tree": tree})
    assert found.outcome == "no evidence"
    assert "not told from noise" in found.reason
    assert (
        verdict(shifted(0.1), shifted(0.0, OTHER), classes={"tree": of_class(-0.05, 0, 0.4, wide)}).outcome == "helped"
    )


def test_a_class_without_scores_or_seeds_says_nothing():
    two = ClassScores({0: 0.0, 1: 0.0}, {0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    missing = ClassScores({}, {}, {})
    found = verdict(shifted(0.1), shifted(0.0, OTHER), classes={"tree": two, "town": missing})
    assert found.outcome == "helped"


def test_several_lost_classes_are_named_up_to_three():
    lost = {name: of_class(-0.17) for name in "abcde"}
    found = verdict(shifted(0.1), shifted(0.0, OTHER), classes=lost)
    assert "IoU of c falls" in found.reason
    assert "IoU of d falls" not in found.reason
    assert "and 2 more classes fall" in found.reason


# --- each outcome


def test_helped_needs_a_gain_over_the_source_model_and_over_the_control():
    found = verdict(shifted(0.1), shifted(0.02, OTHER))
    assert found.outcome == "helped"
    assert found.line.startswith(
        "DANN: helped. On iou/target_test, +10.0 points (95 % interval +9.6 to +10.4, 5 seeds)"
    )
    assert "+8.0 points" in found.reason
    assert found.against_source == paired(shifted(0.1), SOURCE)
    assert found.against_control == paired(shifted(0.1), shifted(0.02, OTHER))
    assert found.control_against_source == paired(shifted(0.02, OTHER), SOURCE)


def test_hurt_is_a_loss_against_the_source_model_whatever_the_control_does():
    for control in (shifted(-0.2, OTHER), shifted(0.1, OTHER), {}):
        found = verdict(shifted(-0.05), control)
        assert found.outcome == "hurt"
        assert "-5.0 points" in found.reason


def test_a_gain_that_the_control_has_as_well_is_explained_by_batchnorm_statistics():
    found = verdict(shifted(0.1), shifted(0.1, OTHER))
    assert found.outcome == "explained by BatchNorm statistics"
    assert "100 % of it" in found.reason
    assert "training for longer" in found.reason  # the control does that too, and cannot tell the two apart


def test_a_gain_over_the_control_of_less_than_a_point_is_explained_by_it():
    found = verdict(shifted(0.1), shifted(0.092))
    assert found.against_control.std < 1e-9
    wobbling = verdict(shifted(0.1), shifted(0.092, (0.0045, -0.003, 0.001, -0.004, 0.002)))
    assert wobbling.against_control.low > 0
    assert wobbling.outcome == "explained by BatchNorm statistics"


def test_half_of_the_gain_decides_whether_the_control_explains_it():
    wide = (0.05, -0.05, 0.04, -0.04, 0.0)  # adapted spreads so much that its gain over the control is unclear
    for control, outcome in ((0.051, "explained by BatchNorm statistics"), (0.049, "no evidence")):
        found = verdict(shifted(0.1, wide), shifted(control, OTHER))
        assert found.against_control.low < 0 < found.against_source.low
        assert found.outcome == outcome


def test_a_control_whose_own_gain_is_unclear_explains_nothing():
    found = verdict(shifted(0.1), shifted(0.08, (0.15, -0.15, 0.12, -0.12, 0.0)))
    assert found.control_against_source.mean > 0.05
    assert found.control_against_source.low < 0
    assert found.outcome == "no evidence"
    assert "the gain over the control is not wholly above 0" in found.reason


def test_a_control_without_seeds_or_spread_of_its_own_explains_nothing():
    adapted = {0: 0.61, 1: 0.60, 2: 0.59, 3: 0.60, 4: 0.62, 5: 0.61}
    apart = verdict(adapted, {3: 0.602, 4: 0.615, 5: 0.612}, {0: 0.50, 1: 0.51, 2: 0.50})
    assert apart.against_source.low > 0
    assert apart.control_against_source.n == 0
    assert apart.outcome == "no evidence"
    assert "unknown, 0 seeds shared" in apart.reason
    assert "nan" not in apart.reason
    two = verdict(adapted, {2: 0.602, 4: 0.615, 5: 0.612, 1: 0.592}, {0: 0.50, 1: 0.5001, 2: 0.51})
    assert two.control_against_source.low > 0
    assert two.control_against_source.n == 2
    assert two.outcome == "no evidence"
    copied = verdict(shifted(0.1), shifted(0.1, (0.0,) * 5))  # source scores + 10 points in every seed: not measured
    assert copied.control_against_source.low > 0
    assert copied.outcome == "no evidence"


def test_repairing_what_forwarding_the_target_broke_is_not_help():
    found = verdict(shifted(0.0), shifted(-0.08, OTHER))
    assert found.against_control.low > 0
    assert found.outcome == "no evidence"
    assert "repairs what forwarding the target broke (-8.0 points" in found.reason


def test_better_than_the_control_and_unclear_against_a_noisy_source_model_is_not_help():
    noisy = shifted(0.0, (0.15, -0.15, 0.1, -0.1, 0.0))
    found = verdict(shifted(0.05), shifted(0.02, OTHER), noisy)
    assert found.outcome == "no evidence"
    assert "not shown to beat the source model" in found.reason
    assert "repairs" not in found.reason


@pytest.mark.parametrize(("by", "control"), [(0.008, -0.05), (0.008, 0.0), (-0.008, 0.0)])
def test_less_than_a_point_is_neither_help_nor_harm(by, control):
    found = verdict(shifted(by), shifted(control, OTHER))
    assert found.against_source.low > 0 or found.against_source.high < 0
    assert found.outcome == "no evidence"


@pytest.mark.parametrize("base", [0.1, 0.3, 0.5, 0.6])
def test_a_gain_of_exactly_one_point_counts_whatever_its_rounding(base):
    source = {0: base, 1: base, 2: base}
    adapted = {0: base + 0.010, 1: base + 0.009, 2: base + 0.011}
    assert verdict(adapted, {0: base, 1: base, 2: base}, source).outcome == "helped"


# --- what can never be concluded


def test_without_the_control_nothing_but_harm_is_found():
    found = verdict(shifted(0.3), {})
    assert found.outcome == "no evidence"
    assert "without the lambda = 0 control nothing can be concluded" in found.reason
    assert found.against_control.n == 0
    assert verdict(shifted(0.3), {7: 0.5, 8: 0.5, 9: math.nan}).outcome == "no evidence"


@pytest.mark.parametrize("seeds", [0, 1, 2])
@pytest.mark.parametrize("lacking", ["all", "control"])
def test_fewer_than_three_seeds_are_no_evidence_of_anything_good(seeds, lacking):
    few = {seed: score for seed, score in SOURCE.items() if seed < seeds}
    control = shifted(0.0, OTHER, few)
    found = verdict(shifted(0.4, base=few), control, few) if lacking == "all" else verdict(shifted(0.4), control)
    assert found.outcome == "no evidence"
    if seeds or lacking == "all":
        assert "at least 3 seeds are needed" in found.reason


def test_fewer_than_three_seeds_are_no_evidence_of_harm():
    few = {0: 0.50, 1: 0.51}
    assert verdict(shifted(-0.4, base=few), few, few).outcome == "no evidence"


@pytest.mark.parametrize("by", [0.1, 0.0, -0.1])
def test_a_seed_that_changes_nothing_is_one_run_counted_several_times(by):
    same = (0.0,) * 5
    found = verdict(shifted(by, same), shifted(0.02, OTHER))
    assert found.outcome == "no evidence"
    assert (
        "the seed changed nothing" if by else "exactly the scores of source only: both give the same maps"
    ) in found.reason


def test_a_control_that_is_the_adapted_run_under_another_name_is_no_evidence():
    found = verdict(shifted(0.1), shifted(0.1))
    assert found.outcome == "no evidence"
    assert (
        "exactly the scores of the control: both trained alike, as they do if lambda is 0 in every step" in found.reason
    )


def test_a_control_that_equals_the_source_model_does_not_hide_a_gain():
    assert verdict(shifted(0.1), dict(SOURCE)).outcome == "helped"


def test_seeds_left_out_are_counted_in_the_reason():
    adapted = {**shifted(0.1), 3: math.nan, 9: 0.7}
    found = verdict(adapted, shifted(0.02, OTHER))
    assert found.against_source.n == 4
    assert "2 seeds lack a score in some arm" in found.reason
    assert "lack" not in verdict(shifted(0.1), shifted(0.02, OTHER)).reason


def test_the_order_of_the_seeds_does_not_matter():
    def backwards(scores):
        return dict(reversed(scores.items()))

    adapted, control = shifted(0.1), shifted(0.02, OTHER)
    assert verdict(adapted, control) == verdict(backwards(adapted), backwards(control), backwards(SOURCE))


def test_scores_in_percent_are_refused():
    with pytest.raises(ValueError, match=r"source_only scores of DANN hold 50; .*from 0 to 1"):
        verdict(shifted(0.1), shifted(0.0), {0: 50.0, 1: 51.0, 2: 52.0})


# --- several arms


def test_several_arms_share_the_five_percent():
    adapted, control = shifted(0.03, (0.02, -0.02, 0.015, -0.01, 0.0)), shifted(0.0, OTHER)
    alone, among_ten = verdict(adapted, control), verdict(adapted, control, arms=10)
    assert (alone.outcome, among_ten.outcome) == ("helped", "no evidence")
    assert among_ten.confidence == pytest.approx(0.995)
    assert among_ten.against_source == paired(adapted, SOURCE, among_ten.confidence)
    assert "99.5 % interval" in among_ten.reason
    with pytest.raises(ValueError, match="arms is 0"):
        verdict(adapted, control, arms=0)


def test_one_of_six_useless_arms_is_said_to_help_in_no_more_than_five_percent_of_the_comparisons():
    rng = np.random.default_rng(6)
    wrong = {1: 0, 6: 0}
    for _ in range(CASES):
        source, control, *arms = (dict(enumerate(rng.normal(mean, 0.02, 5))) for mean in (0.5, *[0.6] * 7))
        for level in wrong:
            wrong[level] += any(verdict(arm, control, source, arms=level).outcome == "helped" for arm in arms)
    assert wrong[6] <= 0.05 * CASES < wrong[1]


# --- drawn cases


def noise(rng, kind, size):
    """Noise of the arms S, C, D over seeds, standard deviation 1 but where an arm is meant to spread more: (3, cases, seeds)."""
    if kind == "heavy tails":
        return rng.standard_t(3, size) / math.sqrt(3)
    if kind.startswith("skewed"):
        drawn = (rng.lognormal(size=size) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1))
        return drawn if kind == "skewed up" else -drawn
    drawn = rng.standard_normal(size)
    if kind == "correlated":
        return 0.45 * drawn + 0.9 * rng.standard_normal(size[1:])
    if kind.startswith("noisy"):
        drawn[{"noisy control": 1, "noisy adapted": 2}[kind]] *= 4
    return drawn


def outcomes(kind, seeds, spread, control, adapted):
    """How often each outcome falls, when control and adapted truly lie that many points above source only."""
    rng = np.random.default_rng([seeds, spread])
    gains = np.array([0, control, adapted])[:, None, None]
    scores = np.clip(0.5 + (gains + spread * noise(rng, kind, (3, CASES, seeds))) / 100, 0, 1)
    return Counter(
        verdict(*(dict(enumerate(arm)) for arm in (adapted, control, source))).outcome
        for source, control, adapted in scores.transpose(1, 0, 2)
    )


KINDS = ["normal", "heavy tails", "skewed up", "skewed down", "correlated", "noisy control", "noisy adapted"]


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_not_called_help_nor_harm_nor_explained(kind, seeds):
    found = outcomes(kind, seeds, 2, 0, 0)
    assert max(found["helped"], found["hurt"], found["explained by BatchNorm statistics"]) <= 0.05 * CASES
    assert found["no evidence"] >= 0.95 * CASES


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_control_gains_is_not_called_help(kind, seeds):
    assert outcomes(kind, seeds, 2, 10, 10)["helped"] <= 0.05 * CASES


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_repairing_the_controls_loss_is_not_called_help(kind, seeds):
    assert outcomes(kind, seeds, 2, -10, 0)["helped"] <= 0.05 * CASES


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "skewed up", "skewed down", "correlated"])
def test_ten_points_at_a_spread_of_two_are_found_in_both_directions_and_in_the_control(kind, seeds):
    assert outcomes(kind, seeds, 2, 0, 10)["helped"] >= 0.8 * CASES
    assert outcomes(kind, seeds, 2, 0, -10)["hurt"] >= 0.8 * CASES
    assert outcomes(kind, seeds, 2, 10, 10)["explained by BatchNorm statistics"] >= 0.8 * CASES


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "correlated", "noisy control"])
def test_a_gain_that_is_all_the_adversarys_is_not_put_down_to_the_control(kind, seeds):
    assert outcomes(kind, seeds, 2, 0, 10)["explained by BatchNorm statistics"] <= 0.05 * CASES


# --- the table


def tidy(**arms):
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "metric": metric, "value": value}
            for arm, scores in arms.items()
            for metric in ("iou/target_test", "class_iou/target_test/tree")
            for seed, value in scores.items()
        ]
    )


def test_the_table_has_each_arm_and_metric_with_its_paired_differences():
    adapted, control = shifted(0.1), {seed: score for seed, score in shifted(0.02, OTHER).items() if seed < 4}
    table = difference_table(tidy(source=SOURCE, control=control, dann=adapted), "source", "control")
    assert len(table) == 6
    row = table.set_index(["arm", "metric"]).loc[("dann", "class_iou/target_test/tree")]
    assert (row["n"], row["minus_source_n"], row["minus_control_n"]) == (5, 5, 4)
    assert row["mean"] == pytest.approx(np.mean(list(adapted.values())))
    assert row["std"] == pytest.approx(np.std(list(adapted.values()), ddof=1))
    for other, scores in (("source", SOURCE), ("control", control)):
        expected = paired(adapted, scores)
        assert isinstance(expected, Interval)
        found = [row[f"minus_{other}{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([expected.mean, expected.low, expected.high])


def test_an_arm_is_not_compared_with_itself_nor_with_an_arm_that_is_not_there():
    table = difference_table(tidy(source=SOURCE, dann=shifted(0.1)), "source", None).set_index(["arm", "metric"])
    assert math.isnan(table.loc[("source", "iou/target_test"), "minus_source"])
    assert table["minus_control"].isna().all()
    assert (table["minus_control_n"] == 0).all()


def test_the_table_refuses_two_runs_of_a_seed_and_arms_it_does_not_know():
    frame = tidy(source=SOURCE, dann=shifted(0.1))
    with pytest.raises(ValueError, match="Arm source has iou/target_test twice for seed 0"):
        difference_table(pd.concat([frame, frame]), "source", None)
    with pytest.raises(ValueError, match=r"control is 'lambda0', .*\['dann', 'source'\]"):
        difference_table(frame, "source", "lambda0")
