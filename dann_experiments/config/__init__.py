"""Settings: typed, frozen and checked once. Lower layers of the package do not use them."""

from dann_experiments.config.errors import InputError, TrainingFailed
from dann_experiments.config.parsing import config_to_dict, config_to_yaml, flatten, known_keys, load_config, replace
from dann_experiments.config.schema import Config

__all__ = [
    "Config",
    "InputError",
    "TrainingFailed",
    "config_to_dict",
    "config_to_yaml",
    "flatten",
    "known_keys",
    "load_config",
    "replace",
]
