"""Where S3 is, for GDAL and boto3, which read different variables of the environment."""

from __future__ import annotations

import os
from urllib.parse import urlsplit


def s3_endpoint() -> dict[str, str]:
    """Return GDAL's options for the endpoint that AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names; {} if neither is set."""
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not address or os.environ.get("AWS_S3_ENDPOINT"):
        return {}
    parts = urlsplit(address)
    secure = "YES" if parts.scheme == "https" else "NO"
    return {"AWS_S3_ENDPOINT": parts.netloc, "AWS_HTTPS": secure, "AWS_VIRTUAL_HOSTING": "FALSE"}


def s3_address() -> str | None:
    """Return the address of the endpoint for boto3; None = that of AWS."""
    gdal = os.environ.get("AWS_S3_ENDPOINT")
    if gdal:
        secure = os.environ.get("AWS_HTTPS", "YES").upper() not in ("NO", "FALSE", "OFF", "0")
        return gdal if "://" in gdal else f"http{'s' * secure}://{gdal}"
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
