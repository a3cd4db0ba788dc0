"""`lighten quantize`: every format is loaded by its own software and measured on the same rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lighten
from lighten import api
from lighten.cli.quantize import COLUMNS
from lighten.errors import UserError
from lighten.quantization import table
from lighten.quantization.int4 import suited_layers
from lighten.quantization.model_source import calibration_of, opened
from lighten.quantization.questions import TaskMetrics
from lighten.quantization.scores import EvaluationRow, score, summary
from lighten.quantization.table import Quantized
from lighten.quantization.targets import DYNAMIC, parse, require_tools
from lighten.runs import Run
from tests import once
from tests.processes import call, python
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("forked_jobs")


def save_tied(folder: Path) -> Path:
    """A tied model whose rows suit groups of 64, in bfloat16."""
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128,
                       tie_word_embeddings=True)  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=[4, 2], pad_token_id=0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture(scope="module")
def made(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and all of its formats but for the slow ones."""

    def make(root: Path) -> None:
        folder = save_tied(root / "tied")
        data = shutil.copy(chat_file, root / "chat.jsonl")
        run = lighten.train(
            model_name_or_path=str(folder), dataset=str(data), output_dir=str(root / "chat"),
            max_steps=2, lora_r=2, val_size=0.5, progress=False, planned=False,
            evaluate={"max_new_tokens": 20, "extra_metrics": ["token_f1"]},
        )  # fmt: skip
        quantized = lighten.quantize(run, ["nf4", "int8,gguf:q8_0,8da4w"], tokens=300, questions=2)
        (root / "quantized.json").write_text(json.dumps(quantized.to_dict()))

    return once.folder(tmp_path_factory, "quantized", make)


@pytest.fixture(scope="module")
def run(made: Path) -> Run:
    return Run(made / "chat")


@pytest.fixture(scope="module")
def quantized(made: Path) -> Quantized:
    return Quantized(**json.loads((made / "quantized.json").read_text()))


def test_each_row_is_of_a_whole_artefact(quantized: Quantized, run: Run) -> None:
    names = [row["name"] for row in quantized.formats]
    assert names == ["bfloat16", "nf4", "int8", "gguf:q8_0", DYNAMIC]
    assert any("a byte on a processor" in note for note in quantized.notes)
    for row in quantized.formats[1:]:
        folder = Path(row["folder"])
        assert (folder / "README.md").is_file()
        assert row["file_bytes"] == table.weight_bytes(folder)
        assert row["made_peak_bytes"] > row["file_bytes"]
        assert row["made_seconds"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert row["resident_bytes"] > 0
        assert row["prefill_tokens_per_second"] > 0
        assert list(row["metrics"]) == ["token_f1", "chrf", "exact_match"]
    assert run.quantized() == quantized.to_dict()
    assert quantized.settings["mode"] == table.MODE


def test_the_table_draws_itself_in_a_notebook(quantized: Quantized) -> None:
    html = quantized._repr_html_()
    assert html.startswith('<div class="lighten-card"')
    assert html.count("<tr>") == 1 + len(quantized.formats)
    assert "Perplexity over file size" in html
    assert "bfloat16, nf4, int8, gguf:q8_0" in repr(quantized)
    assert len(repr(quantized)) < 400


def test_quality_is_ordered_and_on_the_same_tokens(quantized: Quantized) -> None:
    base, nf4, int8, q8, _ = quantized.formats
    assert base["kl"] == 0
    assert base["top1_agreement"] == 1
    assert 0 < int8["kl"] < nf4["kl"]
    assert 0 < q8["kl"] < nf4["kl"]
    assert {row["tokens"] for row in quantized.formats} == {base["tokens"]}
    smaller = [row for row in quantized.formats[1:] if row["file_bytes"] <= base["file_bytes"]]
    assert base["frontier"] == all(row["loss"] > base["loss"] for row in smaller)
    assert base["ratio"] == 1
    assert int8["ratio"] < 0.75  # the tied embedding is in it


def test_answers_are_scored_as_transformers_writes_them(
    quantized: Quantized, run: Run, tmp_path: Path
) -> None:
    """The recipe's metric, of a folder's answers by transformers' own generation."""
    from sacrebleu.metrics.chrf import CHRF

    with opened(run, tmp_path) as source:
        held_out = table.evaluation_of(source, 300, 2)
    assert held_out is not None
    folder = quantized.format(DYNAMIC)["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    answers = []
    for ids in held_out.prompts:
        generated = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                                   max_new_tokens=20, do_sample=False)  # fmt: skip
        answer = held_out.task.until_stop(generated[0, len(ids) :].tolist())
        answers.append(held_out.task.text(answer))
    metrics = quantized.format(DYNAMIC)["metrics"]
    expected = CHRF().corpus_score(answers, [held_out.references]).score
    assert metrics["chrf"]["value"] == pytest.approx(expected, abs=0.01)
    assert metrics["chrf"]["se"] >= 0
    assert quantized.settings["answer_tokens"] == 20
    assert quantized.settings["metrics"]["token_f1"] == "token F1, %"


def test_folders_load_in_transformers_and_say_the_same(
    quantized: Quantized, run: Run, tmp_path: Path
) -> None:
    ids = torch.arange(5, 60)[None]
    with opened(run, tmp_path) as source, torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        expected = torch.log_softmax(merged(ids).logits, -1)
        for name, most in (("int8", 0.02), ("nf4", 0.5), (DYNAMIC, 0.5)):
            folder = quantized.format(name)["folder"]
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            log_probs = torch.log_softmax(model(ids).logits.float(), -1)
            assert (expected.exp() * (expected - log_probs)).sum(-1).mean() < most
            theirs = AutoTokenizer.from_pretrained(folder)
            messages = [{"role": "user", "content": "Why?"}]
            assert theirs.apply_chat_template(messages, tokenize=False) == (
                source.tokenizer.apply_chat_template(messages, tokenize=False)
            )
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
            assert ends == GenerationConfig.from_pretrained(source.folder).eos_token_id


def test_perplexity_is_that_of_the_rows(quantized: Quantized, run: Run, tmp_path: Path) -> None:
    """Against a plain loop over the same rows, with transformers' own loss."""
    with opened(run, tmp_path) as source, torch.no_grad():
        held_out = table.evaluation_of(source, 300, 0)
        assert held_out is not None
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        total, count = 0.0, 0
        for row in held_out.rows:
            labels = [t if on else -100 for t, on in zip(row.ids, row.supervised, strict=True)]
            places = sum(label != -100 for label in labels[1:])
            loss = model(torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
            total, count = total + float(loss) * places, count + places
    assert count == quantized.formats[0]["tokens"]
    assert quantized.formats[0]["loss"] == pytest.approx(total / count, rel=0.01)  # bfloat16


def test_a_format_whose_loss_is_no_number_is_not_on_the_frontier() -> None:
    """A file has null for it, which a later command reads back."""
    sizes_and_losses = [(10, 1.0), (5, float("nan")), (4, None), (6, 1.5)]
    rows = [{"name": "", "file_bytes": size, "loss": loss} for size, loss in sizes_and_losses]
    rows.append({"name": "", "file_bytes": 1})  # not measured
    marked = table._with_frontier(rows)
    assert [row["frontier"] for row in marked] == [True, False, False, True, False]
    assert COLUMNS[3][0] == "perplexity"
    assert COLUMNS[3][1]({"perplexity": None, "perplexity_standard_error": None}) == "–"


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    """A model without a run may write on past what its template ends answers with."""
    tokenizer = tiny_tokenizer()
    right, end = tokenizer("the answer")["input_ids"], tokenizer.eos_token_id
    task = TaskMetrics(("exact_match",), 20, frozenset({end}), frozenset(), tokenizer)
    for answer in (right, [*right, end], [*right, end, *right]):
        assert task.values([answer], ["the answer"])["exact_match"]["value"] == 100


def test_int4_is_calibrated_on_rendered_training_data(run: Run, tmp_path: Path) -> None:
    with opened(run, tmp_path) as source:
        rows, recorded = calibration_of(source)
        text = source.tokenizer.decode(rows[0])
    assert "<|im_start|>user" in text  # the template that training rendered with
    assert "What is" in text
    ids = np.asarray(rows, dtype="<i4")
    assert recorded["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()


def test_kl_and_agreement_of_distributions_known_by_hand(tmp_path: Path) -> None:
    rows = [EvaluationRow([0, 1], [False, True])]

    def telling(*p: float) -> Any:
        return lambda ids: np.log(np.asarray([p] * len(ids), dtype=np.float32))

    summary(score(rows, telling(0.5, 0.5), tmp_path, reference=True))
    measured = summary(score(rows, telling(0.25, 0.75), tmp_path, reference=False))
    assert measured["kl"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(1 / 0.75, rel=1e-5)
    assert measured["perplexity_standard_error"] is None  # one row has no spread
    assert measured["top1_agreement"] == 0


@pytest.mark.parametrize("format_name", ["int5", "gguf:q9_9", "", "int8,fp3"])
def test_an_unknown_format_is_named_before_anything_is_loaded(
    format_name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        lighten.quantize("smollm2-135m", format_name, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_tools_are_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        require_tools(parse("int4"))


def test_what_is_quantised_is_not_quantised_again(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        lighten.quantize(quantized.format("nf4")["folder"], "int8", output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_int4_without_data_says_so(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset"):
        lighten.quantize(str(model_folder), "int4", output_dir=tmp_path)


def test_rows_that_no_group_divides_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"has model.layers.0.mlp.down_proj \(14 such layers\); use nf4"
    ):
        suited_layers(tiny_model("llama", hidden_size=24, intermediate_size=40))


def test_stacked_experts_are_refused_in_int4() -> None:
    """auto-round would load them as zeros: each answer of the folder is NaN."""
    with pytest.raises(UserError, match="experts are stacked in one tensor each layer; use nf4"):
        suited_layers(tiny_model("ernie4_5_moe"))


@pytest.mark.parametrize(
    ("format_name", "sizes", "message"),
    [
        ("nf4", (32, 48), "nf4 needs linear layers with rows that blocks of 64 divide.*32, 48"),
        (
            "int4",
            (24, 40),
            "int4 needs linear layers with rows and outputs that 32 divides.*model.layers.0.mlp",
        ),
        ("8da4w", (32, 48), "rows that groups of 32 divide.*32, 48"),
    ],
)
def test_a_model_too_narrow_for_a_format_is_refused_before_anything_is_measured(
    format_name: str, sizes: tuple[int, int], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "narrow"
    tiny_model("llama", hidden_size=sizes[0], intermediate_size=sizes[1]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    lines: list[str] = []
    with pytest.raises(UserError, match=message):
        lighten.quantize(
            str(folder), format_name, output_dir=tmp_path / "out", log=lines.append
        )  # fmt: skip
    assert lines == []
    assert not (tmp_path / "out").exists()


def test_what_lies_in_float32_is_compared_with_its_16_bits(tmp_path: Path) -> None:
    """GPT-2's published files, and the copy that a GGUF file is opened by."""
    pytest.importorskip("gguf")
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        tiny_model("llama", dtype=dtype, hidden_size=64, intermediate_size=128).save_pretrained(
            folder
        )
        tiny_tokenizer().save_pretrained(folder)
    wide, narrow = (
        lighten.quantize(str(tmp_path / str(dtype)), "gguf:q8_0", output_dir=tmp_path / f"out{i}")
        for i, dtype in enumerate((torch.float32, torch.bfloat16))
    )
    size = narrow.format("bfloat16")["file_bytes"]
    assert size == table.weight_bytes(tmp_path / "torch.bfloat16")
    assert wide.format("bfloat16")["file_bytes"] == pytest.approx(size, rel=0.001)
    ratio = wide.format("gguf:q8_0")["ratio"]
    assert ratio == pytest.approx(narrow.format("gguf:q8_0")["ratio"], rel=0.001)
    forecast = api.plan_formats(str(tmp_path / "torch.float32"), "gguf:q8_0")
    assert forecast.formats[0].file_bytes / forecast.weight_bytes == pytest.approx(ratio, rel=0.02)


def test_layers_that_blocks_of_four_bits_do_not_fit_stay_dense(tmp_path: Path) -> None:
    """Rows of 96 numbers are one block and a half: bitsandbytes has no product with them here."""
    folder = tmp_path / "model"
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (planned,) = api.plan_formats(str(folder), "nf4").formats
    table = lighten.quantize(str(folder), "nf4", output_dir=tmp_path / "out")
    assert table.format("nf4")["file_bytes"] == pytest.approx(planned.file_bytes, rel=0.01)
    assert "2 linear layers of 14, 20% of their weights, stay in 16 bits" in planned.note
    assert any(planned.note in note for note in table.notes)
    loaded = AutoModelForCausalLM.from_pretrained(table.format("nf4")["folder"])
    kinds = {path: type(module).__name__ for path, module in loaded.named_modules()
             if isinstance(module, torch.nn.Linear)}  # fmt: skip
    for path, kind in kinds.items():
        dense = path.endswith(("down_proj", "lm_head"))
        assert kind == ("Linear" if dense else "Linear4bit"), path
        if dense:
            assert torch.equal(
                loaded.get_submodule(path).weight, model.get_submodule(path).weight
            )  # fmt: skip


@pytest.mark.parametrize("format_name", ["nf4", "gguf:q8_0"])
def test_a_full_disk_leaves_nothing_half_written(
    format_name: str, model_folder: Path, tmp_path: Path
) -> None:
    """A limit on a file's size ends a write in the middle, as a full disk does."""
    code = (
        "import lighten, resource, signal, sys\n"
        "from lighten.errors import DiskFull\n"
        "from lighten.quantization import table\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "table._Measuring.of = lambda *_: {}  # nothing is left to measure\n"
        "make = table._make\n"
        "def full(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "    return make(*a)\n"
        "table._make = full\n"
        "model, kind, folder = sys.argv[1:]\n"
        "try:\n"
        "    lighten.quantize(model, kind, output_dir=folder)\n"
        "except lighten.errors.UserError as error:\n"
        "    print(error)\n"
        "    sys.exit(7)\n"
    )
    completed = python(code, str(model_folder), format_name, str(tmp_path / "out"))
    assert completed.returncode == 7, completed.stderr
    assert "the disk is full" in completed.stdout
    assert len(completed.stdout.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*"))


def test_a_second_command_keeps_the_formats_that_are_there(
    model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Of the same weights, measured on the same tokens, and still there."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)

    def names(to: str, **options: Any) -> list[str]:
        options = {"dataset": str(chat_file), "tokens": 60, "questions": 0, **options}
        quantized = lighten.quantize(str(folder), to, output_dir=str(tmp_path / "out"), **options)
        saved = json.loads((tmp_path / "out" / "quantize.json").read_text())
        assert saved == json.loads(json.dumps(quantized.to_dict()))
        assert all("frontier" in row for row in saved["formats"])
        return [row["name"] for row in saved["formats"]]

    assert names("gguf:q4_0") == ["bfloat16", "gguf:q4_0"]
    assert names("gguf:q8_0") == ["bfloat16", "gguf:q8_0", "gguf:q4_0"]
    shutil.rmtree(tmp_path / "out" / "gguf-q8_0")
    assert names("gguf:q5_0") == ["bfloat16", "gguf:q5_0", "gguf:q4_0"]
    assert names("gguf:q5_0", tokens=400) == ["bfloat16", "gguf:q5_0"]  # on other tokens
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert names("gguf:q4_0", tokens=400) == ["bfloat16", "gguf:q4_0"]  # of other weights


def test_trap_48_formats_calibrated_on_other_data_do_not_stand_together(tmp_path: Path) -> None:
    path, settings = tmp_path / "quantize.json", {"mode": "m", "calibration": {"sha256": "a"}}
    rows = [{"name": name, "folder": str(tmp_path / "none"), "file_bytes": 0}
            for name in ("bfloat16", "int4", "nf4")]  # fmt: skip
    path.write_text(json.dumps({"settings": settings, "formats": rows}))

    def kept(calibration: dict[str, str] | None) -> tuple[list[str], Any]:
        earlier, used = table._earlier_rows(path, set(), {**settings, "calibration": calibration})
        return [row["name"] for row in earlier], used

    assert kept({"sha256": "a"}) == (["int4", "nf4"], {"sha256": "a"})
    assert kept({"sha256": "b"}) == (["nf4"], {"sha256": "b"})
    assert kept(None) == (["int4", "nf4"], {"sha256": "a"})


def test_a_recipe_quantises_and_its_page_marks_the_frontier(
    model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    finished_run = lighten.run(
        model_name_or_path=str(model_folder), dataset=str(chat_file), max_steps=1, lora_r=2,
        output_dir=str(tmp_path / "run"), val_size=0.5, progress=False, planned=False,
        evaluate={"max_examples": 2, "max_new_tokens": 2},
        quantize={"to": "gguf:q4_0", "tokens": 60, "questions": 0},
    )  # fmt: skip
    saved_table = finished_run.quantized()
    assert saved_table is not None
    assert [row["name"] for row in saved_table["formats"]] == ["bfloat16", "gguf:q4_0"]
    assert saved_table["settings"]["questions"] == 0
    page = (finished_run.folder / "report.html").read_text(encoding="utf-8")
    assert "Size against quality" in page
    assert "gguf:q4_0" in page
    assert "on the frontier" in page
    assert "exact match, %" in page


def test_a_recipe_refuses_a_format_that_is_none() -> None:
    with pytest.raises(UserError, match=r"quantize\.to"):
        lighten.Recipe.from_values(
            {"model_name_or_path": "smollm2-135m", "dataset": "d", "quantize": {"to": "int5"}}, {}
        )


def test_the_command_run_writes_the_copies_that_its_recipe_names(
    model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = call(
        "run", str(model_folder), str(chat_file), "max_steps=1", "val_size=0.5", "lora_r=2",
        f"output_dir={folder}", "evaluate.max_examples=4", "evaluate.max_new_tokens=2",
        "quantize.to=nf4", "quantize.tokens=64", "quantize.questions=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = Run(folder).quantized()
    assert saved is not None
    assert "nf4" in [row["name"] for row in saved["formats"]]
    assert "top-1 agreement" in done.stdout
    assert "nf4" in (folder / "report.html").read_text()
