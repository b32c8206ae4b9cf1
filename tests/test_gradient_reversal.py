"""Gradient reversal: identity forward, -lambda times the gradient backward (Ganin & Lempitsky 2015, section 3.2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dann_experiments.adaptation.gradient_reversal import GradientReversal

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LAMBDAS = st.floats(0, 10)
SEEDS = st.integers(0, 1000)


def drawn(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reversed_gradient(reverse, features, upstream, lambda_now):
    features = features.clone().requires_grad_()
    return torch.autograd.grad(reverse(features, lambda_now), features, upstream)[0]


@settings(deadline=None)
@given(SHAPES, DTYPES, LAMBDAS, SEEDS)
def test_forward_passes_features_on_unchanged(shape, dtype, lambda_now, seed):
    features = drawn(shape, dtype, seed)
    result = GradientReversal()(features, lambda_now)
    assert result.dtype == dtype
    assert torch.equal(result, features)


@settings(deadline=None)
@given(SHAPES, DTYPES, LAMBDAS, SEEDS)
def test_the_gradient_is_minus_lambda_times_the_upstream_gradient(shape, dtype, lambda_now, seed):
    upstream = drawn(shape, dtype, seed + 1)
    gradient = reversed_gradient(GradientReversal(), drawn(shape, dtype, seed), upstream, lambda_now)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, -lambda_now * upstream)


def test_lambda_is_taken_from_the_call_and_else_from_the_constructor():
    one = torch.ones(1)
    assert reversed_gradient(GradientReversal(3.0), one, one, None) == -3.0
    assert reversed_gradient(GradientReversal(3.0), one, one, 0.5) == -0.5
    assert reversed_gradient(GradientReversal(3.0), one, one, 0.0) == 0.0


def test_two_reversals_multiply_the_gradient_by_lambda_squared():
    features, upstream = drawn([2, 3], torch.float64, 0), drawn([2, 3], torch.float64, 1)
    twice = reversed_gradient(lambda x, now: GradientReversal()(GradientReversal()(x, now), now), features, upstream, 3)
    assert torch.equal(twice, 9.0 * upstream)


def test_double_backward_multiplies_the_second_derivative_by_lambda_squared():
    features = drawn([2, 3], torch.float64, 0).requires_grad_()
    (first,) = torch.autograd.grad((GradientReversal(3.0)(features) ** 3).sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), features)
    torch.testing.assert_close(first, -3.0 * 3 * features**2)
    torch.testing.assert_close(second, 9.0 * 6 * features)


def test_the_backward_pass_is_itself_differentiated_correctly():
    features = drawn([2, 3], torch.float64, 0).requires_grad_()
    # alone, so that the numerical check sees the backward as the linear map that it is
    assert torch.autograd.gradgradcheck(lambda x: GradientReversal(0.7)(x), features)


def test_the_gradient_reaches_everything_before_the_reversal_and_nothing_else_changes_sign():
    before, after = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    images = drawn([4, 3], torch.float32, 0)
    plain = torch.autograd.grad(after(before(images)).sum(), [before.weight, after.weight])
    reverse = GradientReversal()
    turned = torch.autograd.grad(after(reverse(before(images), 0.5)).sum(), [before.weight, after.weight])
    torch.testing.assert_close(turned[0], -0.5 * plain[0])
    torch.testing.assert_close(turned[1], plain[1])


# inductor's first use compiles C++ for half a minute; what it is given, aot_eager traces as well
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_reversal_still_reverses_when_lambda_moves(backend):
    def loss(features, lambda_now):
        return (GradientReversal()(features, lambda_now) ** 2).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for lambda_now in (0.5, 0.0, 2.0):
        features = drawn([2, 3], torch.float32, 0).requires_grad_()
        compiled(features, lambda_now).backward()
        torch.testing.assert_close(features.grad, -lambda_now * 2 * features.detach())
