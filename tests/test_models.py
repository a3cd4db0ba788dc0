"""Every source of a base, what it says of itself, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lighten import models
from lighten.errors import UserError
from lighten.models.describe import parameters_by_part
from lighten.models.names import PACKAGED, resolve
from lighten.models.packaged import folder_of
from tests.conftest import HUB_COMMIT
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_frozen_and_describes_itself(arch: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / arch, arch)
    base = models.load(str(folder), dtype="float32")
    assert base.source == "folder"
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(base.model(ids).logits, tiny_model(arch)(ids).logits, atol=1e-5)
    description = models.describe(str(folder))
    real = sum(p.numel() for p in base.model.parameters())
    assert description.total_parameters == real
    assert description.parameters["other"] == 0
    assert description.layers == 2


def test_loading_warns_of_nothing_from_python_where_libraries_are_not_silenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "llama", "llama")
    library, told = logging.getLogger("transformers"), list[str]()
    heard = logging.Handler(logging.WARNING)
    monkeypatch.setattr(heard, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(library, "level", logging.WARNING)  # its own without our command line
    library.addHandler(heard)
    try:
        models.load(str(folder), dtype="float32")
    finally:
        library.removeHandler(heard)
    assert told == []


def test_gemma2_caps_its_scores_and_falls_back_from_sdpa_with_the_reason(tmp_path: Path) -> None:
    base = models.load(str(save_tiny(tmp_path / "g", "gemma2")))
    assert base.attention.value == "eager"
    assert "caps its scores, which sdpa leaves out" in base.attention.reason


def test_a_hub_model_comes_from_the_cache_with_its_revision(hub_model: str) -> None:
    for revision in (None, HUB_COMMIT):
        base = models.load(hub_model, revision=revision)
        assert (base.source, base.revision) == ("hub", HUB_COMMIT)
    assert models.describe(hub_model).layers == 2


def test_the_packaged_model_is_the_published_one(smollm2: models.Base) -> None:
    assert smollm2.source == "packaged"
    assert smollm2.file_bytes == 98_362_432
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    tokenizer = smollm2.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    # In bfloat16 the first token is a tie that each kind of processor breaks in its own way.
    model = models.load("smollm2-135m", dtype="float32").model
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, ids.shape[1] :])
    assert tokenizer("a  12").input_ids == [*tokenizer("a  ").input_ids, 33, 34]


def test_a_gguf_file_loads_by_its_path_with_its_template(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    (path,) = (smollm2_folder / "original").glob("*.gguf")
    assert resolve(str(path)) == ("gguf", path)
    base = models.load(str(path), dtype="bfloat16")
    assert "<|im_start|>" in base.tokenizer.chat_template
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert not hasattr(base.model.config, "quantization_config")
    assert base.file_bytes == 98_362_432
    packaged = load_file(smollm2_folder / "model.safetensors")
    loaded = base.model.state_dict()
    assert set(loaded) - {"lm_head.weight"} == set(packaged)
    assert all(torch.equal(loaded[name], packaged[name].bfloat16()) for name in packaged)
    text = "It's 2026, in  Zürich\n<|im_start|>user"
    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    assert base.tokenizer(text).input_ids == theirs(text).input_ids


def test_a_changed_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dataclasses import replace

    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path))
    monkeypatch.setitem(
        PACKAGED, "smollm2-135m", replace(PACKAGED["smollm2-135m"], sha256="0" * 64)
    )
    with pytest.raises(UserError, match="it was changed on the way"):
        models.load("smollm2-135m")
    assert not folder_of("smollm2-135m").exists()


def test_a_folder_that_holds_something_of_a_model_says_what_to_name(tmp_path: Path) -> None:
    export = tmp_path / "내 실험"
    export.mkdir()
    with pytest.raises(UserError, match=r"no config\.json$"):
        resolve(str(export))
    (export / "Modelfile").write_text("FROM ./m.q4_k_m.gguf")
    (export / "m.q4_k_m.gguf").touch()
    with pytest.raises(UserError, match=f"name the GGUF file in it: '{export}/m.q4_k_m.gguf'"):
        resolve(str(export))
    (export / "recipe.yaml").touch()
    with pytest.raises(UserError, match="it is a run, name the base"):
        resolve(str(export))
    (export / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it is an adapter, name the base"):
        resolve(str(export))


def test_pickle_is_never_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle only"):
        models.load(str(folder))


def test_code_that_comes_with_a_model_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(tiny_folder, folder)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of",
               "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        models.load(str(folder))
    assert not marker.exists()


def test_a_missing_or_torn_weight_is_an_error_not_a_random_number(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.weight"):
        models.load(str(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm-135m", "did you mean smollm2-135m"),
        ("./nowhere", "does not exist"),
        ("nobody/nothing", "hub cannot be reached"),
        ("foo..bar/--x", "neither a file, a folder nor a hub id"),
        ("missing.gguf", "does not exist"),
    ],
)
def test_an_unknown_name_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.load(name)


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        models.load(str(tmp_path))


def test_flash_attention_that_is_not_installed_is_named(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="flash_attn, which is not"):
        models.load(str(tiny_folder), attn_implementation="flash_attention_2")


def test_the_catalogue_knows_packaged_models(smollm2_folder: Path) -> None:
    entries = {entry.name: entry for entry in models.available()}
    assert entries["smollm2-135m"].cached
    assert entries["smollm2-135m"].path == smollm2_folder


def test_parts_are_told_apart_by_name() -> None:
    counts = parameters_by_part(tiny_model("mixtral"))
    assert counts["mlp"] > counts["attention"] > counts["norm"] > 0
