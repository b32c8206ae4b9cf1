"""Images on a server or in a bucket: https:// and s3://, read in parts by GDAL.

Each becomes a small virtual raster in the user's cache (`virtual`), so that the rest of the program works with a path. Its text
holds the state of the file (ETag, or size and time), so that a file that has changed is another image.
"""

from __future__ import annotations

import base64
import functools
import glob
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from dann_experiments.config.errors import InputError
from dann_experiments.config.extras import install_command
from dann_experiments.data.endpoints import s3_address
from dann_experiments.data.patterns import IMAGE_SUFFIXES, expression_of
from dann_experiments.data.rasters import GDAL_OPTIONS, header_of, open_raster
from dann_experiments.data.virtual import SUFFIX, keep

IN_PARTS = {"GTiff": "TIFF", "JP2OpenJPEG": "JPEG 2000"}  # drivers that read windows without reading the whole file
TRIES = int(GDAL_OPTIONS["GDAL_HTTP_MAX_RETRY"])
DELAY = float(GDAL_OPTIONS["GDAL_HTTP_RETRY_DELAY"])  # seconds before the second try; then twice as long
CONNECT_TIMEOUT = int(GDAL_OPTIONS["GDAL_HTTP_CONNECTTIMEOUT"])  # seconds
BUSY = {int(code) for code in str(GDAL_OPTIONS["GDAL_HTTP_RETRY_CODES"]).split(",")}
Key = tuple[str, ...]


def view(address: str, key: str) -> Path:
    """Return the path of a virtual raster that shows a remote image; `address`: as `remote_address` returns it.

    `key`: the setting, for messages. Raises InputError if it does not exist, the server is away, or it cannot be read in parts.
    """
    try:
        return _view(address, _state(address))
    except InputError as error:
        raise InputError(f"{key} names {address}: {error}") from None


def images(where: str, key: str) -> dict[Key, Path]:
    """Return the images that an address names, by what its wildcards match, or by stem in a folder (`s3://BUCKET/FOLDER/`).

    `key`: the setting, for messages. Raises InputError for a pattern or folder that cannot be listed or holds no image.
    """
    if not names_many(where):
        return {("#", "0"): view(where, key)}
    if not where.startswith("s3://"):
        raise InputError(
            f"{key} names {where}, but a web server lists no files; name them one by one, or in a list (.txt)."
        )
    bucket, _, pattern = where.removeprefix("s3://").partition("/")
    is_folder = pattern.endswith("/") or not pattern
    fixed = pattern if is_folder else re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    expression = re.compile(f"{re.escape(pattern)}[^/]+" if is_folder else expression_of(pattern))
    found: dict[Key, Path] = {}
    for name in sorted(_listed(bucket, fixed, where, key)):
        match = expression.fullmatch(name)
        if match and name.lower().endswith(IMAGE_SUFFIXES):
            own = (PurePosixPath(name).stem,) if is_folder else tuple(text or "" for text in match.groups())
            found[own] = view(f"s3://{bucket}/{name}", key)
    if not found:
        raise InputError(f"{key} names {where}, where there is no image ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def names_many(address: str) -> bool:
    """Return whether an address names a group of files: a folder, or a pattern in a bucket. (? in https:// begins a query.)"""
    if address.startswith("s3://"):
        return address.endswith("/") or "/" not in address.removeprefix("s3://") or glob.has_magic(address)
    return address.endswith("/") or any(mark in address for mark in "*[")


@functools.lru_cache(10_000)
def _view(address: str, state: str) -> Path:
    from rasterio.shutil import copy

    name = address.replace("s3://", "/vsis3/", 1) if address.startswith("s3://") else f"/vsicurl/{address}"
    with open_raster(name) as file, tempfile.TemporaryDirectory() as folder:
        if file.driver not in IN_PARTS:
            raise InputError(
                f"it is a {file.driver} file, which can only be read as a whole ({' and '.join(IN_PARTS.values())} are read in "
                "parts); download it, and give the path of the copy."
            )
        header = header_of(file)
        if header.orientation != 1:
            raise InputError(f"it is stored turned (EXIF orientation {header.orientation}); turn it, or download it.")
        shown = Path(folder, f"view{SUFFIX}")
        copy(file, shown, driver="VRT")
        text = shown.read_text(encoding="utf-8")
    facts = f'<Metadata domain="dann_experiments"><MDI key="state">{escape(state)}</MDI></Metadata>'
    text = re.sub(r"(<VRTDataset[^>]*>)", lambda found: found[1] + facts, text, count=1)
    stem = PurePosixPath(unquote(urlsplit(address).path)).stem.strip(". ") or "image"
    return keep({f"{stem}{SUFFIX}": text}, f"{stem}{SUFFIX}")


def _state(address: str) -> str:
    """Return what tells whether a remote file has changed: its ETag, else its size and time."""
    if address.startswith("s3://"):
        bucket, _, name = address.removeprefix("s3://").partition("/")
        facts = _of_s3(address, lambda client: client.head_object(Bucket=bucket, Key=name))
        return f"ETag {facts['ETag']}"
    headers = _headers(address)
    if headers.get("ETag"):
        return f"ETag {headers['ETag'].removeprefix('W/')}"
    size = (headers.get("Content-Range") or "").rpartition("/")[2] or headers.get("Content-Length")
    return f"{size} bytes, {headers.get('Last-Modified')}"


def _headers(address: str) -> Mapping[str, Any]:
    """Return the headers of a file on a web server. Raises InputError if there is none."""
    host = urlsplit(address).netloc
    reason = ""
    for number in range(TRIES):
        time.sleep(DELAY * 2 ** (number - 1) if number else 0)
        try:
            for method, range_ in (("HEAD", None), ("GET", "bytes=0-0")):
                request = urllib.request.Request(address, method=method)  # noqa: S310
                if range_:
                    request.add_header("Range", range_)
                for name, value in _authorization():  # not sent on to another host
                    request.add_unredirected_header(name, value)
                try:
                    with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT) as answer:  # noqa: S310
                        return answer.headers
                except urllib.error.HTTPError as error:
                    # some servers know no HEAD
                    if range_ is None and error.code in (400, 403, 405, 501):
                        continue
                    raise
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code not in BUSY:
                hint = "; credentials come from the environment (docs/remote-images.md)" * (error.code in (401, 403))
                raise InputError(f"{host} answers {reason}{hint}.") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", error))
    raise InputError(
        f"{host} does not answer ({reason}); tried {TRIES} times, up to {CONNECT_TIMEOUT} seconds each. Try again later."
    )


def _authorization() -> Iterator[tuple[str, str]]:
    """Yield the headers for what GDAL reads from the environment."""
    if os.environ.get("GDAL_HTTP_USERPWD"):
        yield "Authorization", f"Basic {base64.b64encode(os.environ['GDAL_HTTP_USERPWD'].encode()).decode()}"
    elif os.environ.get("GDAL_HTTP_BEARER"):
        yield "Authorization", f"Bearer {os.environ['GDAL_HTTP_BEARER']}"


def _listed(bucket: str, prefix: str, where: str, key: str) -> list[str]:
    """Return the names in a bucket that begin with a prefix."""

    def pages(client: Any) -> list[str]:
        found = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in found for item in page.get("Contents", ())]

    try:
        return _of_s3(where, pages)
    except InputError as error:
        raise InputError(f"{key} names {where}: {error}") from None


def _of_s3(address: str, ask: Callable[[Any], Any]) -> Any:
    """Return the answer of S3. Raises InputError if it refuses, is away, or boto3 is missing."""
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise InputError(f"s3:// needs the package boto3: {install_command('s3')}") from None
    options: dict[str, Any] = {
        "retries": {"total_max_attempts": TRIES, "mode": "standard"}, "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": CONNECT_TIMEOUT,
    }  # fmt: skip
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "ON", "1"):
        options["signature_version"] = UNSIGNED
    endpoint = s3_address()
    if endpoint:
        options["s3"] = {"addressing_style": "path"}
    try:
        return ask(boto3.client("s3", endpoint_url=endpoint, config=Config(**options)))
    except ClientError as error:
        facts = error.response.get("Error", {})
        code = facts.get("Code", "an error")
        missing = {"404": "there is no such file", "NoSuchBucket": "there is no such bucket", "403": "access is denied"}
        raise InputError(
            f"S3 answers {code} ({missing.get(code, facts.get('Message', ''))}); credentials come from the environment "
            "(docs/remote-images.md)."
        ) from None
    except (BotoCoreError, ValueError) as error:
        where = endpoint or "S3"
        raise InputError(
            f"{where} does not answer ({type(error).__name__}); tried {TRIES} times, up to {CONNECT_TIMEOUT} seconds each. "
            "Credentials come from the environment (docs/remote-images.md)."
        ) from None
