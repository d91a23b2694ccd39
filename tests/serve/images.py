"""Images for a real containerd: archives to import, and a registry on the loopback to pull them from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import attrs

_OCI: Final = "application/vnd.oci.image."
INDEX: Final = f"{_OCI}index.v1+json"
MANIFEST: Final = f"{_OCI}manifest.v1+json"


@attrs.define
class Image:
    """One image, by what it is made of.

    Attributes:
        blobs: by digest.
        descriptors: of its manifests.
    """

    blobs: dict[str, bytes] = attrs.field(factory=dict)
    descriptors: list[dict[str, Any]] = attrs.field(factory=list)

    def put(self, kind: str, data: bytes) -> dict[str, Any]:
        """Add a blob; its descriptor."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def add(
        self,
        platform: Mapping[str, str],
        files: Mapping[str, bytes],
        entrypoint: Sequence[str] = (),
        *,
        says_platform: bool = True,
    ) -> Image:
        """Add a manifest.

        Args:
            platform: os and architecture, in its config and beside it.
            files: by path.
            entrypoint: of its config.
            says_platform: say it beside the manifest, too.
        """
        layer = _tar(files)
        config = {
            **platform,
            "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put(f"{_OCI}config.v1+json", json.dumps(config).encode()),
            "layers": [self.put(f"{_OCI}layer.v1.tar+gzip", gzip.compress(layer, mtime=0))],
        }
        return self._add(manifest, platform if says_platform else {})

    def add_artefact(self, module: bytes) -> Image:
        """Add a module as it is, by the format of the CNCF's working group for WebAssembly."""
        config = {"architecture": "wasm", "os": "wasip1", "layerDigests": []}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put("application/vnd.wasm.config.v0+json", json.dumps(config).encode()),
            "layers": [self.put("application/wasm", module)],
        }
        return self._add(manifest, {})

    def _add(self, manifest: Mapping[str, Any], platform: Mapping[str, str]) -> Image:
        descriptor = self.put(MANIFEST, json.dumps(manifest).encode())
        self.descriptors.append({**descriptor, **({"platform": dict(platform)} if platform else {})})
        return self

    def top(self) -> dict[str, Any]:
        """What its name means: its only manifest, or an index of all."""
        if len(self.descriptors) == 1:
            return self.descriptors[0]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.descriptors}
        return self.put(INDEX, json.dumps(index).encode())

    def archive(self, path: Path, name: str) -> Path:
        """Write it as an OCI layout in a tar file."""
        names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
        index = {"schemaVersion": 2, "manifests": [{**self.top(), "annotations": names}]}
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
        blobs = {f"blobs/sha256/{digest.partition(':')[2]}": data for digest, data in self.blobs.items()}
        path.write_bytes(_tar({**files, **blobs}))
        return path


def _tar(files: Mapping[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()


@contextmanager
def registry(images: Mapping[str, Image]) -> Iterator[str]:
    """A registry that has these images under the tag 1; its address."""
    tops = {name: image.top() for name, image in images.items()}

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            if self.connection.recv(1, socket.MSG_PEEK) == b"\x16":  # TLS, which containerd tries before it takes this
                self.wfile.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
            else:
                super().handle()

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            parts = self.path.partition("?")[0].split("/")  # "", "v2", NAME, "manifests" or "blobs", TAG or DIGEST
            if len(parts) != 5:
                return self._send(b"{}", "application/json", with_body)
            image, wanted = images[parts[2]], parts[4]
            top = tops[parts[2]]
            digest = top["digest"] if wanted == "1" else wanted
            known = {each["digest"]: each["mediaType"] for each in (*image.descriptors, top)}
            self._send(image.blobs[digest], known.get(digest, "application/octet-stream"), with_body, digest)
            return None

        def _send(self, body: bytes, kind: str, with_body: bool, digest: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", digest)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            serving.join()
