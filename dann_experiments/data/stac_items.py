"""Finds images and masks by a file of STAC items: one item (a Feature) or an item collection (a FeatureCollection of items).

Of each item one asset is the image, or several are its bands, and, if asked for, another one the mask. The assets' addresses
(hrefs) are relative to the file. https://github.com/radiantearth/stac-api-spec (item collection), stac-spec (item).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import is_remote, local_text, remote_address
from dann_experiments.data import remote
from dann_experiments.data.lists import is_file, under
from dann_experiments.data.stacks import stack

DATA = "data"  # the role of assets that hold the data themselves, not a thumbnail or metadata
SUFFIXES = (".json", ".geojson")


def item_pairs(
    path: Path, assets: Sequence[str] | None, mask: str | None, key: str, report: Callable[[str], None]
) -> list[tuple[Path, Path | None]]:
    """Return the image and the mask (or None) of each item in the file `path`, in its order.

    `assets`: key of the asset that is the image, or keys of those whose bands are stacked to it; None = the only asset with the
    role "data". `mask`: key of the asset that is the
    mask; None = no masks. `key`: the setting, for messages. Calls `report` for each item without these assets and leaves it out.
    Raises InputError if the file holds no items.
    """
    pairs: list[tuple[Path, Path | None]] = []
    for number, item in enumerate(_items(path, key)):
        name = f"item {item.get('id', number)!r} of {path}"
        try:
            found = [_asset(item, one, name, key) for one in assets or [None]]
            other = None if mask is None else _asset(item, mask, name, key)
            files = [_file(asset, path, name, key, may_be_remote=True) for asset in found]
            missing = next((file for file in files if not is_file(file)), None)
            if len(files) > 1 and missing is not None:
                raise InputError(f"{key}: image {missing} of {name} does not exist.")
            image = files[0] if len(files) == 1 else stack(files)
            pairs.append((image, None if other is None else _file(other, path, name, key)))
        except InputError as error:
            report(str(error))
    return pairs


def _items(path: Path, key: str) -> Sequence[Mapping[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{key} names {path}, which cannot be read as JSON ({error}).") from None
    kind = found.get("type") if isinstance(found, dict) else None
    items: Any = [found] if kind == "Feature" else found.get("features") if kind == "FeatureCollection" else None
    whole = isinstance(items, list) and all(
        isinstance(item, dict) and isinstance(item.get("assets"), dict) for item in items
    )
    if not whole or not items:
        what = "a catalog or collection, which only links to items" if kind in ("Catalog", "Collection") else "none"
        raise InputError(
            f"{key} names {path}, which should hold STAC items with assets (a Feature, or a FeatureCollection of them), but is "
            f"{what}."
        )
    return items


def _asset(item: Mapping[str, Any], wanted: str | None, name: str, key: str) -> Mapping[str, Any]:
    assets: Mapping[str, Any] = {one: asset for one, asset in item["assets"].items() if isinstance(asset, dict)}
    if wanted is not None:
        if wanted not in assets:
            raise InputError(f"{key}: {name} has no asset {wanted!r}; it has {', '.join(assets) or 'none'}.")
        return assets[wanted]
    data = [asset for asset in assets.values() if DATA in (asset.get("roles") or ())]
    if len(data) == 1:
        return data[0]
    if len(assets) == 1:
        return next(iter(assets.values()))
    raise InputError(
        f"{key}: {name} has {len(data)} assets with the role {DATA!r}; choose the image by {{items: ..., assets: [NAME]}}: "
        f"{', '.join(assets) or 'it has none'}."
    )


def _file(asset: Mapping[str, Any], path: Path, name: str, key: str, may_be_remote: bool = False) -> Path:
    """Return the file of an asset; for an image at an address, a virtual raster that shows it (`remote`)."""
    href = asset.get("href")
    if not isinstance(href, str) or not href:
        raise InputError(f"{key}: {name} has an asset without href.")
    if may_be_remote and is_remote(href):
        address = remote_address(href, f"{key}: the href of {name}")
        assert address is not None
        return remote.view(address, key)
    text = local_text(href, f"{key}: the href of {name}")
    found = under(path.parent, text)
    decoded = under(path.parent, unquote(text))  # an href is an address, in which a blank is %20
    return decoded if is_file(decoded) and not is_file(found) else found
