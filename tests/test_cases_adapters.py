"""Adapters as other people's tools write them: read right, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lighten
from lighten import api, models
from lighten.adapters import files, spectrum
from lighten.adapters import load as load_adapters
from lighten.errors import UserError
from lighten.evaluation.run_models import Models
from lighten.models.names import card_line, card_name, packaged_as, public_name
from tests.processes import call
from tests.test_merge import trained
from tests.tiny import VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, dict[str, Any]] = {
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layer 0": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
    "layers_pattern": {
        "target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers",
    },
    "exclude names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "exclude a pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3},
    },
}  # fmt: skip


def peft_adapter(folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT wrote, its update not zero."""
    torch.manual_seed(0)
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    get_peft_model(tiny_model("llama"), config).save_pretrained(folder)
    return folder


def change(folder: Path, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    config = {**json.loads((folder / files.CONFIG).read_text()), **settings}
    remaining = {key: value for key, value in config.items() if key not in drop}
    (folder / files.CONFIG).write_text(json.dumps(remaining))
    return folder


def logits_in_peft(folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def logits_in_lighten(folder: Path) -> torch.Tensor:
    cohort = load_adapters(tiny_model("llama").eval(), {"default": folder})
    with torch.no_grad(), cohort.using("default") as model:
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("case", PLAIN)
def test_plain_lora_is_read_loaded_and_resized_as_peft_does(case: str, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a", **PLAIN[case])
    peft_scales = {
        path.removeprefix("base_model.model."): module.scaling["default"]
        for path, module in PeftModel.from_pretrained(
            tiny_model("llama"), str(folder)
        ).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    scales = {layer.path: layer.scale for layer in spectrum.read(folder).layers}
    assert scales == pytest.approx(peft_scales)
    torch.testing.assert_close(
        logits_in_lighten(folder), logits_in_peft(folder), rtol=1e-4, atol=1e-5
    )
    cut, _ = api.resize_adapter(folder, 1)
    # PEFT opens the smaller one, and it does about what it did.
    torch.testing.assert_close(logits_in_lighten(cut), logits_in_peft(cut), rtol=1e-4, atol=1e-5)


def test_settings_left_out_are_peft_s_defaults(tmp_path: Path) -> None:
    """Configurations of early 2023 have a dozen keys, hand-written ones fewer."""
    folder = peft_adapter(tmp_path / "a", r=8, lora_alpha=8)
    before = spectrum.read(folder)
    keep = {"peft_type", "target_modules", "base_model_name_or_path"}
    config = json.loads((folder / files.CONFIG).read_text())
    change(folder, drop=tuple(set(config) - keep))
    after = spectrum.read(folder)
    assert [layer.scale for layer in after.layers] == [layer.scale for layer in before.layers]
    assert (after.spec.r, after.spec.alpha, after.spec.use_rslora) == (8, 8, False)
    torch.testing.assert_close(
        logits_in_lighten(folder), logits_in_peft(folder), rtol=1e-4, atol=1e-5
    )
    change(folder, lora_alpha=None, rank_pattern=None, modules_to_save=None)
    assert spectrum.read(folder).spec == after.spec
    change(folder, target_modules=None)  # the file's own keys tell
    assert len(api.adapter_info(folder)["layers"]) == len(before.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats_are_read_and_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    weights = {key: v.to(dtype) for key, v in load_file(folder / files.WEIGHTS).items()}
    save_file(weights, folder / files.WEIGHTS)
    cut, resized = api.resize_adapter(folder, 2)
    assert {value.dtype for value in files.read_weights(cut).values()} == {dtype}
    assert 0.3 < resized.energy_kept < 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(encoding: str, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    text = (folder / files.CONFIG).read_text()
    (folder / files.CONFIG).write_bytes(text.encode(encoding))
    assert api.adapter_info(folder)["r"] == 4


@pytest.mark.parametrize("portion", [0, 7, 40, 0.5, 0.99])
def test_a_torn_file_is_said_in_one_sentence(portion: float, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    data = (folder / files.WEIGHTS).read_bytes()
    size = portion if isinstance(portion, int) else int(portion * len(data))
    (folder / files.WEIGHTS).write_bytes(data[:size])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        api.adapter_info(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"peft_type": "LORA"', "is not valid JSON"),
        (b"\xff\xfe{\x00", "is not valid JSON"),
        (b"[1, 2]", "names no peft_type"),
        (b'{"peft_type": ["LORA"]}', "names no peft_type"),
    ],
)
def test_a_torn_configuration_is_said(text: bytes, message: str, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    (folder / files.CONFIG).write_bytes(text)
    with pytest.raises(UserError, match=message):
        api.adapter_info(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "4"}, "r in adapter_config.json is '4'"),
        ({"r": 0}, "is no rank"),
        ({"lora_alpha": [8]}, "is not a number"),
        ({"target_modules": 3}, "neither a text nor a list"),
        ({"modules_to_save": "lm_head"}, "not a list of names"),
        ({"rank_pattern": [1]}, "does not give a number for each name"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
        ({"peft_type": "IA3"}, "IA3 adapter is more than"),
        ({"use_dora": True}, "with use_dora is more than"),
        ({"target_parameters": ["experts.up"]}, "with target_parameters is more than"),
        ({"lora_bias": True}, "with lora_bias is more than"),
        ({"layer_replication": [[0, 1]]}, "with layer_replication is more than"),
        ({"init_lora_weights": "pissa"}, "a base that it changed"),
    ],
)
def test_what_is_not_plain_lora_is_refused_with_its_reason(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = change(peft_adapter(tmp_path / "a"), **settings)
    with pytest.raises(UserError, match=message):
        api.adapter_info(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_said(value: float, tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    weights = load_file(folder / files.WEIGHTS)
    next(iter(weights.values()))[0, 0] = value
    save_file(weights, folder / files.WEIGHTS)
    with pytest.raises(UserError, match="not finite"):
        api.adapter_info(folder)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "a")
    (folder / files.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"never pickle.*save_pretrained"):
        api.adapter_info(folder)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_beside_the_adapter_are_kept(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, bias=bias, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_model("gpt2"), config).save_pretrained(tmp_path / "a")
    adapter = spectrum.read(tmp_path / "a")
    assert any(key.endswith("bias") for key in adapter.other_tensors)
    cut, _ = api.resize_adapter(tmp_path / "a", 2)
    assert spectrum.read(cut).other_tensors.keys() == adapter.other_tensors.keys()
    PeftModel.from_pretrained(tiny_model("gpt2"), str(cut))


def test_a_trainer_s_checkpoint_gives_its_adapter_alone(tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "checkpoint-40")
    state = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
             "training_args.bin")  # fmt: skip
    for name in (*state, "tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_bytes(b"mine")
    cut, resized = api.resize_adapter(folder, 2)
    assert {path.name for path in cut.iterdir()} == {
        files.CONFIG, files.WEIGHTS, "README.md", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert set(resized.left_behind) == set(state)


def test_the_name_says_the_rank_there_is_and_rows_come_when_wanted(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "a", target_modules="all-linear")
    result = call("adapter", "resize", "a", "--rank", "16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nothing cut: no layer is over rank 16" in result.stdout
    assert (tmp_path / "a-r4").is_dir()
    assert not (tmp_path / "a-r16").exists()
    short = call("adapter", "info", "a", cwd=tmp_path).stdout
    assert "14 layers; a row for each: --layers" in short
    assert "down_proj" not in short.split("targets")[1].split("parameters")[1]
    long = call("adapter", "info", "a", "--layers", cwd=tmp_path).stdout
    assert long.count("down_proj") >= 2
    assert "rank used" in long.strip().splitlines()[-1] or "rank used" in long[-400:]


@pytest.fixture
def merged_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """Merged weights, with the files of the adapter that was merged beside them."""
    base = models.load(str(tiny_folder), dtype="float32").model
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, config)
    folder = tmp_path / "merged"
    shutil.copytree(tiny_folder, folder)
    tuned.save_pretrained(tmp_path / "a")
    tuned.merge_and_unload().save_pretrained(folder)
    for name in (files.CONFIG, files.WEIGHTS):
        shutil.copy(tmp_path / "a" / name, folder / name)
    return folder


def test_weights_beside_an_adapter_are_the_merged_model(merged_folder: Path) -> None:
    alone = merged_folder.with_name("alone")
    shutil.copytree(merged_folder, alone, ignore=shutil.ignore_patterns("adapter_*"))
    with_adapter, without_adapter = (
        models.load(str(f), dtype="float32") for f in (merged_folder, alone)
    )
    assert with_adapter.checksum == without_adapter.checksum
    assert not any("lora" in key for key in with_adapter.model.state_dict())
    with torch.no_grad():
        assert torch.equal(
            with_adapter.model(input_ids=IDS).logits, without_adapter.model(input_ids=IDS).logits
        )


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"], ["lm_head"]])
def test_the_card_s_code_opens_an_adapter_with_new_tokens(
    saved: list[str] | None, tmp_path: Path, tiny_folder: Path, chat_file: Path
) -> None:
    run = lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), max_steps=1, val_size=2,
        output_dir=str(tmp_path / "run"), added_tokens=["<good>", "<bad>"], modules_to_save=saved,
        dtype="float32",
        lora_target_modules=["q_proj"],
    )  # fmt: skip
    folder = run.adapters()["default"]
    card = (folder / "README.md").read_text()
    assert "`<good>`, `<bad>`" in card
    assert ("They were not trained" in card) == (saved is None)
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), scope)
    opened = Models(run, "cpu", keep=False).open("default")
    with torch.no_grad(), opened.trained.using("default") as ours:
        expected = ours(input_ids=IDS).logits
        logits = scope["model"].eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_trained_on_a_folder_names_it_by_a_path_that_opens_anywhere(
    method: str, tmp_path: Path, tiny_folder: Path, chat_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`models/tiny` is a hub id to PEFT in any folder but the one where the training began."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = lighten.train(
        model_name_or_path="models/tiny", dataset=str(chat_file), max_steps=1, method=method,
        output_dir=str(tmp_path / "run"), progress=False, planned=False,
    )  # fmt: skip
    folder = run.model() or run.adapters()["default"]
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card  # on the hub it would name somebody else's model
    assert "`tiny`" in card
    monkeypatch.chdir(tmp_path / "elsewhere")
    if method == "lora":
        AutoPeftModelForCausalLM.from_pretrained(str(folder))
        code = card.split("```python\n")[1].split("```")[0]
        exec(code.replace("path/to/this/folder", str(folder)), {})


def test_a_project_that_was_moved_is_exported(
    tmp_path: Path, tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "before" / "tiny")
    monkeypatch.chdir(tmp_path / "before")
    lighten.train(
        model_name_or_path="./tiny", dataset=str(chat_file), max_steps=1, output_dir="run",
        progress=False, planned=False,
    )  # fmt: skip
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    assert lighten.export("run", "merged").folder.is_dir()


@pytest.mark.parametrize(
    ("name", "line", "shown"),
    [
        ("smollm2-135m", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n",
         "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Qwen/Qwen3-0.6B", "base_model: Qwen/Qwen3-0.6B\n", "Qwen/Qwen3-0.6B"),
        ("qwen3-0.6b", "base_model: Qwen/Qwen3-0.6B\n", "Qwen/Qwen3-0.6B"),
        ("gpt2", "base_model: gpt2\n", "gpt2"),
        ("models/tiny", "", "tiny"),
        ("models/tiny.gguf", "", "tiny.gguf"),
        ("~/models/tiny", "", "tiny"),
    ],
)  # fmt: skip
def test_a_card_links_to_the_hub_alone(
    name: str, line: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (card_line(name), card_name(name)) == (line, shown)
    local = Path(public_name(name))
    assert local.exists() if not line else line == f"base_model: {local}\n"


def test_a_packaged_model_has_a_name_that_others_can_open() -> None:
    assert public_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("some/model") == "some/model"
    assert packaged_as("huggingfacetb/smollm2-135m-instruct") == "smollm2-135m"
    assert packaged_as("smollm2-135m") is None


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"target_modules": ["lm_head", "q_proj"]}, VOCAB),
     ({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, VOCAB),
     ({"target_modules": ["lm_head"], "use_dora": True}, VOCAB),
     ({"target_modules": ["q_proj"]}, VOCAB + 8),
     ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, VOCAB + 8)],
)  # fmt: skip
def test_what_peft_saves_of_the_base_beside_an_adapter_is_put_into_the_base(
    settings: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    """The head beside its factors, and embeddings of a resized vocabulary: it was refused."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # PEFT asks for its words
    if rows > VOCAB:
        model.resize_token_embeddings(rows, mean_resizing=False)
    trained(model, tmp_path / "adapter", **settings)
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.cat([IDS, torch.full((len(IDS), 1), rows - 1)], dim=1)
    cohort = load_adapters(tiny_model("llama"), {"a": tmp_path / "adapter"})
    with torch.no_grad(), cohort.using("a"):
        ours = cohort.model(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_head_of_another_base_is_not_put_beside_other_adapters(tmp_path: Path) -> None:
    for seed in (0, 1):
        trained(tiny_model("llama", seed=seed), tmp_path / str(seed), target_modules=["lm_head"])
    load_adapters(tiny_model("llama"), {"a": tmp_path / "0", "b": tmp_path / "0"})
    with pytest.raises(UserError, match="does not fit this base"):
        load_adapters(tiny_model("llama"), {"a": tmp_path / "0", "b": tmp_path / "1"})
