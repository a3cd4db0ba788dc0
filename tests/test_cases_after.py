"""What a user does after training: several adapters, one folder, options without effect."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lighten
from lighten import folders, models
from lighten.adapters.frozen import product
from lighten.cli.console import print_json
from lighten.cli.main import app
from lighten.errors import UserError
from lighten.models.load import weight_files
from lighten.quantization.dense import dense_base
from lighten.quantization.file_sizes import folder_bytes
from lighten.quantization.forecast import forecast
from lighten.quantization.gguf_model import write_gguf
from lighten.quantization.model_source import opened
from lighten.quantization.table import weight_bytes
from lighten.quantization.targets import DYNAMIC
from lighten.quantization.verify import ALLOWED
from lighten.quantization.weights import make
from lighten.runs import Run
from lighten.serving import adapters, checks
from lighten.serving.options import Options, require_valid
from lighten.serving.remote import Remote
from lighten.whole_files import remove_unfinished, scratch_folder, whole_folder
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chat_file: Path) -> Run:
    """A run with two adapters."""
    folder = tmp_path_factory.mktemp("after") / "run"
    return lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), output_dir=str(folder),
        max_steps=2, learning_rate=0.05, val_size=8, dtype="float32", progress=False,
        adapters=[{"name": "a", "lora_r": 4}, {"name": "b", "lora_r": 8}],
    )  # fmt: skip


def test_the_exports_of_two_adapters_of_a_run_lie_beside_each_other(
    run: Run, tmp_path: Path
) -> None:
    first = lighten.export(run, "merged", adapter="a", verify=False)
    weights = (first.folder / "model.safetensors").read_bytes()
    second = lighten.export(run, "merged", adapter="b", verify=False)
    assert (first.folder / "model.safetensors").read_bytes() == weights
    assert first.folder != second.folder
    planned = [forecast(run, "gguf:q8_0", adapter=name, timed=False).folder for name in "ab"]
    assert planned == [str(run.folder / "exports" / name) for name in "ab"]
    with opened(run, tmp_path, adapter="b") as source:
        assert str(source.exports) == planned[1]


def test_an_export_never_replaces_what_it_is_made_of(run: Run, tmp_path: Path) -> None:
    merged = lighten.export(run, "merged", adapter="a", output_dir=tmp_path / "m", verify=False)
    with pytest.raises(UserError, match="is what is exported"):
        lighten.export(str(merged.folder), "gguf:q8_0", output_dir=merged.folder, verify=False)
    assert (merged.folder / "model.safetensors").is_file()
    adapter = lighten.export(run, "adapter", adapter="a", output_dir=tmp_path / "a", verify=False)
    with pytest.raises(UserError, match="is what is exported"):
        lighten.export(str(adapter.folder), "merged", output_dir=adapter.folder, verify=False)
    assert (adapter.folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("form", ["merged", "gguf", "adapter"])
def test_a_dtype_without_effect_is_refused(form: str, run: Run, tmp_path: Path) -> None:
    base = run.recipe().model_name_or_path
    source: Any = run if form == "adapter" else base
    options = {"adapter": "a"} if form == "adapter" else {}
    with pytest.raises(UserError, match="--dtype"):
        lighten.export(source, form, output_dir=tmp_path / "o", dtype="float16", verify=False,
                       **options)  # fmt: skip


def test_an_adapters_chat_template_is_not_lost_to_its_bases(tmp_path: Path) -> None:
    """Other trainers keep the template in `tokenizer_config.json`; a base has a file for it."""
    base = save_tiny(tmp_path / "base")
    model = tiny_model("llama")
    trained(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").unlink()
    settings = tmp_path / "adapter" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    export = lighten.export(str(tmp_path / "adapter"), "merged", output_dir=tmp_path / "m",
                            verify=False)  # fmt: skip
    assert AutoTokenizer.from_pretrained(export.folder).chat_template == template


def test_named_chat_templates_go_with_a_model_and_not_with_an_adapters_own(tmp_path: Path) -> None:
    """Of a model with a template for tools, exports answered by the default one."""
    base = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=64)
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    named = {"default": own, "tool_use": "tools: " + own}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base)
    copied = lighten.export(str(base), "merged", output_dir=tmp_path / "copied", verify=False)
    assert AutoTokenizer.from_pretrained(copied.folder).chat_template == named
    make("nf4", copied.folder, tmp_path / "nf4", [])
    assert AutoTokenizer.from_pretrained(tmp_path / "nf4").chat_template == named
    trained(tiny_model("llama", hidden_size=64, intermediate_size=64), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for template in (None, own):
        if template is not None:
            tokenizer.chat_template = template
            tokenizer.save_pretrained(tmp_path / "adapter")
        merged = lighten.export(str(tmp_path / "adapter"), "merged", output_dir=tmp_path / "merged",
                                verify=False)  # fmt: skip
        expected = named if template is None else template
        assert AutoTokenizer.from_pretrained(merged.folder).chat_template == expected


def test_a_quantised_copys_receipt_is_of_its_own_format(tmp_path: Path) -> None:
    """Four bits may be farther away than sixteen; and a GGUF file's name says nothing."""
    base = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=64)
    receipts = {}
    for kind in ("nf4", "int8"):
        make(kind, base, tmp_path / kind, [])
        receipts[kind] = lighten.verify(tmp_path / kind, str(base))
    write_gguf(base, tmp_path / "gguf" / "model.f32.gguf", "q8_0")
    receipts["q8_0"] = lighten.verify(tmp_path / "gguf", str(base))
    for kind, receipt in receipts.items():
        assert (receipt.kind, receipt.allowed_kl) == (kind, ALLOWED[kind])


@pytest.mark.parametrize(
    ("kind", "arch", "named"),
    [("nf4", "gpt2", "nf4"), ("int8:bitsandbytes", "gpt2", "int8"), (DYNAMIC, "llama", "int4")],
)
def test_a_copy_in_16_bits_is_read_in_32_for_its_receipt_and_as_a_base(
    kind: str, arch: str, named: str, tmp_path: Path
) -> None:
    """transformers leaves a part of such folders in their own format, whatever it is asked for."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "n_embd": 64}
    base = save_tiny(tmp_path / "base", arch, **wide)
    make(kind, base, tmp_path / "copy", [])
    assert lighten.verify(tmp_path / "copy", str(base)).kind == named
    ids = torch.tensor([[5, 9, 14, 200, 31, 7]])
    with torch.no_grad():
        in_32, in_16 = (
            models.load(str(tmp_path / "copy"), dtype=dtype).model(ids).logits.float()
            for dtype in ("float32", "bfloat16")
        )
    assert 0 < (in_32 - in_16).norm() < 0.2 * in_16.norm()


def test_an_embedding_with_a_buffer_stays_in_16_bits_beside_int8(tmp_path: Path) -> None:
    """Gemma 3 scales its words by one, which was whatever its memory held once it was loaded."""
    base = save_tiny(tmp_path / "base", "gemma3_text", tie_word_embeddings=True)
    make("int8", base, tmp_path / "int8", [])
    receipt = lighten.verify(tmp_path / "int8", str(base))
    assert receipt.passed, receipt.sentence()
    planned = folder_bytes("int8", models.skeleton(str(base)))
    assert weight_bytes(tmp_path / "int8") == pytest.approx(planned, rel=0.01)


def test_torchaos_int8_is_dequantised_to_the_wanted_format(tmp_path: Path) -> None:
    """Training computes with that; torchao's own product goes by its input."""
    make("int8", save_tiny(tmp_path / "base"), tmp_path / "copy", [])
    base = models.load(str(tmp_path / "copy"), dtype="float32")
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(product(layer, x), layer(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match=r"copy is quantised \(torchao\).*train on the model"):
        dense_base(tmp_path / "copy")


def test_an_exported_adapter_is_not_served_over_another_base(run: Run, tmp_path: Path) -> None:
    """One of the same shapes loads without a word, and answers nonsense."""
    adapter = lighten.export(run, "adapter", adapter="a", output_dir=tmp_path / "a", verify=False)
    base = adapters.open_base(run.recipe().model_name_or_path)
    assert adapters.open_adapter("a", adapter.folder, base).adapter is not None
    other = adapters.open_base(str(save_tiny(tmp_path / "other", seed=7)))
    with pytest.raises(UserError, match="was trained on another base"):
        adapters.open_adapter("a", adapter.folder, other)


def test_a_web_page_is_no_server() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(UserError, match="does not list its models"):
        Remote(f"http://127.0.0.1:{server.server_address[1]}").models()
    server.server_close()


def test_a_run_that_was_quantised_and_benchmarked_may_be_trained_anew(run: Run) -> None:
    """Its folder holds what other verbs wrote there, and nothing of anybody else's."""
    for name in (folders.QUANTIZE, folders.BENCH):
        (run.folder / name).write_text("{}")
        folders.require_ours(run.folder)
        (run.folder / name).unlink()


def test_every_model_is_asked_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more models than the requests have room for all questions of each."""
    requested: list[str] = []

    def chat(_: Remote, model: str, *__: Any, **___: Any) -> dict[str, Any]:
        requested.append(model)
        return {"choices": [{"message": {"content": model}, "logprobs": {"content": []}}]}

    monkeypatch.setattr(Remote, "chat", chat)
    models = [f"m{number}" for number in range(20)]
    identity = checks.identity(Remote("http://127.0.0.1:1"), models, requests=20, clients=1)
    assert (identity.same, identity.wrong) == (20, 0)
    assert set(requested[-20:]) == set(models)
    requested.clear()
    checks.identity(Remote("http://127.0.0.1:1"), models, requests=4, clients=1)
    assert len(requested) == 8  # each alone, then among others


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"port": 70000}, "--port 70000"), ({"port": -1}, "--port -1"),
     ({"waiting": 0}, "--max-waiting"), ({"threads": 0}, "--threads")],
)  # fmt: skip
def test_a_server_that_could_not_answer_is_not_started(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        require_valid(Options(**changes))


def test_a_second_copy_of_all_weights_counts_for_nothing(tmp_path: Path) -> None:
    """Mistral's folders hold one for another program, `consolidated.safetensors`."""
    base = save_tiny(tmp_path / "base")
    weights = base / "model.safetensors"
    (base / "consolidated.safetensors").write_bytes(weights.read_bytes())
    assert weight_files(base) == [weights]
    assert weight_bytes(base) == weights.stat().st_size
    export = lighten.export(str(base), "merged", output_dir=tmp_path / "m", verify=False)
    assert [file.name for file in export.files] == ["model.safetensors"]


def test_json_has_no_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"mean_kl": float("nan"), "ratios": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "mean_kl": None, "ratios": [None, 1.5],
    }  # fmt: skip


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--max-new-tokens", "0")])
def test_an_answer_that_cannot_be_is_refused(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["chat", "runs/none", *option])
    assert result.exit_code == 2
    assert option[0] in result.output


def test_a_killed_exports_merged_model_goes_with_the_next_one(run: Run, tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "merged") as scratch:
        (scratch / "model.safetensors").touch()
        remove_unfinished(tmp_path)
        assert (scratch / "model.safetensors").is_file()  # of a process that is at work
        left = tmp_path / f"{scratch.name.removesuffix('.partial')}x.partial"
        shutil.copytree(scratch, left)  # of one that was killed: nobody holds it
    lighten.export(run, "gguf:f16", adapter="a", output_dir=tmp_path / "g", verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"g"}


def test_two_commands_into_one_folder_write_it_one_after_another(tmp_path: Path) -> None:
    """The second one emptied the first one's folder, which then came out torn."""
    final = tmp_path / "merged"

    def second() -> None:
        with whole_folder(final) as partial:
            (partial / "second").touch()

    thread = threading.Thread(target=second)
    with whole_folder(final) as partial:
        (partial / "first").touch()
        thread.start()
        thread.join(0.5)
        assert [path.name for path in partial.iterdir()] == ["first"]
    thread.join(60)
    assert not thread.is_alive()
    assert [path.name for path in final.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_many_commands_into_one_folder_take_turns(tmp_path: Path) -> None:
    """The end of one removed what the next had begun."""
    final, written = tmp_path / "merged", []

    def write(number: int) -> None:
        for _ in range(20):
            with whole_folder(final) as partial:
                (partial / str(number)).touch()
                assert [path.name for path in partial.iterdir()] == [str(number)]
            with scratch_folder(tmp_path, "base") as scratch:
                (scratch / "weights").touch()
        written.append(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert sorted(written) == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert len(list(final.iterdir())) == 1
