"""Finds a network's weights among the tensors of a checkpoint, under any prefix that training tools put before the names.

The prefix is the part before the network's own names: `model` in `model.encoder.conv1.weight`, empty in a plain state dict. It is
complete if it has every weight of the network in the right shape. Batch counters do not count as weights.

- A single complete prefix is used; incomplete ones are ignored and logged.
- Several complete prefixes with different values (a network and its running average) raise an InputError: the user must choose.
- Without a complete prefix, the one with most weights is used, unless another has at least half as many.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dann_experiments.config.errors import InputError
from dann_experiments.names import Key

log = logging.getLogger(__name__)
# inserted into names by torch.compile; DataParallel, DDP and AveragedModel; FSDP; activation checkpointing
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTER = "num_batches_tracked"  # not saved by older tools, and only used by BatchNorm without momentum
RIVAL_SHARE = 0.5  # share of the fullest prefix's weights from which another prefix may be meant, too
ROOT = "."  # the empty prefix in messages and settings, where an empty string means "not set"


@dataclass(frozen=True)
class Candidate:
    """The network's weights under one prefix of a checkpoint."""

    prefix: str
    names: Mapping[str, str]
    """Name in the network -> name in the checkpoint."""
    fitting: int
    """Number of weights with the right shape, without batch counters."""

    @property
    def shown(self) -> str:
        """The prefix for messages."""
        return repr(self.prefix or ROOT)


def find_weights(
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    where: str,
    source_prefix: str | None = None,
    prefix_key: str = Key.SOURCE_PREFIX,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of `weights` by the names of `wanted`, and the names under the same prefix that the network lacks.

    `wanted`: a network's state dict. `source_prefix` chooses the prefix; messages call that setting `prefix_key` and the
    checkpoint `where`. Raises InputError if several prefixes may be meant or `source_prefix` does not exist.
    """
    candidates = _candidates(weights, wanted, where)
    total = sum(not is_counter(name) for name in wanted)
    if source_prefix is not None:
        chosen = _named(candidates, source_prefix, where, prefix_key, total)
    elif candidates:
        chosen = _only_one(candidates, weights, where, f"choose one by {prefix_key}", total)
    else:
        return {}, sorted(name for name in weights if not is_counter(name))
    found = {own: weights[chosen.names[own]] for own in wanted if own in chosen.names}
    return found, _surplus(weights, chosen, candidates)


def find_part(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, way_out: str
) -> tuple[Candidate | None, list[str]]:
    """Return where `weights` hold a network's part with the state dict `wanted`, and all other names under the same prefix.

    None and all names if there is no weight of it. Unlike `find_weights`, which knows a whole network, this names everything
    else that is there: a longer stage of a larger encoder, too. Raises InputError, with `way_out`, if several may be meant.
    """
    candidates = _candidates(weights, wanted, where)
    if not candidates:
        return None, sorted(weights)
    # without parts of another candidate: a block of a ResNet has a conv1 and a bn1, as the ResNet has
    taken = [set(one.names.values()) for one in candidates]
    candidates = [one for one, names in zip(candidates, taken, strict=True) if not any(names < more for more in taken)]
    total = sum(not is_counter(name) for name in wanted)
    chosen = _only_one(candidates, weights, where, way_out, total)
    start, own = chosen.prefix and f"{chosen.prefix}.", set(chosen.names.values())
    others = [name for name in weights if name.startswith(start) and name not in own and not is_counter(name)]
    return chosen, sorted(others)


def is_counter(name: str) -> bool:
    """Return True for the name of a batch counter, which does not count as a weight."""
    return name.rpartition(".")[2] == COUNTER


def _candidates(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> list[Candidate]:
    """Return every prefix with at least one weight of the network, sorted by name."""
    known = {without_wrappers(name): name for name in wanted}
    found: dict[str, dict[str, str]] = {}
    for name in sorted(weights):
        parts = name.split(".")
        for start, part in enumerate(parts):
            own = None if part in WRAPPERS else known.get(without_wrappers(".".join(parts[start:])))
            if own is None:
                continue
            names = found.setdefault(".".join(parts[:start]), {})
            if own in names and not torch.equal(weights[names[own]], weights[name]):
                raise InputError(
                    f"checkpoint {where} holds {own} twice, as {names[own]} and as {name}, with different values; "
                    "save the state_dict of one network."
                )
            names.setdefault(own, name)
    candidates = []
    for prefix, names in sorted(found.items()):
        fitting = sum(weights[name].shape == wanted[own].shape for own, name in names.items() if not is_counter(own))
        if not all(is_counter(own) for own in names):
            candidates.append(Candidate(prefix, names, fitting))
    return candidates


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _named(candidates: Sequence[Candidate], source_prefix: str, where: str, prefix_key: str, total: int) -> Candidate:
    """Return the candidate that the user means, by the whole prefix (with or without wrappers) or some of its parts."""
    given = source_prefix.strip(".")
    tests = [
        lambda prefix: prefix == given,
        lambda prefix: without_wrappers(prefix) == given,
    ]
    if given:
        tests.append(lambda prefix: f".{given}." in f".{prefix}." or f".{given}." in f".{without_wrappers(prefix)}.")
    for test in tests:
        meant = [candidate for candidate in candidates if test(candidate.prefix)]
        if len(meant) > 1:
            raise InputError(
                f"{prefix_key} is {source_prefix!r}, which may mean {_listed(meant, total)} of checkpoint {where}; "
                "give the whole prefix."
            )
        if meant:
            return meant[0]
    there = f"it has them under {_listed(candidates, total)}; give one of these" if candidates else "nor anywhere else"
    raise InputError(
        f"{prefix_key} is {source_prefix!r}, but checkpoint {where} has no weights of this network there, {there}."
    )


def _only_one(
    candidates: Sequence[Candidate], weights: Mapping[str, Tensor], where: str, way_out: str, total: int
) -> Candidate:
    """Return the candidate to use if the user chose none. Raises InputError if several may be meant."""
    fullest = max(candidates, key=lambda candidate: (candidate.fitting, len(candidate.names)))  # the first in a tie
    if fullest.fitting == total:
        rivals = [one for one in candidates if one.fitting == total]
    elif fullest.fitting:
        rivals = [one for one in candidates if one.fitting >= RIVAL_SHARE * fullest.fitting]
    else:  # names fit, but no shape does: another network
        rivals = [one for one in candidates if len(one.names) >= RIVAL_SHARE * len(fullest.names)]
    if any(not _equal(fullest, one, weights) for one in rivals):
        raise InputError(
            f"checkpoint {where} holds several networks that may be meant, under {_listed(rivals, total)}; {way_out}."
        )
    left_out = [one for one in candidates if one not in rivals]
    if left_out:
        log.info(
            "checkpoint %s: the weights under %s are loaded; left out: %s.",
            where, fullest.shown, _listed(left_out, total),
        )  # fmt: skip
    return fullest


def _equal(one: Candidate, other: Candidate, weights: Mapping[str, Tensor]) -> bool:
    """Return True if both have the same values, as when one network is saved under two names."""
    if one is other:
        return True
    names = {own for own in one.names if not is_counter(own)}
    if names != {own for own in other.names if not is_counter(own)}:
        return False
    pairs = ((weights[one.names[own]], weights[other.names[own]]) for own in sorted(names))
    return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def _surplus(weights: Mapping[str, Tensor], chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return the names under the chosen prefix that belong neither to it nor to another candidate."""
    start = chosen.prefix and f"{chosen.prefix}."
    taken = {without_wrappers(own) for own in chosen.names}
    others = tuple(
        f"{one.prefix}." for one in candidates if one.prefix.startswith(start) and one.prefix != chosen.prefix
    )
    return sorted(
        name.removeprefix(start)
        for name in weights
        if name.startswith(start)
        and without_wrappers(name.removeprefix(start)) not in taken
        and not name.startswith(others)
        and not is_counter(name)
    )


def _listed(candidates: Sequence[Candidate], total: int) -> str:
    """List up to eight prefixes for a message, each with its share of the network's weights."""
    shown = [f"{one.shown} ({one.fitting} of {total} weights)" for one in candidates[:8]]
    return ", ".join(shown) + (f" and {len(candidates) - 8} more" if len(candidates) > 8 else "")
