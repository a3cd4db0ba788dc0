"""Adapters of a quantised base, and of one that was given tokens, as merged models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lighten
from lighten import adapters, models
from lighten.artifacts import open_source
from lighten.cli.main import app
from lighten.errors import UserError
from lighten.quantization.dense import dense_base
from lighten.quantization.weights import make
from lighten.runs import Run
from lighten.training.base import load_base
from tests.test_merge import trained
from tests.tiny import save_tiny

IDS = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chat_file: Path) -> Run:
    """A run that trained an adapter on an NF4 base."""
    return lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), dtype="float32",
        output_dir=str(tmp_path_factory.mktemp("runs") / "qlora"), lora_r=4, learning_rate=1e-2,
        per_device_train_batch_size=6, max_steps=3, val_size=8, load_in_4bit=True,
        bnb_4bit_use_double_quant=True, progress=False,
    )  # fmt: skip


def merged_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids).logits.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_trap_30_an_adapter_of_an_nf4_base_is_merged_onto_either_weights(
    qlora: Run, onto: str, tmp_path: Path
) -> None:
    """Never 4 bits again; the choice and both losses written down; equal to the adapter there."""
    export = lighten.export(
        qlora, "merged", output_dir=tmp_path / "out", dtype="float32", onto=onto
    )
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["onto"] == onto
    assert manifest["data_sha256"] == qlora.info()["data"]["sha256"]
    losses = manifest["held_out_loss"]
    (trained,) = qlora.info()["adapters"]
    assert losses["dequantized"]["loss"] == pytest.approx(trained["eval_loss"], abs=1e-5)
    assert losses["original"]["loss"] != losses["dequantized"]["loss"]
    assert "nf4" in export.notes[0]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # The receipt is against the weights that it was merged onto: the manifest says which.
    assert export.receipt is not None
    assert export.receipt.mean_kl < 1e-6
    assert ("dequantized" in export.receipt.against) is (onto == "dequantized")
    receipt_again = lighten.verify(tmp_path / "out", qlora)
    assert receipt_again == export.receipt
    (tmp_path / "out" / "export.json").write_text(
        json.dumps(manifest | {"onto": {"original": "dequantized"}.get(onto, "original")})
    )
    assert lighten.verify(tmp_path / "out", qlora).mean_kl > 100 * export.receipt.mean_kl
    settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    base = models.load(
        qlora.recipe().model_name_or_path, dtype="float32",
        **(settings if onto == "dequantized" else {}),
    )  # fmt: skip
    cohort = adapters.load(base.model, {"own": qlora.adapters()["default"]})
    with cohort.using("own"):
        expected = base.model(IDS).logits.detach()
    torch.testing.assert_close(merged_logits(tmp_path / "out"), expected, atol=1e-4, rtol=0)


def test_what_is_merged_onto_unless_told_is_what_card_help_and_readme_say(
    qlora: Run, tmp_path: Path
) -> None:
    export = lighten.export(qlora, "merged", output_dir=tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["onto"] == "original"
    assert "merged onto the original ones" in export.notes[0]
    card = (qlora.adapters()["default"] / "README.md").read_text()
    assert "onto the original weights, or with `--onto dequantized` onto those that it" in card
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert "original (default)" in shown
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text("utf-8").split())
    assert "merges onto the original weights, or with `--onto dequantized`" in readme


@pytest.mark.parametrize(
    ("kind", "arch"), [("nf4", "llama"), ("nf4", "gpt2"), ("int8:bitsandbytes", "llama")]
)
def test_an_adapter_of_a_folder_in_few_bits_is_merged_onto_what_that_is_dequantised_to(
    kind: str, arch: str, chat_file: Path, tmp_path: Path
) -> None:
    """As of the many 4-bit models on the hub, where nothing else is at hand."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "n_embd": 64}
    save_tiny(tmp_path / "dense", arch, **wide)
    make(kind, tmp_path / "dense", tmp_path / "stored", [])
    run = lighten.train(
        model_name_or_path=str(tmp_path / "stored"), dataset=str(chat_file), dtype="float32",
        output_dir=str(tmp_path / "run"), lora_r=4, learning_rate=1e-2, max_steps=2, val_size=8,
        progress=False,
    )  # fmt: skip
    card = (run.adapters()["default"] / "README.md").read_text()
    assert "it goes onto what that is dequantised to" in card
    export = lighten.export(run, "merged", output_dir=tmp_path / "merged", dtype="float32")
    assert export.receipt is not None
    assert export.receipt.passed, export.receipt.sentence()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    base = models.load(str(tmp_path / "stored"), dtype="float32")
    cohort = adapters.load(base.model, {"own": run.adapters()["default"]})
    with cohort.using("own"):
        expected = base.model(IDS).logits.detach()
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=0, atol=1e-4)
    if kind == "nf4":
        as_gguf = lighten.export(run, "gguf:q8_0", output_dir=tmp_path / "gguf")
        assert as_gguf.receipt is not None
        assert as_gguf.receipt.other_tokens == 0
        assert as_gguf.receipt.passed, as_gguf.receipt.sentence()


def test_added_tokens_make_the_vocabulary_taller(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The embedding is trained and brings its rows; the head's new ones are the mean of others."""
    run = lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), dtype="float32",
        output_dir=str(tmp_path / "run"), lora_r=4, max_steps=1, val_size=8,
        added_tokens=["<call>", "</call>"], modules_to_save=["embed_tokens"], progress=False,
    )  # fmt: skip
    base = load_base(run.recipe(), "cpu")
    vocabulary_size = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    export = lighten.export(run, "merged", output_dir=tmp_path / "m", dtype="float32", verify=False)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == vocabulary_size
    cohort = adapters.load(base.model, {"own": run.adapters()["default"]})
    ids = torch.cat([IDS, torch.tensor([[vocabulary_size - 2], [vocabulary_size - 1]])], dim=1)
    with cohort.using("own"):
        expected = base.model(ids).logits.detach()
    torch.testing.assert_close(merged_logits(tmp_path / "m", ids), expected, atol=1e-4, rtol=0)
    assert export.files


def test_another_base_or_a_changed_one_is_refused(qlora: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(qlora.folder, run)
    other_base = save_tiny(tmp_path / "other", seed=5)
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace(qlora.recipe().model_name_or_path, str(other_base))
    )
    with pytest.raises(UserError, match="belongs to the base"):
        lighten.export(run, "merged")
    config = run / "adapters" / "default" / "adapter_config.json"
    adapter_config = json.loads(config.read_text())
    config.write_text(json.dumps({**adapter_config, "base_model_name_or_path": str(other_base)}))
    for source in (run, run / "adapters" / "default"):
        with pytest.raises(UserError, match="checksums differ"):
            lighten.export(source, "merged")
    with pytest.raises(UserError, match="did not learn on a quantised base"):
        lighten.export(other_base, "merged", onto="dequantized")
    with pytest.raises(UserError, match="not one of original, dequantized"):
        lighten.export(qlora, "merged", onto="4bit")
    assert not (run / "exports").exists()


def test_an_adapter_s_folder_is_opened_as_its_run_s(qlora: Run, tmp_path: Path) -> None:
    """So that how its base was quantised and which base it was are known."""
    folder = qlora.adapters()["default"]
    opened = open_source(folder)
    assert opened.run is not None
    assert opened.run.folder == qlora.folder
    assert replace(opened, run=None) == replace(open_source(qlora), run=None)
    elsewhere = tmp_path / "adapters" / "default"
    shutil.copytree(folder, elsewhere)
    assert open_source(elsewhere).run is None


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]},
     {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {}],
)  # fmt: skip
def test_trap_29_a_shared_head_of_a_folder_in_few_bits_is_merged_as_it_learnt(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT adds what one of embedding and head learnt to the weight that both are."""
    save_tiny(tmp_path / "dense", hidden_size=64, intermediate_size=64, tie_word_embeddings=True)
    make("nf4", tmp_path / "dense", tmp_path / "stored", [])
    base = dense_base(tmp_path / "stored")
    trained(base, tmp_path / "adapter", **settings)
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "stored")}
    path.write_text(json.dumps(said))
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits.detach()
    export = lighten.export(
        tmp_path / "adapter", "merged", output_dir=tmp_path / "merged", dtype="float32"
    )
    assert "merged in memory" in export.notes[0]
    assert export.receipt is not None
    assert export.receipt.passed
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=0, atol=1e-4)
