"""LoRA adapters as GGUF: llama.cpp answers with them as PEFT does, or the adapter is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lighten import api
from lighten.errors import UserError
from lighten.quantization.gguf_adapter import write_gguf_adapter
from lighten.quantization.gguf_model import write_gguf as write_whole_gguf
from lighten.quantization.llamacpp import Runtime
from tests.gguf_files import write_gguf
from tests.test_merge import beside_pictures, trained
from tests.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

IDS = [5, 77, 130, 9, 201, 64, 12, 300, 41, 180, 7, 99]
LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
COMMON = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What the tiny files of this test cannot say: a window, and Gemma's scale of scores.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 256, "query_pre_attn_scalar": 8},
}


def adapter(folder: Path, arch: str, **settings: Any) -> Any:
    """A saved PEFT adapter that changes a lot, and the model under it."""
    model = tiny_model(arch, **CHANGES.get(arch, {}))
    values = {"r": 4, "lora_alpha": 16, "target_modules": LINEAR.get(arch, COMMON), **settings}
    peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **values))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    peft.save_pretrained(folder)
    return peft.eval()


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}}),
        (
            "llama",
            {
                "use_rslora": True,
                "rank_pattern": {"k_proj": 6},
                "alpha_pattern": {"v_proj": 40, "layers.0.mlp.up_proj": 3},
            },
        ),
        ("llama", {"target_modules": [*COMMON, "lm_head"]}),
        ("llama", {"lora_alpha": 0}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"use_rslora": True}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {"alpha_pattern": {"qkv_proj": 5}}),
        ("gpt2", {}),
    ],
)
def test_llama_cpp_answers_as_peft(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapter(tmp_path / "adapter", arch, **settings)
    base = write_gguf(tmp_path / "base.gguf", tiny_model(arch, **CHANGES.get(arch, {})))
    file = tmp_path / "adapter.gguf"
    write_gguf_adapter(tmp_path / "adapter", model.config, file)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
        with model.disable_adapter():
            plain = model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
    with Runtime(base, {file: 1.0}, context_tokens=64, threads=1) as runtime:
        adapted = runtime.log_probabilities(IDS)
        runtime.set_adapters({})
        alone = runtime.log_probabilities(IDS)
    # float32 on both sides; GELU is a table of float16 in llama.cpp.
    tolerance = 1e-2 if arch.startswith("g") else 2e-4
    assert np.abs(adapted - expected).max() < tolerance
    assert np.abs(alone - plain).max() < tolerance
    if settings.get("lora_alpha") != 0:
        assert np.abs(expected - plain).max() > 0.5


def test_an_adapter_has_the_scale_that_its_bases_file_has_folded_into_the_queries(
    tmp_path: Path,
) -> None:
    """Gemma 2 of no released size: llama.cpp divides scores by another number."""
    changes = {"sliding_window": 256, "query_pre_attn_scalar": 20}
    folder = save_tiny(tmp_path / "base", "gemma2", **changes)
    peft = trained(tiny_model("gemma2", **changes), tmp_path / "adapter", target_modules=COMMON)
    write_whole_gguf(folder, tmp_path / "base.gguf", "f32")
    write_gguf_adapter(tmp_path / "adapter", peft.config, tmp_path / "adapter.gguf")
    with torch.no_grad():
        expected = peft(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
    files = {tmp_path / "adapter.gguf": 1.0}
    with Runtime(tmp_path / "base.gguf", files, context_tokens=64, threads=1) as runtime:
        assert np.abs(runtime.log_probabilities(IDS) - expected).max() < 1e-2


def test_two_adapters_are_summed_by_their_scales(tmp_path: Path) -> None:
    model = adapter(tmp_path / "one", "llama")
    adapter(tmp_path / "two", "llama", r=2, use_rslora=True, target_modules=["v_proj"])
    base = write_gguf(tmp_path / "base.gguf", tiny_model("llama"))
    files = [tmp_path / f"{name}.gguf" for name in ("one", "two")]
    for file in files:
        write_gguf_adapter(tmp_path / file.stem, model.config, file)
    model.load_adapter(str(tmp_path / "two"), "two")
    model.base_model.add_weighted_adapter(
        ["default", "two"], [0.5, 0.5], "both", combination_type="cat"
    )
    model.set_adapter("both")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
    with Runtime(base, dict.fromkeys(files, 0.5), context_tokens=64, threads=1) as runtime:
        assert np.abs(runtime.log_probabilities(IDS) - expected).max() < 2e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"modules_to_save": ["norm"]}, "norm"),
        ({"bias": "all"}, "biases"),
        ({"trainable_token_indices": [3, 4]}, "token"),
        ({"target_modules": [*COMMON, "embed_tokens"]}, "word embeddings"),
    ],
)
def test_what_llama_cpp_would_drop_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changes = {"attention_bias": True} if "bias" in settings else {}
    model = tiny_model("llama", **changes)
    values = {"r": 4, "target_modules": COMMON, **settings}
    get_peft_model(model, LoraConfig(**values)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as error:
        write_gguf_adapter(tmp_path / "adapter", tiny_config("llama"), tmp_path / "a.gguf")
    assert "--as merged" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_a_shared_head_is_refused(tmp_path: Path) -> None:
    model = adapter(tmp_path / "adapter", "llama", target_modules=["q_proj", "lm_head"])
    model.config.tie_word_embeddings = True
    with pytest.raises(UserError, match=r"lm_head.*shares.*--as merged"):
        write_gguf_adapter(tmp_path / "adapter", model.config, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"hidden_size": 64}, "another model"),
        ("llama", {"num_hidden_layers": 1}, "another model"),
        ("gpt2", {}, "another model"),
        ("opt", {}, "opt"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    arch: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter(tmp_path / "adapter", "llama")
    with pytest.raises(UserError, match=message):
        write_gguf_adapter(tmp_path / "adapter", tiny_config(arch, **changes), tmp_path / "a.gguf")


def test_a_broken_adapter_is_one_sentence(tmp_path: Path) -> None:
    model = adapter(tmp_path / "whole", "llama")
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    name = next(key for key in weights if "lora_B" in key)

    def broken(**changed: Any) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        changed_weights = {key: value for key, value in weights.items() if key != name} | changed
        save_file(changed_weights, folder / "adapter_model.safetensors")
        return folder

    target = tmp_path / "a.gguf"
    with pytest.raises(UserError, match="one half"):
        write_gguf_adapter(broken(), model.config, target)
    with pytest.raises(UserError, match="not finite"):
        write_gguf_adapter(broken(**{name: weights[name] * float("nan")}), model.config, target)
    torn = broken(**{name: weights[name]})
    (torn / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="safetensors"):
        write_gguf_adapter(torn, model.config, target)
    (torn / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError):
        write_gguf_adapter(torn, model.config, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = adapter(tmp_path / "adapter", "llama")
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="disk is full"):
        write_gguf_adapter(tmp_path / "adapter", model.config, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_architecture_is_refused_by_the_runtime(tmp_path: Path) -> None:
    model = adapter(tmp_path / "adapter", "llama")
    write_gguf_adapter(tmp_path / "adapter", model.config, tmp_path / "a.gguf")
    base = write_gguf(tmp_path / "base.gguf", tiny_model("qwen2"))
    with pytest.raises(UserError, match="arch mismatch"):
        Runtime(base, {tmp_path / "a.gguf": 1.0}, context_tokens=64)


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[1] / "docs" / "gguf.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    adapter(tmp_path / "adapter", "llama")
    exec(compile(code.replace("512)", "64, threads=1)"), str(page), "exec"), {})
    assert "tensors are" in capsys.readouterr().out
    assert (tmp_path / "adapter.gguf").is_file()


def test_layers_of_a_picture_tower_are_no_part_of_the_text_models_adapter(tmp_path: Path) -> None:
    """Every linear layer of Gemma 3 is a target unless others are named: it was refused."""
    base = beside_pictures("gemma3")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(said))
    export = api.export(tmp_path / "adapter", "gguf-adapter", output_dir=tmp_path / "out")
    assert export.notes[0].endswith(f": lighten export {tmp_path / 'base'} --as gguf")
    assert export.receipt is not None
    assert export.receipt.passed, export.receipt.sentence()
