"""Settings: files, overrides, short spellings, and what is refused."""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dann_experiments.config import Config, InputError, config_to_yaml, flatten, known_keys, load_config, replace
from dann_experiments.config.description import describe, help_text
from dann_experiments.config.limits import settings_of
from dann_experiments.config.run import OptimizerConfig, PretrainingConfig


def test_the_yaml_that_is_written_reads_back_to_the_same_config(tmp_path):
    config = load_config(
        None, {"domain_adaptation.method.feature_layer": ["encoder", "decoder"], "optimizer.betas": [0.5, 0.9]}
    )
    (tmp_path / "c.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert replace(config, {}) == config


def test_exponents_without_a_dot_are_numbers_in_files_and_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 1e-4}\n")
    assert load_config(tmp_path / "c.yaml").optimizer.lr == 1e-4
    assert load_config(None, {"optimizer.lr": "3e-5"}).optimizer.lr == 3e-5


def test_an_override_wins_over_the_file_and_leaves_its_neighbours(tmp_path):
    (tmp_path / "c.yaml").write_text("trainer: {max_epochs: 3, accelerator: cpu}\n")
    config = load_config(tmp_path / "c.yaml", {"trainer.max_epochs": "7"})
    assert (config.trainer.max_epochs, config.trainer.accelerator) == (7, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.max_epoch", 3, "did you mean 'trainer.max_epochs'"),
        ("domain_adaptation.method.gamma", 3, "did you mean 'domain_adaptation.method.lambda_schedule.gamma'"),
        ("optimiser.lr", 3, "did you mean 'optimizer.lr'"),
        ("trainer.max_epochs", "many", "trainer.max_epochs is 'many', but must be int"),
        ("trainer.max_epochs", 0, "trainer.max_epochs is 0; give a number of at least 1"),
        ("model.arch", "unett", "model.arch is 'unett'"),
        ("trainer", 3, "it is a group of settings"),
        ("optimizer.lr", -1, "optimizer.lr is -1.0; give a number above 0"),
        ("pretraining.optimizer.lr", -1, "pretraining.optimizer.lr is -1.0; give a number above 0"),
        (
            "pretraining.optimizer.betas",
            [0.5, 1],
            "pretraining.optimizer.betas is [0.5, 1.0]; give numbers from 0 to below 1",
        ),
        ("data.target.bands", [0], "data.target.bands is [0]; name bands counted from 1"),
        ("data.source.bands", [], "data.source.bands is []; name bands counted from 1"),
        ("data.target.batch_size", 0, "data.target.batch_size is 0; give a number from 1 to 100000"),
        ("data.target.pixel_size", 0, "data.target.pixel_size is 0.0; give a number above 0"),
        ("data.target.file_pixel_size", 1, "data.target.file_pixel_size has no effect without pixel_size"),
        ("data.target.scale", [2, 1], "data.target.scale is [2.0, 1.0]; give [LOW, HIGH]"),
        ("data.target.color_map", {"1,2": "a"}, "data.target.color_map has the key '1,2'"),
        ("data.target.preset", "nobody", "data.target.preset is 'nobody'"),
        ("data.target.val", [{"masks": "m"}], "data.target.val has the entry"),
        ("domain_adaptation.feature_layers", ["decoder"], "add ['encoder'] there"),
        ("domain_adaptation.method.in_channels", [1, 2], "2 values for 1 feature layers"),
        ("domain_adaptation.method.lambda_da", -0.1, "lambda_da is -0.1"),
        ("domain_adaptation.method.init_args", {"a": 1}, "no effect without class_path"),
        ("data.class_names", ["one"], "data.class_names has 1 names, but model.classes is 2"),
        ("data.mean", [0.5], "data.mean has 1 values, data.std 3"),
        ("model.in_channels", 4, "give data.mean and data.std one value per band"),
        ("monitor.metric", None, None),
        ("seed", -1, "seed is -1"),
        ("model.classes", 10**9, "model.classes is 1000000000; give a number from 2 to 256"),
        ("model.in_channels", 10**9, "give a number from 1 to 65535"),
        ("model.decoder_dropout", float("nan"), "model.decoder_dropout is nan; give a number from 0 to 1"),
        ("data.source.batch_size", 10**9, "give a number from 1 to 100000"),
        ("data.num_workers", 10**9, "data.num_workers is 1000000000; give a number from 0 to 1024"),
        ("data.embedded.seed", -1, "data.embedded.seed is -1"),
        ("threads", 10**9, "threads is 1000000000; give a number from 1 to 1024"),
        ("domain_adaptation.method.hidden_size", 10**9, "give a number from 1 to 16384"),
        ("domain_adaptation.method.feature_layer", [""], "feature_layer is ['']; name each layer once"),
        ("domain_adaptation.method.class_path", ".x.Y", "class_path is '.x.Y'; give package.module.Class"),
        (
            "monitor.forgetting_threshold",
            float("nan"),
            "monitor.forgetting_threshold is nan; give a number from 0 to 1",
        ),
        ("tracking.experiment", " ", "tracking.experiment is ' '; give it a name"),
        ("tracking.run_name", "a\0", "tracking.run_name is 'a\\x00'; tracking stores keep neither NUL"),
        ("data.root", "a\udcff", "what is not UTF-8"),
        ("data.root", ["a" * 10_000], "... (10004 letters), but must be"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_with_the_way_out(key, value, message):
    if message is None:
        load_config(None, {key: value})
        return
    with pytest.raises(InputError) as error:
        load_config(None, {key: value})
    assert message in str(error.value)


@pytest.mark.slow
def test_a_wrong_number_is_refused_under_its_whole_key_wherever_it_is_set():
    for key, kind, limits in settings_of(Config):
        for number in (-(10.0**18), float("nan")) if limits else ():
            if kind in (int, float, int | None, float | None):
                value = int(number) if kind in (int, int | None) and number == number else number
                with pytest.raises(InputError, match=rf"^{re.escape(key)} is "):
                    load_config(None, {key: value})
    with pytest.raises(InputError, match=r"^pretraining\.optimizer\.lr is -1"):
        Config(pretraining=PretrainingConfig(optimizer=OptimizerConfig(lr=-1)))


def test_a_method_of_ones_own_needs_no_setting_beside_its_class():
    config = load_config(
        None, {"domain_adaptation.method.class_path": "my.Own", "domain_adaptation.method.init_args.a": "1"}
    )
    assert (config.domain_adaptation.method.class_path, config.domain_adaptation.method.init_args) == (
        "my.Own",
        {"a": 1},
    )


def test_a_missing_file_and_a_file_that_is_no_yaml_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    with pytest.raises(InputError, match=r"bad\.yaml is not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="holds list"):
        load_config(tmp_path / "list.yaml")


def test_a_yaml_tag_that_would_build_an_object_is_refused(tmp_path):
    (tmp_path / "evil.yaml").write_text("seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "evil.yaml")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*known_keys(), "trainer", "model.x", "data", ""]), value=json_like)
def test_any_value_of_any_key_is_read_or_refused_with_an_input_error(key, value):
    with contextlib.suppress(InputError):
        load_config(None, {key: value})


def test_every_constructor_argument_of_every_smp_network_is_a_model_setting():
    left_out = {
        "self",
        "kwargs",
        "encoder_name",
        "encoder_weights",
        "in_channels",
        "classes",
        "activation",
        "aux_params",
    }
    wanted = set()
    for network in smp.MODEL_ARCHITECTURES_MAPPING.values():
        wanted |= set(inspect.signature(network.__init__).parameters) - left_out
    have = {key.removeprefix("model.") for key in known_keys() if key.startswith("model.")}
    assert wanted == have - {"arch", "encoder_name", "encoder_weights", "in_channels", "classes"}


def test_every_setting_is_explained_in_the_help():
    text = " ".join(help_text(Config).split())
    for key in known_keys():
        assert f"--{key} " in text, key
    assert "Ganin & Lempitsky 2015" in text
    assert "--optimizer.lr VALUE Learning rate of the network. (float; above 0; default 0.001)" in text


def test_the_help_shows_the_limits_that_are_checked():
    found = {setting.key: setting.range for group in describe(Config) for setting in group.settings}
    assert set(found) == set(known_keys())
    assert found["monitor.forgetting_threshold"] == "0 to 1"
    assert found["trainer.max_epochs"] == "at least 1"
    assert found["optimizer.betas"] == "0 to below 1"
    assert found["data.target.bands"] == "not empty, at least 1"
    assert found["model.arch"] == ""


def test_flat_names_are_the_keys_that_overrides_take():
    config = load_config(None)
    flat = flatten(config)
    assert set(flat) == set(known_keys())
    assert load_config(None, flat) == config


def test_a_mapping_that_a_user_fills_is_one_value_whatever_its_keys():
    maps = {"data.source.color_map": {"255,255,255": "a", "0,0,255": "b"}, "data.target.value_map": {3: "a", 7: "b"}}
    flat = flatten(load_config(None, maps))
    assert set(flat) == set(known_keys())
    assert {key: flat[key] for key in maps} == maps


DIALECT = """
model:
  _target_: segmentation_models_pytorch.Unet
  encoder_name: resnet18
  encoder_weights: null
domain_adaptation:
  feature_layers: [encoder]
  method:
    _target_: some_package.methods.dann.DANNMethod
    feature_layer: encoder
    hidden_size: 32
    lambda_schedule:
      _target_: some_package.schedulers.DANNScheduler
      gamma: 2.5
callbacks:
  - _target_: some_package.callbacks.DomainAdaptationMonitorCallback
    num_classes: 3
    class_names: [a, b, c]
    forgetting_threshold: 0.1
"""


def test_the_target_spelling_selects_the_same_settings(tmp_path):
    (tmp_path / "c.yaml").write_text(DIALECT)
    config = load_config(tmp_path / "c.yaml")
    assert config.model.arch == "unet"
    assert config.domain_adaptation.method.name == "dann"
    assert config.domain_adaptation.method.lambda_schedule.gamma == 2.5
    assert (config.model.classes, config.class_names) == (3, ["a", "b", "c"])
    assert config.monitor.forgetting_threshold == 0.1


def test_the_target_spelling_imports_nothing(tmp_path):
    content = yaml.safe_load(DIALECT)
    content["domain_adaptation"]["method"]["_target_"] = "antigravity.Fly"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="imports nothing"):
        load_config(tmp_path / "c.yaml")
    import sys

    assert "antigravity" not in sys.modules


def test_the_recipe_in_the_target_spelling_holds_the_same_settings_as_the_plain_one():
    recipes = Path(__file__).parents[1] / "recipes"
    assert load_config(recipes / "target_dialect.yaml") == load_config(recipes / "classic.yaml")
