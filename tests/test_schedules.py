"""lambda over training progress: Ganin & Lempitsky 2015, section 4, in both step modes."""

import pytest

from dann_experiments.adaptation.build import build_schedule
from dann_experiments.adaptation.dann import DANNMethod, LambdaZero
from dann_experiments.adaptation.method import Progress
from dann_experiments.adaptation.schedules import ConstantScheduler, DANNScheduler, LinearScheduler

# 2 / (1 + exp(-10 p)) - 1, worked out by hand
PUBLISHED = [(0.0, 0.0), (0.1, 0.4621172), (0.5, 0.9866143), (1.0, 0.9999092)]
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", [DANNScheduler(), LinearScheduler(), ConstantScheduler()])


def method(**arguments):
    return DANNMethod("encoder", in_channels=4, hidden_size=2, **arguments)


@pytest.mark.parametrize(("progress", "expected"), PUBLISHED)
def test_lambda_follows_the_published_schedule(progress, expected):
    assert DANNScheduler().get_lambda(progress * 1000, 1000) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, 0.2449187), (5.0, 0.8482836), (20.0, 0.9999092)])
def test_gamma_is_the_steepness_of_the_published_schedule(gamma, expected):
    assert DANNScheduler(gamma).get_lambda(1, 2) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("progress", "expected"), PUBLISHED)
def test_in_epoch_mode_p_is_the_share_of_epochs_whatever_the_batch(progress, expected):
    for step in (0, 77, 999):
        now = Progress(epoch=int(progress * 10), max_epochs=10, step=step, total_steps=1000)
        assert method(step_mode="epoch").lambda_at(now) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("progress", "expected"), PUBLISHED)
def test_in_batch_mode_p_is_the_share_of_all_batches_whatever_the_epoch(progress, expected):
    for epoch in (0, 3, 9):
        now = Progress(epoch=epoch, max_epochs=10, step=int(progress * 1000), total_steps=1000)
        assert method(step_mode="batch").lambda_at(now) == pytest.approx(expected, abs=1e-7)


def test_lambda_moves_once_an_epoch_unless_told_otherwise():
    now = Progress(epoch=5, max_epochs=10, step=0, total_steps=1000)
    assert method().lambda_at(now) == pytest.approx(0.9866143, abs=1e-7)


def test_an_unknown_step_mode_is_refused():
    with pytest.raises(ValueError, match="step_mode is 'iteration'; give 'epoch' or 'batch'"):
        method(step_mode="iteration")


@EVERY_SCHEDULE
def test_steps_outside_of_training_count_as_its_start_or_its_end(schedule):
    assert schedule.get_lambda(-3, 10) == schedule.get_lambda(0, 10)
    assert schedule.get_lambda(11, 10) == schedule.get_lambda(10, 10)
    assert schedule.get_lambda(10**9, 10) == schedule.get_lambda(10, 10)


def test_linear_lambda_is_the_progress():
    assert [LinearScheduler().get_lambda(step, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_constant_lambda_is_the_same_from_first_to_last_step():
    assert [ConstantScheduler().get_lambda(step, 4) for step in range(5)] == [1.0] * 5
    assert [ConstantScheduler(0.3).get_lambda(step, 4) for step in range(5)] == [0.3] * 5


@pytest.mark.parametrize(("progress", "expected"), PUBLISHED)
def test_lambda_da_is_a_factor_on_the_schedule(progress, expected):
    now = Progress(epoch=int(progress * 10), max_epochs=10, step=0, total_steps=1)
    assert method(lambda_da=0.25).lambda_at(now) == pytest.approx(0.25 * expected, abs=1e-7)


def test_without_a_schedule_lambda_da_is_lambda():
    for step in (0, 1, 10):
        assert method(lambda_da=2.5, lambda_schedule=None).lambda_at(Progress(step, 10, step, 10)) == 2.5


def test_a_negative_lambda_da_is_refused():
    with pytest.raises(ValueError, match="lambda_da is -1"):
        method(lambda_da=-1.0)


def test_the_control_has_lambda_zero_at_every_step_and_whatever_lambda_da_says():
    control = LambdaZero("encoder", 4, hidden_size=2, lambda_da=3.0, lambda_schedule=ConstantScheduler())
    assert [control.lambda_at(Progress(step, 10, step, 10)) for step in range(11)] == [0.0] * 11


@EVERY_SCHEDULE
@pytest.mark.parametrize("total_steps", [0, -1, float("nan")])
def test_a_training_without_steps_is_refused(schedule, total_steps):
    with pytest.raises(ValueError, match="total_steps is"):
        schedule.get_lambda(0, total_steps)


@pytest.mark.parametrize("gamma", [0.0, -10.0, float("inf"), float("nan")])
def test_a_gamma_that_is_no_positive_number_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma is"):
        DANNScheduler(gamma)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_constant_outside_of_0_to_1_is_refused(value):
    with pytest.raises(ValueError, match="value is"):
        ConstantScheduler(value)


def test_the_settings_name_the_schedules():
    assert build_schedule("dann", 5.0).get_lambda(1, 2) == pytest.approx(0.8482836, abs=1e-7)
    assert build_schedule("linear", 5.0).get_lambda(1, 2) == 0.5
    assert build_schedule("constant", 5.0).get_lambda(1, 2) == 1.0
