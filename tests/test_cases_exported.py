"""Folders belong to people: an export replaces an older export and nothing else."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lighten import api
from lighten.artifacts import open_source
from lighten.errors import DiskFull, UserError
from lighten.quantization import child, gguf_model
from lighten.quantization.export_card import require_replaceable
from lighten.quantization.table import weight_bytes
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model


def adapter_on(base: Path, folder: Path) -> None:
    """An adapter that others trained on a tiny Llama."""
    trained(tiny_model("llama"), folder)
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "README.md", "sub/x", ".hidden"])
def test_a_folder_with_a_persons_files_is_neither_written_nor_emptied(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "int8"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    before = sorted(target.rglob("*"))
    with pytest.raises(UserError, match=r"are not an export's .*; nothing was changed"):
        api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
    with pytest.raises(UserError, match=r"are not an export's .*; nothing was changed"):
        api.quantize(str(tiny_folder), "int8", output_dir=tmp_path)
    assert sorted(target.rglob("*")) == before
    assert (target / name).read_text() == "mine"


def test_an_older_export_is_replaced_until_a_file_is_put_beside_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "e"
    for _ in range(2):
        api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
    for name in ("mine.txt", "results.json", "weights.safetensors"):
        (target / name).write_text("mine")
        with pytest.raises(UserError, match=name):
            api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
        (target / name).unlink()
    assert (target / "model.safetensors").is_file()
    for name in ("run.f16.gguf", "run.q4_0.gguf"):  # llama-quantize puts one beside the other
        (target / name).touch()
    with pytest.raises(UserError, match=r"q4_0\.gguf"):
        require_replaceable(target)


def test_links_and_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="link or a file"):
            require_replaceable(tmp_path / name)


def test_what_an_earlier_save_left_beside_a_whole_file_is_not_copied(tmp_path: Path) -> None:
    """transformers reads the whole file; shards and index beside it are of another model."""
    base = tmp_path / "base"
    save_tiny(base)
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "older", max_shard_size="20KB")
    for path in (tmp_path / "older").glob("model*"):
        path.rename(base / path.name)
    assert len(shards := sorted(base.glob("model-*.safetensors"))) > 1
    assert weight_bytes(base) == (base / "model.safetensors").stat().st_size
    export = api.export(str(base), "merged", output_dir=tmp_path / "m", verify=False)
    assert [file.name for file in export.files] == ["model.safetensors"]
    assert not list(export.folder.glob("*.index.json"))
    (base / "model.safetensors").unlink()  # then the shards are the model
    export = api.export(str(base), "merged", output_dir=tmp_path / "m", verify=False)
    assert [file.name for file in export.files] == [file.name for file in shards]
    assert (export.folder / "model.safetensors.index.json").is_file()


def test_a_receipts_own_files_are_looked_at_for_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's is taken on its base as GGUF in float32, which is written meanwhile."""
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    folder = tmp_path / "g"
    api.export(str(tmp_path / "adapter"), "gguf-adapter", output_dir=folder, verify=False)
    monkeypatch.setattr(
        gguf_model, "write", lambda *_: pytest.fail("the base was written without a look")
    )
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=60_000))
    with pytest.raises(DiskFull, match="comparing adapter as gguf-adapter needs"):
        api.verify(folder, str(tmp_path / "adapter"))
    with pytest.raises(DiskFull, match="comparing adapter as gguf-adapter needs"):
        api.export(str(tmp_path / "adapter"), "gguf-adapter", output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


@contextmanager
def only_read(folder: Path) -> Iterator[None]:
    """A folder that this thread cannot write to, root's neither.

    What lets root write everywhere is taken from the thread for as long (capabilities(7)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, sets) == 0
    effective, mode = sets[0], folder.stat().st_mode
    sets[0] = effective & ~(1 << 1)  # CAP_DAC_OVERRIDE
    assert libc.capset(header, sets) == 0
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(mode)
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("form", ["merged", "gguf-adapter"])
def test_what_can_only_be_read_is_compared_and_its_receipt_not_stored(
    form: str, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    mounted = tmp_path / "mounted"
    export = api.export(tmp_path / "adapter", form, output_dir=mounted / "out", verify=False)
    before = sorted(tmp_path.rglob("*"))
    lines: list[str] = []
    with only_read(mounted), only_read(export.folder):
        with pytest.raises(PermissionError):  # so it is for anything written here
            (export.folder / "probe").touch()
        receipt = api.verify(export.folder, tmp_path / "adapter", log=lines.append)
    assert receipt.passed
    assert lines == [f"{export.folder} cannot be written to: the receipt is shown and not stored"]
    assert sorted(tmp_path.rglob("*")) == before
    assert api.verify(export.folder, tmp_path / "adapter", log=lines.append) == receipt
    assert (export.folder / "receipt.json").is_file()
    assert len(lines) == 1


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files were called `.f16.gguf`, which are hidden, and which `push` leaves out."""
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    for source in (base, tmp_path / "adapter"):
        (source / "sub").mkdir()
        for folder, name in ((source, "."), (source / "sub", "..")):
            monkeypatch.chdir(folder)
            assert open_source(name).name == source.name
            export = api.export(name, "gguf:f16", output_dir=tmp_path / "g", verify=False)
            assert [file.name for file in export.files] == [f"{source.name}.f16.gguf"]


def test_an_adapter_may_lie_at_the_top_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `/adapter` of a container does: it has no folder above its parent."""
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    monkeypatch.setattr(Path, "resolve", lambda *_, **__: Path("/adapter"))
    assert open_source(tmp_path / "adapter").name == "adapter"


@pytest.mark.usefixtures("forked_jobs")
def test_a_killed_quantize_leaves_nothing_that_the_next_one_does_not_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its merged model lay in the folder of temporary files, which may be memory, for ever."""
    adapter_on(save_tiny(tmp_path / "base"), tmp_path / "adapter")
    left = tmp_path / "out" / ".quantize-killed.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    models, call = [], child.call
    monkeypatch.setattr(child, "call", lambda job: (models.append(job.get("model")), call(job))[1])
    result = api.quantize(tmp_path / "adapter", "gguf:q8_0", output_dir=tmp_path / "out")
    assert result.format("gguf:q8_0")["file_bytes"] > 0
    assert all(model.startswith(str(tmp_path / "out")) for model in models if model)
    assert any(models)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gguf-q8_0", "quantize.json"}
    with pytest.raises(UserError, match="int4 chooses its rounding on data"):
        api.quantize(tmp_path / "adapter", "int4", output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_a_file_manager_leaves_is_nobodys(tiny_folder: Path, tmp_path: Path) -> None:
    """Finder and Explorer write into a folder that is looked at."""
    target = tmp_path / "e"
    for name in (".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini"):
        api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
        (target / name).touch()
    api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
    assert not (target / "desktop.ini").exists()


def test_an_adapter_is_verified_beside_other_gguf_files(tmp_path: Path) -> None:
    """Where people keep them: all in one folder."""
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    source = str(tmp_path / "adapter")
    export = api.export(source, "gguf-adapter", output_dir=tmp_path / "g", verify=False)
    together = tmp_path / "all"
    together.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(export.files[0], together / name)
    receipt = api.verify(together / "b.gguf", source)
    assert receipt.passed
    assert receipt.artefact == "b.gguf"
    with pytest.raises(UserError, match="name one GGUF file"):
        api.verify(together, source)


def test_a_program_is_not_made_of_weights_that_were_rounded_once(tmp_path: Path) -> None:
    """It ended in a traceback of torch's, after the model was loaded."""
    pytest.importorskip("executorch")
    base = save_tiny(tmp_path / "base")
    config = base / "config.json"
    values = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"quantised already \(torchao\)"):
        api.export(str(base), "executorch", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
