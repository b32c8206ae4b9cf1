"""A web server for tests, in a process of its own (GDAL keeps Python's lock while it waits): python remote_server.py FOLDER.

It prints its port. The first part of a path says how it behaves: ok (ranges), etag (the same with an ETag), cut (breaks off in
the middle of what lies behind 64 kB), busy (503 twice for each request), whole (knows no ranges), private (user me, password
1234), no-head.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
FAR = 64 * 1024
refused: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        way, _, name = self.path.lstrip("/").partition("/")
        file = FOLDER / name
        wanted = f"Basic {base64.b64encode(b'me:1234').decode()}"
        if way == "private" and self.headers.get("Authorization") != wanted:
            return self.fail(401)
        if way == "no-head" and not body:
            return self.fail(405)
        if not file.is_file():
            return self.fail(404)
        asked = f"{self.command} {self.path} {self.headers.get('Range')}"
        if way == "busy" and refused.get(asked, 0) < 2:
            refused[asked] = refused.get(asked, 0) + 1
            return self.fail(503)
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and way != "whole":
            first, last = int(found[1]), min(int(found[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        if way == "etag":
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        if way != "whole":
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if not body:
            return None
        part = content[first : last + 1]
        if way == "cut" and last > FAR:
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        self.wfile.write(part)
        return None

    def fail(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
