"""Paths as users write them, and addresses, which are none: files are read from the disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dann_experiments.config.errors import InputError

ADDRESS = re.compile(r"\s*(?:(?P<scheme>[a-z][a-z0-9+.-]+):/|/vsi(?P<handler>[a-z0-9_]+)[/?])", re.IGNORECASE)
# those that are known with one slash too: somebody made a path of them
ONE_SLASH = {
    "http", "https", "ftp", "ftps", "sftp", "s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs", "adl",
    "hdfs", "dbfs", "file", "runs", "models", "mlflow-artifacts", "oss", "swift", "r2", "zip",
}  # fmt: skip
WRITTEN = ("output", "tracking.folder", "data.embedded.folder")  # settings that say where files go
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
    """`text` with `~` and `~USER` put in. Never raises, as `Path.expanduser` does for a user that is not there."""
    return Path(os.path.expanduser(text))


def local_path(text: str | Path, key: str) -> Path:
    """The path that a user gave as the setting `key`. `file:///...` is one; raises InputError for any other address."""
    return user_path(local_text(str(text), key))


def local_text(text: str, key: str) -> str:
    """What a user wrote as a path or a pattern, without `file://`. Raises InputError for any other address: it would be taken for
    a path that does not exist, or a folder of that name would be made. Passwords in it are not shown."""
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
            f"{key} is {_shown(text)}, which is an address; files are written to the disk alone. Give a path, and copy "
            "what is there afterwards."
        )
    way_out = next((way for way, schemes in WAYS_OUT.items() if scheme in schemes), "download it first")
    raise InputError(
        f"{key} is {_shown(text)}, which is an address; files are read from the disk alone: {way_out}, and give the path of the "
        "copy."
    )


def _scheme(text: str) -> str | None:
    """The scheme of an address, or GDAL's name for a file system that is none (/vsis3/ is s3); None for a path."""
    found = ADDRESS.match(text)
    if found is None:
        return None
    if found["handler"]:
        return found["handler"].lower()
    scheme = found["scheme"].lower()
    return scheme if text[found.end() :].startswith("/") or scheme in ONE_SLASH else None


def _shown(text: str) -> str:
    """The address as a message may show it: without user, password and query, where keys and signatures stand."""
    shown = re.sub(r"(:/+).*@", r"\1", text.strip(), flags=re.DOTALL)  # up to the last @: a password may hold any sign
    shown, mark, _ = shown.partition("?")
    return repr(f"{shown}?..." if mark else shown)
