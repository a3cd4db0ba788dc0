"""`lighten export` and `lighten verify`: what leaves the notebook answers as it did there."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lighten
from lighten.cli.main import app
from lighten.errors import UserError
from lighten.peft_config import CONFIG
from lighten.quantization.verify import RECEIPT, InTransformers, beside
from lighten.runs import Run
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("forked_jobs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chat_file: Path) -> Run:
    """A run with two adapters."""
    folder = tmp_path_factory.mktemp("export") / "run"
    return lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), output_dir=str(folder),
        max_steps=2, learning_rate=0.05, val_size=8, dtype="float32",
        evaluate={"max_new_tokens": 30, "extra_metrics": ["rougeL"], "batch_size": 1},
        adapters=[{"name": "a", "lora_r": 4}, {"name": "b", "lora_r": 8, "use_rslora": True}],
    )  # fmt: skip


def call_command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=True
    )
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("merged", {"dtype": "float32"}), ("merged", {}), ("adapter", {}), ("gguf:f32", {}),
        ("gguf:q8_0", {}), ("gguf-adapter", {}),
    ],
)  # fmt: skip
def test_an_export_answers_as_its_adapter(
    form: str, options: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    """Held-out prompts are the same tokens, and every next token's probability is as near."""
    export = lighten.export(run, form, adapter="b", output_dir=tmp_path / "out", **options)
    receipt = export.receipt
    assert receipt is not None
    assert receipt.passed, receipt.sentence()
    assert (receipt.prompts, receipt.other_tokens, receipt.answers) == (8, 0, 8)
    saved_receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    assert saved_receipt["mean_kl"] == receipt.mean_kl
    assert export.size_bytes == sum(file.stat().st_size for file in export.files) > 0
    if form in ("gguf:f32", "adapter") or options:
        assert receipt.same_answers + receipt.ties == receipt.answers
    # The receipt is no matter of course: another adapter's answers do not pass.
    other_receipt = lighten.verify(tmp_path / "out", run, adapter="a")
    assert other_receipt.mean_kl > 10 * max(receipt.mean_kl, 1e-7)
    assert form == "gguf:q8_0" or not other_receipt.passed


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_receipt_holds_one_model_at_a_time(
    form: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(model: InTransformers, *parts: Any) -> Any:
        assert [reference() for reference in loaded if reference() is not None] == []
        made = real(model, *parts)
        loaded.append(weakref.ref(made))
        return made

    real = InTransformers._load
    lighten.export(run, form, adapter="a", output_dir=tmp_path / "out", verify=False)
    monkeypatch.setattr(InTransformers, "_load", load)
    receipt = lighten.verify(tmp_path / "out", run, adapter="a")
    assert receipt.passed
    assert len(loaded) == 2


def test_an_answer_read_beside_a_likely_one_is_the_greedy_one(tiny_folder: Path) -> None:
    """Whatever is taken to be likely; of a right one nothing is written token by token."""
    model = InTransformers(tiny_folder)
    ids = model.tokenise("What is the capital of France?")
    answer = model.greedy(ids, 12)
    for wrong in range(12):
        likely = [*answer]
        likely[wrong] += 1
        assert beside(model, ids, 12, likely) == answer
    for likely in ([], answer[:5], answer, [*answer, 7]):
        assert beside(model, ids, 12, likely) == answer
    assert beside(model, ids, 0, answer) == []
    model.greedy = None  # type: ignore[assignment, method-assign]  # not needed
    assert beside(model, ids, 12, answer) == answer


def test_a_receipt_has_the_metrics_of_the_recipe(run: Run, tmp_path: Path) -> None:
    """As `lighten evaluate` measures them on the same questions, whole answers and all."""
    measured = lighten.evaluate(run, max_examples=8)
    receipt = lighten.export(run, "gguf:f32", adapter="b", output_dir=tmp_path / "out").receipt
    assert receipt is not None
    assert list(receipt.metrics) == ["rougeL", "chrf", "exact_match"]
    for name, value in receipt.metrics.items():
        assert value["before"] == pytest.approx(measured.metric("b", name)["value"]), name
    assert receipt.metrics["chrf"]["before"] > 0
    if receipt.same_answers == receipt.answers:
        assert receipt.metrics["chrf"]["after"] == receipt.metrics["chrf"]["before"]
    other_receipt = lighten.verify(tmp_path / "out", run, adapter="a")
    assert other_receipt.metrics["chrf"]["after"] == receipt.metrics["chrf"]["after"]
    assert other_receipt.metrics["chrf"]["before"] == pytest.approx(
        measured.metric("a", "chrf")["value"]
    )
    before = receipt.metrics["rougeL"]["before"]
    assert f"ROUGE-L {receipt.metrics['rougeL']['after']:.1f} ({before:.1f} before)" in (
        receipt.sentence()
    )


def test_a_gguf_file_of_a_type_is_one_for_export_and_quantize(run: Run, tmp_path: Path) -> None:
    """Both write it into one folder, and neither loses what the other has found out of it."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "gguf-q8_0"

    def quantize() -> Any:
        return lighten.quantize(
            run, "gguf:q8_0", adapter="a", output_dir=tmp_path, tokens=60, questions=0
        )

    lighten.export(run, "gguf:q8_0", adapter="a", output_dir=folder)
    exported = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {RECEIPT, "Modelfile", "run-a.q8_0.gguf"} <= exported.keys()
    assert quantize().format("gguf:q8_0")["folder"] == str(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == exported
    shutil.rmtree(folder)
    quantize()
    lighten.export(run, "gguf:q8_0", adapter="a", output_dir=folder, verify=False)
    assert (folder / "run-a.q8_0.gguf").read_bytes() == exported["run-a.q8_0.gguf"]
    with pytest.raises(UserError, match="holds what lighten quantize has measured, and this would"):
        lighten.export(run, "gguf:q8_0", adapter="b", output_dir=folder, verify=False)
    with (folder / "run-a.q8_0.gguf").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(UserError, match="holds what lighten export wrote, and this would be"):
        quantize()
    assert (folder / "run-a.q8_0.gguf").read_bytes().startswith(b"other")


def test_an_export_brings_all_that_speaks_to_it(run: Run) -> None:
    export = lighten.export(run, "gguf:q8_0", adapter="a", verify=False)
    assert export.folder == run.folder / "exports" / "a" / "gguf-q8_0"
    assert {path.name for path in export.folder.iterdir()} == {
        "run-a.q8_0.gguf", "Modelfile", "README.md", "generation_config.json", "export.json"
    }  # fmt: skip
    text = (export.folder / "Modelfile").read_text()
    assert "FROM ./run-a.q8_0.gguf" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    merged = lighten.export(run, "merged", adapter="a", verify=False)
    names = {path.name for path in merged.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
            "generation_config.json", "README.md"} <= names  # fmt: skip
    ends = json.loads((merged.folder / "generation_config.json").read_text())["eos_token_id"]
    assert (
        ends
        == json.loads((run.adapters()["a"] / "generation_config.json").read_text())["eos_token_id"]
    )
    card = (merged.folder / "README.md").read_text()
    assert run.info()["data"]["sha256"] in card
    assert not list(run.folder.glob("exports/**/.*"))


def test_the_command_prints_files_and_the_receipt(run: Run, tmp_path: Path) -> None:
    output = call_command(
        "export", run.folder, "--adapter", "a", "--output_dir", tmp_path / "m"
    ).output
    assert "model.safetensors" in output
    assert "greedy answers the same" in output
    verified = call_command(
        "verify", tmp_path / "m", "--against", run.folder, "--adapter", "a", "--json"
    )
    assert json.loads(verified.output)["passed"] is True
    call_command("verify", tmp_path / "m", "--against", run.folder, "--adapter", "b", code=1)


def test_other_people_s_adapters_and_bases_are_exported(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    trained(tiny_model("llama"), tmp_path / "theirs")
    path = tmp_path / "theirs" / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    merged = lighten.export(tmp_path / "theirs", "merged", output_dir=tmp_path / "m")
    assert merged.receipt is not None
    assert merged.receipt.passed
    file = lighten.export(base, "gguf:f16", output_dir=tmp_path / "g")
    assert file.receipt is not None
    assert file.receipt.passed
    assert file.receipt.prompts == 6


def test_what_only_peft_can_merge_is_merged_by_it(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    base = save_tiny(tmp_path / "base")
    model = get_peft_model(
        tiny_model("llama"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                  base_model_name_or_path=str(base), init_ia3_weights=False),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "ia3")
    path = tmp_path / "ia3" / CONFIG
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)})
    )
    export = lighten.export(tmp_path / "ia3", "merged", output_dir=tmp_path / "m", dtype="float32")
    assert "merged in memory by PEFT" in export.notes[0]
    assert export.receipt is not None
    assert export.receipt.passed


def test_a_learnt_prompt_is_not_merged(tmp_path: Path) -> None:
    """It was refused with what Python says of an attribute that PEFT's model lacks."""
    from peft import PromptTuningConfig, get_peft_model

    base = save_tiny(tmp_path / "base")
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    said = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"PROMPT_TUNING learns a prompt .* changes no weight"):
        lighten.export(tmp_path / "a", "merged", output_dir=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_layers_that_share_their_weights_are_not_merged(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    trained(tiny_model("llama"), tmp_path / "a", layer_replication=[[0, 2], [1, 2]])
    path = tmp_path / "a" / CONFIG
    said = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="layer_replication repeats share their weights"):
        lighten.export(tmp_path / "a", "merged", output_dir=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as", "onnx"), "'onnx' is not one of adapter, merged, gguf, gguf-adapter"),
        (("--as", "gguf:q9"), "q9"),
        (("--as", "merged:q8_0"), "merged has no types"),
        (("--dtype", "int8"), "'int8' is not one of auto"),
        (("--adapter", "c"), "no adapter 'c'; it has a, b"),
        ((), "holds 2 adapters; choose one with --adapter a | b"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    options: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    arguments = options if "--adapter" in options or not options else (*options, "--adapter", "a")
    with pytest.raises(UserError) as error:
        call_command("export", run.folder, "--output_dir", tmp_path / "out", *arguments)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_run_no_adapter_no_model(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match="holds no run"):
        lighten.export(tmp_path, "merged")
    with pytest.raises(UserError, match="is no GGUF file, no program and no folder"):
        lighten.verify(tmp_path, run, adapter="a")
    with pytest.raises(UserError, match=r"none\.gguf does not exist; name an export's folder"):
        lighten.verify(tmp_path / "none.gguf", run, adapter="a")
    shutil.copytree(run.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "adapters")
    with pytest.raises(UserError, match="nothing trained yet"):
        lighten.export(tmp_path / "copy", "merged")
