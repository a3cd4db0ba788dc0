"""`lighten push` through huggingface_hub to a local server that speaks the hub's interface."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import UserError
from tests.local_server import serving
from tests.tiny import save_tiny

PART = 20_000  # bytes of a part of a large file


@dataclass
class Hub:
    """What the server was sent.

    Attributes:
        large: Endings of files that it wants through the protocol of large files (git LFS), as the
            hub wants those that its `.gitattributes` names.
        parts: Of large files, by their checksum.
        objects: Whole large files, by their checksum.
        verified: Checksums that the client had it verify.
        refuse: Answer to everything else, where not 0.
        refuse_parts: Answer to the storage of large files, where not 0.
    """

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    large: tuple[str, ...] = ()
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    refuse: int = 0
    refuse_parts: int = 0

    def actions(self, oid: str, size: int) -> dict[str, Any]:
        """What a client has to do for a large file: nothing where it is here already."""
        if oid in self.objects:
            return {}
        storage, verify = f"{self.address}/storage/{oid}", {"href": f"{self.address}/verify"}
        if size <= PART:
            return {"actions": {"upload": {"href": f"{storage}/0"}, "verify": verify}}
        urls = {str(n + 1): f"{storage}/{n + 1}" for n in range(-(-size // PART))}
        header = {"chunk_size": str(PART), **urls}
        upload = {"href": f"{self.address}/complete/{oid}", "header": header}
        return {"actions": {"upload": upload, "verify": verify}}

    def complete(self, oid: str, parts: list[int]) -> None:
        """Put a large file together; it has to be what its checksum says."""
        data = b"".join(self.parts[oid][part] for part in parts)
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects[oid] = data


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

        def do_PUT(self) -> None:
            data = self.body()
            _, _, oid, part = self.path.split("/")
            if hub.refuse_parts:
                self.answer({}, hub.refuse_parts)
                return
            assert "Authorization" not in self.headers  # the storage is another's
            hub.parts.setdefault(oid, {})[int(part)] = data
            if part == "0":
                hub.complete(oid, [0])
            self.send_response(200)
            self.send_header("ETag", f'"{part}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def large(self, data: bytes) -> None:
            sent = json.loads(data)
            if self.path.endswith("/info/lfs/objects/batch"):
                assert sent["hash_algo"] == "sha256"
                self.answer({"transfer": "multipart", "objects": [
                    {**item, **hub.actions(item["oid"], item["size"])} for item in sent["objects"]
                ]})  # fmt: skip
            elif self.path == "/verify":
                assert len(hub.objects[sent["oid"]]) == sent["size"]
                hub.verified.add(sent["oid"])
                self.answer({})
            else:
                hub.complete(sent["oid"], [part["partNumber"] for part in sent["parts"]])
                self.answer({})

        def do_POST(self) -> None:
            data = self.body()
            if "/lfs/" in self.path or self.path.startswith(("/verify", "/complete/")):
                self.large(data)
                return
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refuse:
                self.answer({"error": "not yours"}, hub.refuse)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(data))
                self.answer({"url": f"{hub.address}/me/tiny", "id": "me/tiny"})
            elif "/preupload/" in self.path:
                files = json.loads(data)["files"]
                self.answer({"files": [
                    {"path": file["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if file["path"].endswith(hub.large) else "regular"}
                    for file in files
                ]})  # fmt: skip
            elif "/commit/" in self.path:
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.objects[value["oid"]]
                        assert value["size"] == len(hub.files[value["path"]])
                self.answer({"success": True, "commitOid": "1" * 40,
                             "commitUrl": f"{hub.address}/me/tiny/commit/{'1' * 40}"})  # fmt: skip
            else:
                self.answer({"errors": [], "warnings": []})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    fake_hub = Hub()
    with serving(handler_of(fake_hub)) as address:
        fake_hub.address = address
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # The server speaks git LFS for large files, and not the hub's newer storage of chunks.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield fake_hub


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    base = save_tiny(tmp_path / "base")
    lighten.export(base, "merged", output_dir=tmp_path / "out", verify=False)
    return tmp_path / "out"


def test_an_artefact_arrives_whole_and_private(artefact: Path, hub: Hub) -> None:
    (artefact / "model[q8].json").write_text("{}")
    (artefact / ".cache").mkdir()
    (artefact / ".cache" / "left").write_text("not for the hub")
    address = lighten.push(artefact, "me/tiny")
    assert re.match(rf"{hub.address}/me/tiny/commit/1+$", address)
    assert hub.tokens == {"Bearer hf_test"}
    (created,) = hub.created
    assert created["name"] == "tiny"
    assert created.get("private") is True or created.get("visibility") == "private"
    files = {path.name: path.read_bytes() for path in artefact.iterdir() if path.is_file()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "export.json"} <= set(files)
    assert hub.files == files


# huggingface_hub 2.4 sends them in a way that httpx calls old.
LARGE = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@LARGE
def test_large_files_go_in_parts_before_the_commit(artefact: Path, hub: Hub) -> None:
    """Weights in parts and the tokenizer at once, through the storage; the rest in the commit."""
    hub.large = (".safetensors", "tokenizer.json")
    lighten.push(artefact, "me/tiny")
    files = {path.name: path.read_bytes() for path in artefact.iterdir() if path.is_file()}
    assert hub.files == files
    checksums = {
        name: hashlib.sha256(files[name]).hexdigest()
        for name in ("model.safetensors", "tokenizer.json")
    }
    assert set(hub.objects) == hub.verified == set(checksums.values())
    assert len(hub.parts[checksums["model.safetensors"]]) > 2
    # Again: what is there is sent no more.
    hub.parts.clear()
    hub.files.clear()
    lighten.push(artefact, "me/tiny")
    assert not hub.parts
    assert hub.files == files


@LARGE
def test_a_storage_that_refuses_is_told_and_nothing_is_committed(artefact: Path, hub: Hub) -> None:
    hub.large, hub.refuse_parts = (".safetensors",), 403
    with pytest.raises(
        UserError, match=r"did not take me/tiny: .*model\.safetensors.*403"
    ) as error:
        lighten.push(artefact, "me/tiny")
    assert "\n" not in str(error.value)
    assert not hub.files


def test_what_should_not_leave_the_machine_does_not(artefact: Path, hub: Hub) -> None:
    def assert_refused(message: str, repo: str = "me/tiny") -> None:
        with pytest.raises(UserError, match=message) as error:
            lighten.push(artefact, repo)
        assert "\n" not in str(error.value)
        assert not hub.created

    assert_refused("no repository's name", "a/b/c")
    (artefact / "optimizer.pt").write_bytes(b"x")
    assert_refused("pickle")
    (artefact / "optimizer.pt").unlink()
    (artefact / "receipt.json").write_text('{"passed": false}')
    assert_refused("does not answer as")
    (artefact / "receipt.json").unlink()
    weights = (artefact / "model.safetensors").read_bytes()
    (artefact / "model.safetensors").write_bytes(weights[:-10])
    assert_refused("it ends before model.norm.weight")
    (artefact / "model.safetensors").unlink()
    assert_refused("no weights")
    (artefact / "model.safetensors").write_bytes(weights)
    (artefact / "README.md").unlink()
    assert_refused("no model card")


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
