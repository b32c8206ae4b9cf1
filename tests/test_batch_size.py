"""`trainer.auto_batch_size`: the largest batches whose step fits. A GPU is needed to use it; the search and the trial are not."""

import copy

import pytest
import torch

from dann_experiments import adapt, load_config
from dann_experiments.comparison.compare import compare
from dann_experiments.config import InputError
from dann_experiments.jobs.build import make_method, make_network, make_taps
from dann_experiments.jobs.build_training import make_module
from dann_experiments.names import DOMAINS, SetName
from dann_experiments.training.batch_size import domains_of_a_step, largest_factor, step_fits
from sweeps.driver import run_sweep
from sweeps.settings import SweepConfig
from tests.conftest import read_sets, small_settings

AUTO = {"trainer__auto_batch_size": True}


@pytest.mark.parametrize(
    ("bound", "most", "expected"), [(5, 100, 4), (8, 100, 8), (1, 100, 1), (0, 100, 0), (50, 6, 4), (50, 0, 1)]
)
def test_batches_are_doubled_while_they_fit_and_while_there_are_images(bound, most, expected):
    tried = []

    def fits(factor):
        tried.append(factor)
        return factor <= bound

    assert largest_factor(fits, most) == expected
    assert tried == sorted(set(tried))


def parts(squares, **more):
    config = load_config(None, small_settings(squares, **more))
    sets, network = read_sets(config), make_network(config)
    taps = make_taps(config, network)
    shapes = {domain: sets.sets[SetName(domain, "train")][0]["image"].shape for domain in DOMAINS}

    def make(network, method):
        return make_module(config, network, method, taps, torch.device("cpu"))

    return make, network, make_method(config, taps), shapes


def test_a_trial_step_changes_nothing(squares):
    given = parts(squares)
    before, random = copy.deepcopy((given[1].state_dict(), given[2].state_dict())), torch.get_rng_state()
    assert step_fits(*given, {"source": 8, "target": 6}, torch.device("cpu"))
    torch.testing.assert_close((given[1].state_dict(), given[2].state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in given[1].parameters())


def test_a_method_that_does_not_look_at_the_target_needs_no_images_of_it(squares):
    make, network, method, shapes = parts(squares, domain_adaptation__method__name="source_only")
    del shapes["target"]
    assert domains_of_a_step(method, []) == ("source",)
    assert step_fits(make, network, method, shapes, {"source": 4}, torch.device("cpu"))


def test_a_trial_step_that_runs_out_of_memory_does_not_fit(squares):
    given = parts(squares)
    assert not step_fits(
        *given, {"source": 2**40, "target": 1}, torch.device("cpu")
    )  # more than any machine has: torch refuses it at once


def test_other_errors_of_a_trial_step_are_not_taken_for_memory(squares):
    make, network, method, shapes = parts(squares)
    network.decoder = torch.nn.Linear(3, 3)
    with pytest.raises((RuntimeError, TypeError)):
        step_fits(make, network, method, shapes, {"source": 2, "target": 2}, torch.device("cpu"))


def test_it_is_refused_without_a_gpu(workplace, squares):
    with pytest.raises(InputError, match=r"trainer\.auto_batch_size is true, but there is no GPU .* Set it to false\."):
        adapt(load_config(None, small_settings(squares, **AUTO)))


def test_it_is_refused_where_runs_are_compared(workplace, squares):
    config = load_config(None, small_settings(squares, **AUTO))
    message = r"trainer\.auto_batch_size is true, but .* must train with the same batch sizes"
    with pytest.raises(InputError, match=message):
        compare(config)
    with pytest.raises(InputError, match=message):
        run_sweep(
            SweepConfig(study="any", space={"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-3}}), config
        )
