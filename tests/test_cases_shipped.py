"""What lies beside shipped weights, and where: tokens, settings, cards, folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lighten
from lighten import api
from lighten.errors import UserError
from lighten.models.gguf_header import read_header
from lighten.quantization.forecast import forecast
from lighten.quantization.receipts import _dtype_of
from lighten.runs import Run
from tests.test_cases_exported import adapter_on
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("forked_jobs")


def test_a_bases_older_files_say_nothing_of_an_adapters_tokens(tmp_path: Path) -> None:
    """transformers takes `special_tokens_map.json` before what it writes itself."""
    base = save_tiny(tmp_path / "base")
    old = {"eos_token": "</s>", "pad_token": "</s>"}
    (base / "special_tokens_map.json").write_text(json.dumps(old))
    adapter_on(base, tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = api.export(tmp_path / "adapter", output_dir=tmp_path / "m", verify=False).folder
    shipped = AutoTokenizer.from_pretrained(merged)
    assert (shipped.eos_token, shipped.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    # Without a tokenizer of its own the adapter has the base's.
    (tmp_path / "adapter" / "tokenizer_config.json").unlink()
    merged = api.export(tmp_path / "adapter", output_dir=tmp_path / "m", verify=False).folder
    assert AutoTokenizer.from_pretrained(merged).eos_token == "</s>"


def test_a_quantised_copy_has_every_file_of_its_tokenizer(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    names = ("added_tokens.json", "special_tokens_map.json", "tekken.json", "processor_config.json")
    for name in names:
        (base / name).write_text("{}")
    for _ in range(2):  # it replaces itself
        api.quantize(str(base), "int8", output_dir=tmp_path / "out")
    assert all((tmp_path / "out" / "int8" / name).is_file() for name in names)
    for _ in range(2):
        merged = api.export(base, output_dir=tmp_path / "m", verify=False).folder
    assert all((merged / name).is_file() for name in names)


def test_copies_of_two_models_lie_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one's took the place of the first one's."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_tiny(tmp_path / name, seed=seed)
    first, second = (api.quantize(str(tmp_path / name), "gguf:q8_0") for name in "ab")
    files = [Path(made.format("gguf:q8_0")["folder"]) / f"{name}.q8_0.gguf"
             for name, made in (("a", first), ("b", second))]  # fmt: skip
    assert files[0].read_bytes() != files[1].read_bytes()
    assert forecast("a", "gguf:q8_0", timed=False).folder == first.folder
    assert api.export("a", verify=False).folder == tmp_path / "exports" / "a" / "merged"


def test_an_adapter_without_weights_in_safetensors_is_not_exported(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    for form in ("adapter", "merged"):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors does not exist"):
            api.export(tmp_path / "adapter", form, output_dir=tmp_path / "e", verify=False)
        assert not (tmp_path / "e").exists()


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is a folder in use; name one in it"):
        api.export(base, output_dir=".", verify=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Run:
    """A run of the base's own weights, whose published settings contradict each other."""
    root = tmp_path_factory.mktemp("shipped")
    base = save_tiny(root / "published")
    settings = base / "generation_config.json"
    said = json.loads(settings.read_text()) | {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    settings.write_text(json.dumps(said))
    return lighten.train(
        model_name_or_path=str(base), dataset=str(chat_file), output_dir=str(root / "runs" / "own"),
        method="full", max_steps=1, val_size=8, dtype="float32", progress=False,
    )  # fmt: skip


def test_settings_that_have_no_effect_are_shipped_as_they_were_published(whole: Run) -> None:
    """Temperature without sampling, as of Vicuna: what was trained was not written."""
    settings = json.loads((whole.folder / "model" / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"]) == (0.9, 0.6)
    assert 4 in settings["eos_token_id"]


def test_a_model_that_was_trained_whole_names_what_it_was_trained_from(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.folder.parent.parent)
    export = api.export("own", output_dir=tmp_path / "m", verify=False)  # by its name under runs/
    assert "from `published`" in (export.folder / "README.md").read_text()
    manifest = json.loads((export.folder / "export.json").read_text())
    assert (manifest["base"], manifest["run"]) == ("published", "own")
    made = api.quantize(whole, "gguf:q8_0", output_dir=tmp_path / "q")
    card = Path(made.format("gguf:q8_0")["folder"]) / "README.md"
    assert "`published` as trained in `own`" in card.read_text()
    assert api.verify(export.folder, "own").passed


def test_a_runs_copies_are_measured_on_the_data_that_are_named(
    whole: Run, chat_file: Path, tmp_path: Path
) -> None:
    """Another file was taken for the run's own, changed."""
    shutil.copytree(whole.folder, tmp_path / "run")
    lines = chat_file.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines[:30]))
    made = api.quantize(tmp_path / "run", "gguf:q8_0", dataset=str(other), tokens=100, questions=0)
    assert "other.jsonl" in made.settings["dataset"]
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("eval_dataset: null", f"eval_dataset: {chat_file}")
    )
    assert "eval_dataset: /" in recipe.read_text()
    again = api.quantize(tmp_path / "run", "gguf:q8_0", dataset=str(other), tokens=100, questions=0)
    assert again.settings["tokens_sha256"] == made.settings["tokens_sha256"]


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}, "int4"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "int8"),
    ],
)  # fmt: skip
def test_other_tools_bits_are_told(stored: dict[str, object], kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
    assert _dtype_of(tmp_path) == kind


def test_a_gguf_file_in_float32_is_not_rounded_to_16_bits_before(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    merged = api.export(tmp_path / "adapter", output_dir=tmp_path / "m", dtype="float32",
                        verify=False).folder  # fmt: skip
    made = api.export(tmp_path / "adapter", "gguf:f32", output_dir=tmp_path / "g", verify=False)
    weight = load_file(merged / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    stored = read_header(made.files[0]).dense("blk.0.ffn_up.weight")
    assert np.array_equal(stored, weight.numpy())


def test_what_an_adapters_model_cannot_become_names_the_adapter(tmp_path: Path) -> None:
    """It named a folder of temporary files."""
    base = save_tiny(tmp_path / "base", "opt")
    trained(tiny_model("opt"), tmp_path / "mine")
    config = tmp_path / "mine" / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(said))
    for act in (api.export, api.plan_formats):
        with pytest.raises(UserError, match=r"^mine is of the kind 'opt'"):
            act(tmp_path / "mine", "gguf:q8_0")
