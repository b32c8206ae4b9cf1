"""Reads an encoder's weights from a file of the user (`model.encoder_weights: FILE`), with every name and shape checked.

Files hold an encoder under the names of timm or torchvision, mostly with a classifier and often inside another network. Ours may
have other names: segmentation-models-pytorch wraps timm's encoders as `model`, and timm renames the stages of some when it builds
them for features (`stages.0` to `stages_0`). So the encoder's names are translated to timm's before the file is searched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dann_experiments.checkpoints.prefixes import Candidate, find_part, is_counter, without_wrappers
from dann_experiments.checkpoints.weights import listed, read_weights
from dann_experiments.config.errors import InputError
from dann_experiments.data.samples import file_digest
from dann_experiments.names import Key

log = logging.getLogger(__name__)
ONE_ALONE = "save the one that you mean in a file of its own"
WAY_OUT = "Give weights of this encoder, or null to start from random weights"


def load_encoder(network: nn.Module, file: Path, in_channels: int) -> None:
    """Load the weights in `file` into `network.encoder`; raises the errors of `encoder_weights`."""
    encoder: Any = network.encoder
    # not the encoder's own method, which renames some weights
    nn.Module.load_state_dict(encoder, encoder_weights(network, file, in_channels), strict=False)


def encoder_weights(network: nn.Module, file: Path, in_channels: int) -> dict[str, Tensor]:
    """Return the weights in `file` by their names in `network.encoder`, without loading them.

    Weights that only a classifier or stages beyond `encoder_depth` use are left out, with a line in the log. Raises InputError if
    the file does not exist or cannot be read, if weights are missing, have other shapes (one for a first convolution of other
    bands than `in_channels`) or are not finite, and if the file holds a larger encoder or several.
    """
    where = f"{Key.ENCODER_WEIGHTS} is {str(checked_file(file))!r}"
    try:
        weights = read_weights(file)
        layout, chosen, others = _best(weights, network.encoder, str(file))
    except InputError as error:
        raise InputError(f"{Key.ENCODER_WEIGHTS}: {error}") from None
    total = sum(not is_counter(name) for name in layout.wanted)
    if chosen is None:
        raise InputError(
            f"{where}, which has none of the {total} weights of this encoder (the first are {_few(list(layout.wanted))}; the "
            f"file has {_few(others)}). {WAY_OUT}."
        )
    found = {name: weights[there] for name, there in chosen.names.items()}
    missing = [name for name in layout.wanted if name not in found and not is_counter(name)]
    if missing:
        raise InputError(
            f"{where}, which lacks {len(missing)} of the {total} weights of this encoder: {_few(missing)}. {WAY_OUT}."
        )
    _check_shapes(layout.wanted, found, in_channels, where)
    start = chosen.prefix and f"{chosen.prefix}."
    _check_others([name.removeprefix(start) for name in others], found, layout, where, str(file))
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{where}, which holds NaN or infinity in {name}. {WAY_OUT}.")
    return {
        own: found[name]
        for own, name in layout.names.items()
        if name in found and found[name].shape == layout.wanted[name].shape  # not so for some batch counters
    }


def checked_file(file: Path) -> Path:
    """Return `file`. Raises InputError if it is not a file."""
    where = f"{Key.ENCODER_WEIGHTS} is {str(file)!r}"
    if os.path.isdir(file):  # never raises, even for impossible names
        raise InputError(f"{where}, which is a folder; give the file in it that holds the weights.")
    if not os.path.isfile(file):
        raise InputError(f"{where}, which does not exist; give a file, imagenet, or null for random weights.")
    return file


def digest_of_file(file: Path) -> str:
    """Return the BLAKE2b digest of the file's bytes, in hex digits. Raises InputError if it cannot be read."""
    try:
        return file_digest(checked_file(file)).hex()
    except OSError as error:
        raise InputError(
            f"{Key.ENCODER_WEIGHTS} is {str(file)!r}, which cannot be read ({error.strerror}); give a file that can."
        ) from None


@dataclass(frozen=True)
class _Layout:
    """One way in which files name the weights of an encoder."""

    names: Mapping[str, str]
    """Name in the encoder -> name in files, for all weights that features need."""
    wanted: Mapping[str, Tensor]
    """Name in files -> the encoder's tensor."""
    unused: frozenset[str]
    """Names in files of weights that the same encoder has elsewhere: classifier, later stages, buffers that are computed."""


def _layouts(encoder: nn.Module) -> list[_Layout]:
    """Return timm's names, if the encoder is one of timm, and the encoder's own without a leading `model`."""
    from segmentation_models_pytorch.encoders import TimmUniversalEncoder, TimmViTEncoder

    state = encoder.state_dict()
    computed = {name for name, _ in encoder.named_buffers() if name not in state}
    if not isinstance(encoder, (TimmUniversalEncoder, TimmViTEncoder)):
        return [_layout({name: name for name in state}, state, computed)]
    own = {name: name.removeprefix("model.") for name in [*state, *computed]}
    whole, heads = _whole(encoder)
    by_plain_name = {_plain(name): name for name in whole}
    theirs = {}
    for name, short in own.items():
        parts = short.split(".")  # a wrapper of timm may put a name before timm's own
        ends = (by_plain_name.get(_plain(".".join(parts[start:]))) for start in range(min(len(parts), 2)))
        theirs[name] = next((end for end in ends if end is not None), short)
    if len(set(theirs.values())) < len(theirs):  # two weights would get one name
        theirs = own
    layouts = []
    for names in (theirs, own):
        needed = {name: names[name] for name in state if not names[name].startswith(heads)}
        layouts.append(_layout(needed, state, whole | {names[name] for name in computed}))
    return layouts if theirs != own else layouts[:1]


def _layout(names: Mapping[str, str], state: Mapping[str, Tensor], known: set[str]) -> _Layout:
    wanted = {there: state[own] for own, there in names.items()}
    return _Layout(names, wanted, frozenset(known - set(wanted)))


def _whole(encoder: Any) -> tuple[set[str], tuple[str, ...]]:
    """Return the names of all weights of timm's model, classifier and later stages included, and what the names of
    those that features do not need begin with."""
    import timm
    from segmentation_models_pytorch.encoders import TimmViTEncoder

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):  # without numbers
                model = timm.create_model(encoder.name, pretrained=False)
        except Exception:  # some models compute with their weights when they are built
            model = timm.create_model(encoder.name, pretrained=False)
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = [heads] if isinstance(heads, str) else list(heads)
    if isinstance(encoder, TimmViTEncoder):  # keeps them, but takes features before them
        heads += ["norm", "fc_norm"]
    return set(model.state_dict()), tuple(f"{head}." for head in heads)


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _best(weights: Mapping[str, Tensor], encoder: Any, where: str) -> tuple[_Layout, Candidate | None, list[str]]:
    """Return the layout of which the file has most weights, and where: the result of `find_part`."""
    found: list[tuple[_Layout, Candidate | None, list[str]]] = []
    errors: list[InputError] = []
    for layout in _layouts(encoder):
        try:
            found.append((layout, *find_part(weights, layout.wanted, where, ONE_ALONE)))
        except InputError as error:  # some names of one layout may be found in several places of a file in the other
            errors.append(error)
    best = max(found, default=None, key=lambda one: 0 if one[1] is None else len(one[1].names))  # the first in a tie
    complete = best is not None and best[1] is not None and set(best[0].wanted) <= {*best[1].names, *_counters(best[0])}
    if best is None or (errors and not complete):
        raise errors[0]
    return best


def _counters(layout: _Layout) -> list[str]:
    return [name for name in layout.wanted if is_counter(name)]


def _check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], in_channels: int, where: str) -> None:
    other = [
        name for name, tensor in found.items() if tensor.shape != wanted[name].shape and not is_counter(name)
    ]  # fmt: skip
    if not other:
        return
    first = next((name for name in wanted if name in other), other[0])
    theirs = tuple(found[first].shape)
    pairs = [(found[name].shape, wanted[name].shape) for name in other]
    if all(len(one) == len(two) == 4 and one[1] == theirs[1] and two[1] == in_channels for one, two in pairs):
        raise InputError(
            f"{where}, whose first layer ({first}) reads {theirs[1]} bands, but model.in_channels is {in_channels}. Set "
            f"model.in_channels to {theirs[1]} and give images of these bands (data.source.bands, data.target.bands), or give "
            f"weights for {in_channels} bands, or null to start from random weights."
        )
    shown = [f"{name} is {tuple(found[name].shape)}, the encoder's {tuple(wanted[name].shape)}" for name in other]
    raise InputError(f"{where}, which has weights of other shapes than this encoder: {listed(shown)}. {WAY_OUT}.")


def _check_others(others: Sequence[str], found: Mapping[str, Tensor], layout: _Layout, where: str, file: str) -> None:
    """Refuse a larger encoder, whose weights all have a place except those of additional blocks; report what is left out."""
    parts = {name.partition(".")[0] for name in found}
    plain = {name: without_wrappers(name) for name in others}
    larger = [
        name for name, short in plain.items() if short not in layout.unused and short.partition(".")[0] in parts
    ]  # fmt: skip
    if larger:
        raise InputError(
            f"{where}, which has more weights than this encoder: {_few(larger)}. It seems to be of a larger one. {WAY_OUT}."
        )
    if others:
        log.info("%s: left out, as the encoder has no place for them: %s.", file, _few(others))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
