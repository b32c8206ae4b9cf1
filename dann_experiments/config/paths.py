"""Reads paths as users write them. Addresses (https://, s3://, ...) are refused with a hint: files are read from the disk.

Images alone may be at an address (`remote_address`).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dann_experiments.config.errors import InputError
from dann_experiments.config.nearest import nearest

ADDRESS = re.compile(r"\s*(?:(?P<scheme>[a-z][a-z0-9+.-]+):/|/vsi(?P<handler>[a-z0-9_]+)[/?])", re.IGNORECASE)
# also recognized with a single slash, as pathlib leaves them
ONE_SLASH = {
    "http", "https", "ftp", "ftps", "sftp", "s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs", "adl",
    "hdfs", "dbfs", "file", "runs", "models", "mlflow-artifacts", "oss", "swift", "r2", "zip",
}  # fmt: skip
REMOTE = ("http://", "https://", "s3://")  # of images
# names of parameters that carry a key or a signature, in the query of an address
SECRET = re.compile(r"[?&;][^=&;]*(sig|token|key|secret|passw|auth|cred|amz|goog|session)[^=&;]*=", re.IGNORECASE)
WRITTEN = ("output", "tracking.folder", "data.embedded.folder")  # settings for files that are written
WAYS_OUT = {
    "copy it with `aws s3 cp` first": ("s3", "s3a", "s3n", "s3_streaming"),
    "copy it with `gcloud storage cp` first": ("gs", "gcs", "gs_streaming"),
    "copy it with `azcopy copy` first": ("az", "abfs", "abfss", "wasb", "wasbs", "adl", "adls", "az_streaming"),
    "copy it with `hdfs dfs -get` first": ("hdfs", "webhdfs"),
    "copy it with `databricks fs cp` first": ("dbfs",),
    "copy it with `sftp` or `scp` first": ("sftp", "scp", "ssh"),
    "fetch it with `mlflow artifacts download` first": ("runs", "models", "mlflow-artifacts", "mlflow"),
    "unpack it first": ("zip", "tar", "7z", "rar", "gzip", "sevenzip"),
    "download it with `curl -O` or `wget` first": ("http", "https", "ftp", "ftps", "curl", "curl_streaming"),
}


def user_path(text: str | Path) -> Path:
    """Expand `~` and `~USER`. Unlike `Path.expanduser` it never raises, even for an unknown user."""
    return Path(os.path.expanduser(text))


def local_path(text: str | Path, key: str) -> Path:
    """Return the path in setting `key`, also for `file:///...`. Raises InputError for any other address."""
    return user_path(local_text(str(text), key))


def near_name(path: str | Path) -> str:
    """Return a hint for a path that does not exist: the most alike name in the last folder of it that does; empty if none is."""
    missing = Path(path)
    while missing.parent != missing and not os.path.isdir(missing.parent):
        missing = missing.parent
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
        near = nearest(missing.name, sorted(os.listdir(missing.parent)))
        if near is not None:
            return f" (did you mean {missing.parent / near}?)"
    return ""


def local_text(text: str, key: str) -> str:
    """Return a path or a pattern without `file://`. Raises InputError for any other address, without its password.

    Otherwise an address would be treated as a missing path, or created as a folder.
    """
    scheme = _scheme(text)
    if scheme is None:
        return text
    if scheme == "file":
        parts = urlsplit(text.strip())
        if parts.netloc not in ("", "localhost"):
            raise InputError(
                f"{key} is {_shown(text)}, a file on another machine; copy it here and give its path (file:///PATH is one here)."
            )
        return unquote(parts.path)
    if key in WRITTEN:
        raise InputError(
            f"{key} is {_shown(text)}, which is an address, but files are written only to the disk. Give a path, and copy "
            "the files afterwards."
        )
    way_out = next((way for way, schemes in WAYS_OUT.items() if scheme in schemes), "download it first")
    raise InputError(
        f"{key} is {_shown(text)}, which is an address, but files are read only from the disk: {way_out}, and give the path "
        "of the copy."
    )


def remote_address(text: str, key: str) -> str | None:
    """Return the address of an image or pattern as http://, https:// or s3://BUCKET/KEY; None for all other texts.

    GDAL's names (/vsicurl/https://..., /vsis3/BUCKET/KEY) are understood. Raises InputError for an address with a user, a
    password or a signature in it: it would get into params, reports and cached files.
    """
    address = re.sub(r"^/vsicurl/(?=https?:)", "", re.sub(r"^/vsis3/", "s3://", text.strip(), flags=re.IGNORECASE))
    found = re.match(r"(https?|s3):/+(?=[^/])", address, re.IGNORECASE)
    if found is None:
        return None
    rest = address[found.end() :]
    if "@" in rest.partition("/")[0] or SECRET.search(rest):
        raise InputError(
            f"{key} is {_shown(text)} with a user, a password or a signature in the address, which would be kept with the run; "
            "leave it out and set it in the environment (docs/remote-images.md)."
        )
    return f"{found[1].lower()}://{rest}"


def is_remote(text: str) -> bool:
    """Return True for an address as `remote_address` returns it."""
    return text.startswith(REMOTE)


def _scheme(text: str) -> str | None:
    """Return the scheme of an address, or of a virtual file system of GDAL (s3 for /vsis3/); None for a path."""
    found = ADDRESS.match(text)
    if found is None:
        return None
    if found["handler"]:
        return found["handler"].lower()
    scheme = found["scheme"].lower()
    return scheme if text[found.end() :].startswith("/") or scheme in ONE_SLASH else None


def _shown(text: str) -> str:
    """Return an address without user, password and query, which may hold keys and signatures."""
    shown = re.sub(
        r"(:/+).*@", r"\1", text.strip(), flags=re.DOTALL
    )  # up to the last @: a password may contain any character
    shown, mark, _ = shown.partition("?")
    return repr(f"{shown}?..." if mark else shown)
