"""How much a sweep trains under `halving`, by replaying curves whose ranking is known: counts, no clock."""

from __future__ import annotations

import functools

import pytest

from benchmarks.replay import (
    Curve,
    Replayed,
    best_of,
    made_curves,
    rank_correlations,
    read_curves,
    replay,
    write_curves,
)
from sweeps.sampling import PARTS, build_pruner

PRUNER = "halving"
ENDS = (0.60, 0.45, 0.52, 0.66, 0.49, 0.58, 0.41, 0.62, 0.55, 0.70, 0.47, 0.64, 0.53, 0.57, 0.43, 0.61)
"""Scores at the end of the recipe, the control and 14 trials of a search; trial 9 is the best."""


def replayed(curves: list[Curve], name: str = PRUNER, workers: int = 2) -> Replayed:
    return replay(curves, functools.partial(build_pruner, name, PARTS), workers)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_halving_trains_at_most_two_fifths_and_keeps_the_best(workers):
    curves = made_curves(ENDS)
    done = replayed(curves, workers=workers)
    assert best_of(curves) == done.best == 9
    assert sum(done.epochs) <= 0.4 * PARTS * len(curves)


def test_the_recipe_and_the_control_run_to_the_end():
    worst_first = made_curves((0.41, 0.40, *sorted(ENDS[2:])))
    assert replayed(worst_first).epochs[:2] == (PARTS, PARTS)


def test_trials_are_compared_with_the_recipe_from_the_first():
    """Nothing is better than the recipe, so no trial of the first four goes on."""
    curves = made_curves((0.80, *ENDS[1:]))
    assert replayed(curves).epochs[2:5] == (1, 1, 1)
    assert replayed(curves).best == 0


def test_a_trial_better_than_all_before_goes_on_whatever_its_number():
    curves = made_curves((0.50, 0.45, *(0.42 + number / 100 for number in range(13))))
    done = replayed(curves, workers=1)
    assert done.best == 14
    assert done.epochs[14] == PARTS


def test_a_model_that_forgot_the_source_does_not_win_the_replay():
    curves = made_curves(ENDS)
    curves[9] = Curve("search", curves[9].reports, forgot=True)
    assert best_of(curves) == 3


def test_curves_are_read_as_they_were_written(tmp_path):
    curves = [Curve("recipe", (0.25, 0.5), 0.75), Curve("search", (0.125, 0.5), 0.5, True)]
    write_curves(tmp_path / "curves.csv", {"0": curves})
    assert read_curves(tmp_path / "curves.csv") == {"0": curves}


def test_ranks_of_an_epoch_are_compared_with_those_at_the_end():
    falling = [Curve("search", (1 - end, end)) for end in (0.1, 0.2, 0.3)]
    assert rank_correlations(falling) == pytest.approx([-1.0])
