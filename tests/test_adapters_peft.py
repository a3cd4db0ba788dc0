"""Every method that PEFT lists, trained by PEFT's own modules inside a cohort of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel

from lighten.adapters import AdapterSpec, Cohort, attach, load
from lighten.adapters.peft_backed import ENCODER
from lighten.adapters.peft_methods import REFUSED, method_of
from lighten.engine.scaling import LossScaler
from lighten.errors import UserError
from lighten.evaluation.generate import generate
from tests.test_adapters import relative_difference
from tests.test_train_step import UNEVEN, assert_close, full_batch, gradients, one_step
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

IDS = torch.randint(3, VOCAB, (4, 11), generator=torch.Generator().manual_seed(0))
CLOSE = 1e-5
VIRTUAL = {"num_virtual_tokens": 3}
# What each method needs at this size, and where its defaults are too large for it.
METHODS: dict[str, dict[str, Any]] = {
    "BEFT": {}, "BOFT": {}, "C3A": {"block_size": 16}, "CARTRIDGE": VIRTUAL,
    "DEFT": {}, "DELORA": {}, "FOURIERFT": {"n_frequency": 20}, "FROD": {}, "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2}, "HIRA": {}, "HRA": {}, "IA3": {}, "LILY": {},
    "LN_TUNING": {}, "LOHA": {}, "LOKR": {}, "LORA": {"lora_bias": False, "layers_to_transform": 0},
    "MISS": {"r": 4}, "OFT": {"oft_block_size": 8}, "P_TUNING": VIRTUAL, "PEANUT": {},
    "PREFIX_TUNING": VIRTUAL, "PROMPT_TUNING": VIRTUAL, "PSOFT": {"r": 4}, "PVERA": {"r": 4},
    "RANDLORA": {"r": 4}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 2}, "SUPERTUNING": {},
    "TINYLORA": {}, "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7]}, "UNILORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 8}, "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}  # fmt: skip
PROMPTS = ("CARTRIDGE", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
# Their layers say so when PEFT is asked to merge them.
UNMERGED = ("BEFT", "LILY")


def peft_spec(method: str, **overrides: Any) -> AdapterSpec:
    return AdapterSpec("a", peft={"peft_type": method, **METHODS[method], **overrides})


def lora_spec(**options: Any) -> AdapterSpec:
    return AdapterSpec("a", r=4, alpha=6.0, **options)


def prompt_model(arch: str, **changes: Any) -> PreTrainedModel:
    """PEFT reads the number of key-value heads that every tiny config has, and OPT ignores."""
    return tiny_model(arch, **changes, **({"num_key_value_heads": 4} if arch == "opt" else {}))


def logits_of(cohort: Cohort, name: str | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), cohort.using(name):
        logits: torch.Tensor = cohort.model(input_ids=ids).logits
    return logits


def stir(cohort: Cohort, scale: float = 0.05) -> None:
    """Weights as training might leave them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in cohort.parameters("a").values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def save(cohort: Cohort, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in cohort.contents("a", base_model="x").items():
        (folder / name).write_bytes(data)
    cohort.verify("a", folder)
    return folder


def in_peft(folder: Path, model: PreTrainedModel) -> nn.Module:
    return PeftModel.from_pretrained(model, str(folder)).eval()


def test_every_method_that_peft_lists_is_tried_here_or_refused_with_a_reason() -> None:
    listed = {str(peft_type.value) for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(METHODS) | set(REFUSED) == listed
    for method, reason in REFUSED.items():
        with pytest.raises(UserError, match=f"{method} does not train here: "):
            method_of({"peft_type": method})
        assert reason


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # PEFT's own forward
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_saves_loads_in_plain_peft_and_leaves_the_base(
    method: str, tmp_path: Path
) -> None:
    plain = tiny_model("llama")(input_ids=IDS).logits
    cohort = attach(tiny_model("llama"), [peft_spec(method)])
    assert torch.equal(logits_of(cohort, None), plain)
    before = {key: value.clone() for key, value in cohort.parameters("a").items()}
    report, members = one_step(cohort, UNEVEN, 3)
    assert report["a"].grad_norm > 0
    assert any(not torch.equal(before[key], p) for key, p in members["a"].parameters.items())
    assert {p.dtype for p in members["a"].parameters.values()} == {torch.float32}

    tuned = logits_of(cohort, "a")
    folder = save(cohort, tmp_path / "a")
    theirs = in_peft(folder, tiny_model("llama"))(input_ids=IDS).logits[:, -IDS.shape[1] :]
    assert relative_difference(tuned, theirs) < CLOSE
    again = load(tiny_model("llama"), {"b": folder})
    assert relative_difference(logits_of(again, "b"), tuned) < 1e-6
    assert torch.equal(logits_of(again, None), plain)
    assert not any(p.requires_grad for p in again.model.parameters())
    assert torch.equal(logits_of(cohort, None), plain)
    assert torch.equal(cohort.detach()(input_ids=IDS).logits, plain)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, torch.bfloat16) for method in sorted(METHODS)),
        *((method, torch.float16) for method in ("IA3", "LN_TUNING", "LORA", "PREFIX_TUNING")),
    ],
)
def test_trap26_every_method_trains_in_float32_on_a_half_precision_base(
    method: str, dtype: torch.dtype
) -> None:
    cohort = attach(tiny_model("llama", dtype=dtype), [peft_spec(method)])
    plain = tiny_model("llama", dtype=dtype)(input_ids=IDS).logits
    assert torch.equal(logits_of(cohort, None), plain)
    assert cohort.dtype == dtype
    scaler = LossScaler(enabled=dtype == torch.float16, initial=64.0)
    report, members = one_step(cohort, UNEVEN, 3, scaler=scaler)
    exact = attach(tiny_model("llama"), [peft_spec(method)])
    exact_report, _ = one_step(exact, UNEVEN, 3)
    assert report["a"].loss == pytest.approx(exact_report["a"].loss, rel=0.05)
    assert {p.dtype for p in members["a"].parameters.values()} == {torch.float32}
    assert logits_of(cohort, "a").dtype == dtype


@pytest.mark.parametrize("method", sorted(METHODS))
def test_trap31_what_can_be_merged_equals_the_unmerged_and_the_rest_says_so(method: str) -> None:
    cohort = attach(tiny_model("llama"), [peft_spec(method)])
    stir(cohort)
    tuned = logits_of(cohort, "a")
    if method in (*PROMPTS, *UNMERGED):
        with pytest.raises(UserError, match="cannot be merged"):
            cohort.fuse("a")
        return
    merged = cohort.fuse("a")
    assert relative_difference(merged(input_ids=IDS).logits, tuned) < 1e-4
    assert set(merged.state_dict()) == set(tiny_model("llama").state_dict())


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        *(("llama", method) for method in ("IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")),
        *((arch, "PROMPT_TUNING") for arch in ("gpt2", "opt", "gemma2")),
        ("opt", "PREFIX_TUNING"),
    ],
)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_a_step_equals_the_models_own_loss_by_autograd(arch: str, method: str) -> None:
    cohort = attach(prompt_model(arch), [peft_spec(method)])
    stir(cohort)
    loss, expected = full_batch(cohort, "a", UNEVEN)
    report, members = one_step(cohort, UNEVEN, 2)
    assert report["a"].loss == pytest.approx(loss, rel=CLOSE)
    assert_close(gradients(members["a"]), expected, 2 * CLOSE)


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        *(("llama", method) for method in PROMPTS),
        *((arch, "PROMPT_TUNING") for arch in ("gpt2", "opt", "mistral", "gemma3_text")),
        *((arch, "PREFIX_TUNING") for arch in ("gpt2", "opt", "gemma3_text")),
    ],
)
def test_trap17_answers_behind_a_learnt_prompt_do_not_depend_on_padding(
    arch: str, method: str
) -> None:
    # Keys and values that come from nowhere stand before padding: a window must reach them.
    wide = {"sliding_window": 64} if method in ("CARTRIDGE", "PREFIX_TUNING") else {}
    model = prompt_model(arch, **wide)
    cohort = attach(model, [peft_spec(method)])
    stir(cohort, 0.5)
    tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = None
    prompts = [IDS[0, :9].tolist(), IDS[1, :4].tolist(), IDS[2, :6].tolist()]
    with cohort.using("a"):
        together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
        alone = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + 6:
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in (tokenizer.eos_token_id,):
                    break
            # Special tokens are shown, but for the end, the start and padding.
            hidden = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
            expected.append(tokenizer.decode([i for i in ids[len(prompt) :] if i not in hidden]))
    assert together.texts == alone.texts == expected


def test_learnt_prompts_say_what_they_cannot() -> None:
    for method in PROMPTS:
        cohort = attach(tiny_model("llama"), [peft_spec(method)])
        assert f"{method} puts a learnt prompt" in str(cohort.no_packing)
        assert (cohort.no_checkpointing is not None) == (method in ("CARTRIDGE", "PREFIX_TUNING"))
    plain = attach(tiny_model("llama"), [lora_spec(use_dora=True)])
    assert (plain.no_packing, plain.no_checkpointing) == (None, None)


def test_a_prompts_encoder_is_kept_for_going_on(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [peft_spec("P_TUNING")])
    stir(cohort)
    folder = save(cohort, tmp_path / "a")
    fresh = attach(tiny_model("llama"), [AdapterSpec("a", seed=5, peft=peft_spec("P_TUNING").peft)])
    fresh.restore("a", folder)
    for key, value in cohort.parameters("a").items():
        assert torch.equal(fresh.parameters("a")[key], value)
    (folder / ENCODER).unlink()
    with pytest.raises(UserError, match="but not trained further"):
        fresh.restore("a", folder)


def test_a_method_that_the_base_cannot_take_is_told_with_pefts_reason() -> None:
    with pytest.raises(UserError, match=r"ROAD cannot train this base: .*divisible"):
        attach(tiny_model("llama"), [AdapterSpec("a", peft={"peft_type": "ROAD"})])
    with pytest.raises(UserError, match="cannot tell the rows of 2 adapters"):
        attach(tiny_model("llama"), [lora_spec(use_dora=True), AdapterSpec("b")])
