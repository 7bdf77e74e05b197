"""A bucket on this machine: as much of the JSON interface of Google Cloud Storage as gcsfs and TensorStore use."""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TIME = "2026-01-01T00:00:00Z"
ONCE = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # gcsfs reads it once; else it asks Google for the bucket's kind
os.environ.update(ONCE)


class BucketServer(ThreadingHTTPServer):
    """Objects by name, the bucket's first: `{"bucket/a/b.txt": b"..."}`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.sessions: dict[str, bytearray] = {}  # uploads in parts
        self.lock = threading.RLock()
        self.latency = 0.0  # seconds that every answer takes longer
        self.gate: threading.Barrier | None = None  # contents are given to so many requests together
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may hang up; everything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        """With these variables gs:// leads here."""
        return ONCE | {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def put(self, name: str, content: bytes) -> dict[str, str]:
        with self.lock:
            self.objects[name] = content
            self.generations[name] = max(self.generations.values(), default=0) + 1
            return self.resource(name)

    def resource(self, name: str) -> dict[str, str]:
        bucket, _, key = name.partition("/")
        return {
            "kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(self.objects[name])),
            "generation": str(self.generations[name]), "metageneration": "1", "updated": TIME, "timeCreated": TIME,
            "mediaLink": f"{self.address}/download/storage/v1/b/{bucket}/o/{key.replace('/', '%2F')}?alt=media",
        }  # fmt: skip

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if not name.startswith(f"{bucket}/{prefix}"):
                continue
            if key < query.get("startOffset", "") or ("endOffset" in query and key >= query["endOffset"]):
                continue
            head, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(self.resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


@contextlib.contextmanager
def serve() -> Iterator[BucketServer]:
    server = BucketServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BucketServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _parse(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o)?(?:/(.+))?", parts.path)
        self.bucket, self.key = found[1], unquote(found[2] or "")
        self.name = f"{self.bucket}/{self.key}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _stale(self, name: str) -> bool:
        """Whether the object is another than the request asks for."""
        wanted = self.query.get("ifGenerationMatch")
        now = self.server.generations[name] if name in self.server.objects else 0
        return wanted is not None and int(wanted) != now

    def do_GET(self) -> None:
        self._parse()
        time.sleep(self.server.latency)
        with self.server.lock:
            if not self.key:
                plain = {"kind": "storage#bucket", "name": self.bucket}
                is_list = urlsplit(self.path).path.endswith("/o")
                return self._answer(200, self.server.listed(self.bucket, self.query) if is_list else plain)
            if self.name not in self.server.objects:
                return self._answer(404, {"error": {"code": 404, "message": "not found"}})
            if self.query.get("alt") != "media":
                return self._answer(200, self.server.resource(self.name))
            content, gate = self.server.objects[self.name], self.server.gate
            generation = str(self.server.generations[self.name])
        if gate is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                gate.wait(timeout=10)
        if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            begin = int(span[1]) if span[1] else size - int(span[2])
            end = min(int(span[2]) + 1, size) if span[1] and span[2] else size
            if begin >= size:
                return self._answer(416, x_goog_generation=generation)
            said = f"bytes {begin}-{end - 1}/{size}"
            return self._answer(206, content[begin:end], Content_Range=said, x_goog_generation=generation)
        return self._answer(200, content, x_goog_generation=generation)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.path.startswith("/session/"):
            return self._take_part(unquote(self.path.removeprefix("/session/")))
        self._parse()
        kind = self.query.get("uploadType")
        with self.server.lock:
            if "/rewriteTo/" in self.key:
                source, _, target = self.key.partition("/rewriteTo/b/")
                bucket, _, key = target.partition("/o/")
                resource = self.server.put(f"{bucket}/{key}", self.server.objects[f"{self.bucket}/{source}"])
                return self._answer(200, {"done": True, "resource": resource})
            if kind == "resumable":
                name = f"{self.bucket}/{self.query['name']}"
                self.server.sessions[name] = bytearray()
                return self._answer(200, Location=f"{self.server.address}/session/{name}")
            if kind == "multipart":
                boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
                _, head, rest = self.body.split(b"--" + boundary, 2)
                self.query["name"] = json.loads(head.partition(b"\n\n")[2])["name"]
                self.body = rest.partition(b"\n\n")[2].removesuffix(b"\n--" + boundary + b"--")
            name = f"{self.bucket}/{self.query['name']}"
            if self._stale(name):
                return self._answer(412, {"error": {"code": 412, "message": "generation"}})
            return self._answer(200, self.server.put(name, self.body))

    def _take_part(self, name: str) -> None:
        session = self.server.sessions[name]
        session += self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers["Content-Range"].endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(session) - 1}")
        return self._answer(200, self.server.put(name, bytes(session)))

    def do_DELETE(self) -> None:
        self._parse()
        with self.server.lock:
            if self._stale(self.name):
                return self._answer(412, {"error": {"code": 412, "message": "generation"}})
            missing = self.server.objects.pop(self.name, None) is None
        return self._answer(404 if missing else 204)
