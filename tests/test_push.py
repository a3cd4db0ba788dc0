"""`lighten push` through huggingface_hub to a local server that speaks the hub's interface."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import UserError
from tests.tiny import save_tiny


@dataclass
class Hub:
    """What the server was given."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refuse: int = 0


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer({"id": "me/tiny", "sha": "0" * 40, "siblings": [], "private": True})

        def do_POST(self) -> None:
            data = self.body()
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refuse:
                self.answer({"error": "not yours"}, hub.refuse)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(data))
                self.answer({"url": f"{hub.address}/me/tiny", "id": "me/tiny"})
            elif "/preupload/" in self.path:
                files = json.loads(data)["files"]
                self.answer({"files": [
                    {"path": own["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "regular"}
                    for own in files
                ]})  # fmt: skip
            elif "/commit/" in self.path:
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                self.answer({"success": True, "commitOid": "1" * 40,
                             "commitUrl": f"{hub.address}/me/tiny/commit/{'1' * 40}"})  # fmt: skip
            else:
                self.answer({"errors": [], "warnings": []})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # The server takes every file as a plain one: it does not speak the protocol of large files.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    base = save_tiny(tmp_path / "base")
    lighten.export(base, "merged", output_dir=tmp_path / "out", verify=False)
    return tmp_path / "out"


def test_an_artefact_arrives_whole_and_private(artefact: Path, hub: Hub) -> None:
    (artefact / ".cache").mkdir()
    (artefact / ".cache" / "left").write_text("not for the hub")
    address = lighten.push(artefact, "me/tiny")
    assert re.match(rf"{hub.address}/me/tiny/commit/1+$", address)
    assert hub.tokens == {"Bearer hf_test"}
    (created,) = hub.created
    assert created["name"] == "tiny"
    assert created.get("private") is True or created.get("visibility") == "private"
    wanted = {path.name: path.read_bytes() for path in artefact.iterdir() if path.is_file()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "export.json"} <= set(wanted)
    assert hub.files == wanted


def test_what_should_not_leave_the_machine_does_not(artefact: Path, hub: Hub) -> None:
    def refused(words: str, repo: str = "me/tiny") -> None:
        with pytest.raises(UserError, match=words) as error:
            lighten.push(artefact, repo)
        assert "\n" not in str(error.value)
        assert not hub.created

    refused("no repository's name", "a/b/c")
    (artefact / "optimizer.pt").write_bytes(b"x")
    refused("pickle")
    (artefact / "optimizer.pt").unlink()
    (artefact / "receipt.json").write_text('{"passed": false}')
    refused("does not answer as")
    (artefact / "receipt.json").unlink()
    weights = (artefact / "model.safetensors").read_bytes()
    (artefact / "model.safetensors").write_bytes(weights[:-10])
    refused("torn")
    (artefact / "model.safetensors").unlink()
    refused("no weights")
    (artefact / "model.safetensors").write_bytes(weights)
    (artefact / "README.md").unlink()
    refused("no model card")


def test_a_hub_that_refuses_is_told_in_a_sentence(
    artefact: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuse = 403
    with pytest.raises(UserError, match=f"{hub.address} did not take me/tiny") as error:
        lighten.push(artefact, "me/tiny")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("lighten.quantization.push.get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        lighten.push(artefact, "me/tiny")
