#!/usr/bin/env bash
# pytest 9.2.0, torch 2.15.0: monkeypatch.setattr on a setting of torch._inductor.config, such as max_autotune or cpp.cxx, does not
# put the old value back at the end of the test, but deletes the setting: reading it raises AttributeError from then on, and with
# it every later compilation by inductor in that process, in tests that have nothing to do with the first.
# Expected: settings are as they were before the test. torch's own config.patch does that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6 pytest==9.2.0
cd "$folder"
cat > test_settings.py <<'PYTHON'
import torch._inductor.config as config

found = {}


def read(*names):
    value = config
    try:
        for name in names:
            value = getattr(value, name)
    except AttributeError as error:
        return f"AttributeError: {error}"
    return value


def test_with_monkeypatch(monkeypatch):
    found["before"] = read("cpp", "cxx"), read("max_autotune")
    monkeypatch.setattr(config.cpp, "cxx", ("clang++",))
    monkeypatch.setattr(config, "max_autotune", True)
    assert read("cpp", "cxx") == ("clang++",)
    assert read("max_autotune") is True


def test_after_it():
    after = read("cpp", "cxx"), read("max_autotune")
    for name, old, new in zip(("cpp.cxx", "max_autotune"), found["before"], after):
        print(f"\n{name} before: {old}; after: {new}")
        assert str(new).startswith("AttributeError"), "the setting is put back now"


def test_with_the_patch_of_torch():
    config.cpp.cxx = found["before"][0]
    with config.patch({"cpp.cxx": ("clang++",)}):
        assert read("cpp", "cxx") == ("clang++",)
    assert read("cpp", "cxx") == found["before"][0]
PYTHON
"$folder/venv/bin/python" -W ignore -m pytest -q -s -p no:cacheprovider test_settings.py
"$folder/venv/bin/pip" list --format freeze --disable-pip-version-check | grep -E "^(torch|pytest)=="
