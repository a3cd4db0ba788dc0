"""Rows against the model: positions, ids and faults of a folder, told before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lighten import data, models
from lighten.errors import UserError
from lighten.evaluation.evaluation import evaluate_run
from lighten.machine.devices import named
from lighten.planning import predict, preflight
from lighten.recipe import Recipe
from lighten.training.run import train
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

POSITIONS = 64
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": POSITIONS},
    "opt": {"max_position_embeddings": POSITIONS},
    "gpt_neo": {"max_position_embeddings": POSITIONS, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global"], 2]]},
    "gptj": {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}  # fmt: skip


def recipe_of(**settings: Any) -> Recipe:
    return Recipe.from_values(settings)


def save_model(folder: Path, arch: str, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    if arch in ("gpt_neo", "gptj"):
        sizes: dict[str, Any] = {} if arch == "gptj" else {"hidden_size": 32}
        config = AutoConfig.for_model(
            arch, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes, **changes
        )
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(arch, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short rows, and four that are cut at 64 tokens, two of which keep no answer."""
    path = tmp_path_factory.mktemp("rows") / "mixed.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"ok {i}"} for i in range(12)]
    rows += [{"prompt": "x" * 30, "completion": "y" * 90} for _ in range(2)]
    rows += [{"prompt": "x" * 90, "completion": "y"} for _ in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("arch", sorted(TABLES))
def test_rows_beyond_a_table_of_positions_are_cut_to_it_and_counted(
    arch: str, mixed: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / arch, arch, **TABLES[arch])
    limits = models.limits(str(folder))
    assert (limits.positions, limits.trained_positions) == (POSITIONS, POSITIONS)
    recipe = recipe_of(
        model_name_or_path=str(folder), dataset=str(mixed), eval_dataset=str(mixed),
        output_dir=str(tmp_path / "run"), max_steps=2, dtype="float32",
        evaluate={"bootstrap_samples": 100, "max_new_tokens": 40},
    )  # fmt: skip
    plan = predict.plan(recipe, named("t4"), calibrate=False, changes=False)
    assert any(f"lost to the model's {POSITIONS} positions" in note for note in plan.notes)
    run = train(recipe, progress=False)
    facts = run.info()["data"]
    assert (facts["train_rows"], facts["truncated"], facts["dropped"]) == (14, 2, 2)
    evaluation = evaluate_run(run)
    assert evaluation.dataset["shortened"] >= 2
    assert len(evaluation.examples) == 14  # what training leaves out is left out here too


def test_a_plan_without_data_stays_inside_the_positions(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt2", "gpt2", n_positions=POSITIONS)
    recipe = recipe_of(model_name_or_path=str(folder), dataset="")
    plan = predict.plan(recipe, named("t4"), calibrate=False, changes=False)
    assert plan.step_tokens == 8 * POSITIONS
    assert any(f"the model's {POSITIONS} positions" in note for note in plan.notes)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "phi3"])
def test_rotary_positions_cut_nothing_and_say_so(arch: str, mixed: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / arch, arch, max_position_embeddings=POSITIONS)
    recipe = recipe_of(model_name_or_path=str(folder), dataset=str(mixed), val_size=0)
    notes: list[str] = []
    rows = predict.read_rows(recipe, notes)
    assert rows is not None
    assert rows.train.counts.truncated == rows.train.counts.dropped == 0
    assert notes == rows.notes
    assert "4 rows are longer than the 64 positions that the model was made for" in notes[0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids": [5, 6, 400]}],
        [{"input_ids": [5, 6, 7]}, {"input_ids": [9, 320, 9], "labels": [9, 320, 9]}],
        [{"input_ids": [2**31 - 1, 6, 7]}],
    ],
)
def test_ids_of_a_larger_vocabulary_are_refused_before_anything_is_loaded(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")  # whoever loads it says so
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_of(
        model_name_or_path=str(folder), dataset=str(path), val_size=0,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    line, highest = len(rows), max(rows[-1]["input_ids"])
    message = rf"ids\.jsonl:{line} has the id {highest}, the model has 320"
    with pytest.raises(UserError, match=message):
        train(recipe, progress=False)
    with pytest.raises(UserError, match=message):
        predict.plan(recipe, named("cpu"), calibrate=False)


def test_a_tokenizer_larger_than_the_embedding_is_refused_unless_tokens_are_added(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"], "pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b<new>"}\n' * 4, encoding="utf-8")
    settings = {
        "model_name_or_path": str(folder), "dataset": str(path), "val_size": 0, "max_steps": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"knows the token '<new>' .* list it in added_tokens"):
        train(recipe_of(**settings, output_dir=str(tmp_path / "a")), progress=False)
    train(
        recipe_of(**settings, added_tokens=["<new>"], output_dir=str(tmp_path / "b")),
        progress=False,
    )
    # A token that no row uses is no reason to stop, and padding takes one that the model has.
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": "a long one"}\n')
    train(recipe_of(**settings, output_dir=str(tmp_path / "c")), progress=False)


def _set(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _shards(folder: Path) -> list[Path]:
    model = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def _remove(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def _lose_a_shard(folder: Path) -> None:
    _shards(folder)[1].unlink()


def _lose_the_index(folder: Path) -> None:
    _shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def _without_the_last_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    remaining = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(remaining, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "rope": (_set(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}),
             r"config\.json: the rope type 'foo' is unknown"),
    "old rope": (_set(rope_scaling={"type": "su", "factor": 2.0}, rope_parameters=None),
                 "the rope type 'su' is unknown"),
    "rope of layers": (_set(rope_parameters={"full_attention": {"rope_type": "ntk"}}),
                       "the rope type 'ntk' is unknown"),
    "rope without factor": (_set(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
                            "Missing required keys"),
    "rope in words": (_set(rope_parameters="linear"), "'rope_parameters' with value 'linear'"),
    "activation": (_set(hidden_act="swoosh"), "hidden_act is 'swoosh'"),
    "kind": (_set(model_type="llama9"), "llama9"),
    "no kind": (_set(model_type=None, architectures=None), r"config\.json"),
    "no language model": (_set(model_type="clip"), "CLIPConfig"),
    "heads": (_set(num_attention_heads=5), "not a multiple"),
    "layers": (_set(num_hidden_layers=0), "num_hidden_layers is 0"),
    "layers in words": (_set(num_hidden_layers="two"), "num_hidden_layers"),
    "dtype": (_set(dtype="float7"), "float7"),
    "padding": (_set(pad_token_id=9999), "[Pp]adding_idx"),
    "torn": (lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()[:90]),
             r"config\.json is not valid JSON"),
    "empty": (lambda f: (f / "config.json").write_bytes(b""), "is not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "is not valid JSON"),
    "wide": (_set(hidden_size=64), r"lm_head\.weight is \(320, 32\) in the file and \(320, 64\)"),
    "words": (_set(vocab_size=400), r"is \(320, 32\) in the file and \(400, 32\)"),
    "deep": (_set(num_hidden_layers=3), r"lacks model\.layers\.2"),
    "shallow": (_set(num_hidden_layers=1), r"holds model\.layers\.1\..* has no layer for"),
    "layer lost": (_without_the_last_layer, r"lacks model\.layers\.1"),
    "no weights": (_remove("model.safetensors"), "holds no weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "shard lost": (_lose_a_shard, "model-00002-of-"),
    "index torn": (lambda f: _shards(f) and (f / "model.safetensors.index.json").write_text("{"),
                   r"index\.json is not valid JSON"),
    "index lost": (_lose_the_index, "cannot be loaded"),
    "tokenizer torn": (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    "no tokenizer": (_remove("tokenizer*"), "holds no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_of_a_model_folder_is_one_sentence(
    fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    break_it, message = FAULTS[fault]
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        models.load(str(folder), dtype="float32")
    assert "\n" not in str(error.value)


def test_a_check_and_a_guarded_run_refuse_ids_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [5, 6, 7]}\n{"input_ids": [5, 999, 7]}\n', encoding="utf-8")
    message = r"ids\.jsonl:2 has the id 999, the model has 320"
    tokenizer = models.load_tokenizer(str(folder))
    with pytest.raises(UserError, match=message):
        data.check(
            data.read(str(path)), tokenizer, max_length=64, template="",
            verify=models.limits(str(folder)).check_ids,
        )  # fmt: skip
    recipe = recipe_of(model_name_or_path=str(folder), dataset=str(path), val_size=0)
    with pytest.raises(UserError, match=message):
        preflight.plan_first(recipe)
