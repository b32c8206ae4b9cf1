"""Reads the Hydra-style notation (`_target_:` lines) of the same settings.

`_target_` only selects one of the classes listed here, by the last part of its dotted name. Nothing is imported.
"""

from __future__ import annotations

from typing import Any

from dann_experiments.config.errors import InputError

METHODS = {"DANNMethod": "dann", "LambdaZero": "lambda_zero", "SourceOnly": "source_only"}
SCHEDULES = {"DANNScheduler": "dann", "LinearScheduler": "linear", "ConstantScheduler": "constant"}
NETWORKS = {
    "Unet": "unet", "UnetPlusPlus": "unetplusplus", "MAnet": "manet", "Linknet": "linknet", "FPN": "fpn",
    "PSPNet": "pspnet", "DeepLabV3": "deeplabv3", "DeepLabV3Plus": "deeplabv3plus", "PAN": "pan", "UPerNet": "upernet",
    "Segformer": "segformer", "DPT": "dpt",
}  # fmt: skip
MONITORS = {"DomainAdaptationMonitorCallback": "monitor"}


def translate(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace each `_target_` in the settings by the key that selects that class here."""
    settings = dict(settings)
    if isinstance(settings.get("model"), dict):
        settings["model"] = _select(settings["model"], "model", NETWORKS, "arch")
    adaptation = settings.get("domain_adaptation")
    if isinstance(adaptation, dict):
        adaptation = settings["domain_adaptation"] = dict(adaptation)
        adaptation.pop("_target_", None)
        method = adaptation.get("method")
        if isinstance(method, dict):
            method = _select(method, "domain_adaptation.method", METHODS, "name")
            if "lambda_schedule" in method:
                method["lambda_schedule"] = _schedule(method["lambda_schedule"])
            adaptation["method"] = method
    for holder, where in ((settings, "callbacks"), (adaptation, "domain_adaptation.callbacks")):
        if isinstance(holder, dict) and "callbacks" in holder:
            _read_callbacks(settings, holder.pop("callbacks"), where)
    return settings


def _schedule(value: Any) -> Any:
    """Return the settings of a schedule; `null` means a constant lambda_da."""
    if value is None:
        return {"kind": "constant"}
    return (
        _select(value, "domain_adaptation.method.lambda_schedule", SCHEDULES, "kind")
        if isinstance(value, dict)
        else value
    )


def _read_callbacks(settings: dict[str, Any], callbacks: Any, where: str) -> None:
    """Move the arguments of the monitor, the only callback allowed, to `monitor`, `model.classes` and `data.class_names`."""
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        if not isinstance(entry, dict) or "_target_" not in entry:
            raise InputError(f"{where} holds {entry!r}; give a mapping with _target_, one of {sorted(MONITORS)}.")
        arguments = _select(entry, where, MONITORS, "kind")
        del arguments["kind"]
        for argument, group, key in (("num_classes", "model", "classes"), ("class_names", "data", "class_names")):
            if argument in arguments:
                settings[group] = {**_group(settings, group), key: arguments.pop(argument)}
        settings["monitor"] = {**_group(settings, "monitor"), **arguments}


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    group = settings.get(name) or {}
    if not isinstance(group, dict):
        raise InputError(f"{name} is {group!r}; it is a group of settings, give a mapping.")
    return group


def _select(mapping: dict[str, Any], where: str, known: dict[str, str], key: str) -> dict[str, Any]:
    mapping = dict(mapping)
    if "_target_" in mapping:
        target = str(mapping.pop("_target_"))
        name = target.rpartition(".")[2]
        if name not in known:
            raise InputError(f"{where}._target_ is {target!r}; it selects one of {sorted(known)} and imports nothing.")
        mapping[key] = known[name]
    return mapping
