"""Adapters that PEFT's own modules train: DoRA, PiSSA, OLoRA, and every method PEFT lists."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import lighten
from lighten.adapters import AdapterSpec, Cohort, attach, files, load
from lighten.adapters.peft_backed import ENCODER, PeftBacked
from lighten.adapters.peft_methods import REFUSED, configured, method_of
from lighten.errors import UserError
from lighten.evaluate.chat import chat
from lighten.evaluate.generate import generate
from lighten.models import attention
from lighten.recipe import Recipe, RecipeError
from lighten.train.loss import Objective
from lighten.train.memory import checkpoint_layers
from tests.test_train_step import UNEVEN, assert_close, full_batch, gradients, one_step
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model, tiny_tokenizer

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


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def peft_spec(method: str, **own: Any) -> AdapterSpec:
    return AdapterSpec("a", peft={"peft_type": method, **METHODS[method], **own})


def prompt_model(arch: str, **own: Any) -> PreTrainedModel:
    """PEFT reads the number of key-value heads that every tiny config has, and OPT ignores."""
    return tiny_model(arch, **own, **({"num_key_value_heads": 4} if arch == "opt" else {}))


def logits_of(cohort: Cohort, name: str | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), cohort.using(name):
        found: torch.Tensor = cohort.model(input_ids=ids).logits
    return found


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
    listed = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
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
    assert apart(tuned, theirs) < CLOSE
    again = load(tiny_model("llama"), {"b": folder})
    assert apart(logits_of(again, "b"), tuned) < 1e-6
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
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=64.0)
    report, members = one_step(cohort, UNEVEN, 3, scaler=scaler)
    exact = attach(tiny_model("llama"), [peft_spec(method)])
    wanted, _ = one_step(exact, UNEVEN, 3)
    assert report["a"].loss == pytest.approx(wanted["a"].loss, rel=0.05)
    assert {p.dtype for p in members["a"].parameters.values()} == {torch.float32}
    assert logits_of(cohort, "a").dtype == dtype


STARTS: list[dict[str, Any]] = [
    {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
]  # fmt: skip


def lora_spec(**own: Any) -> AdapterSpec:
    return AdapterSpec("a", r=4, alpha=6.0, **own)


@pytest.mark.parametrize("start", STARTS, ids=["dora", "pissa", "olora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dora_pissa_and_olora_on_every_architecture(
    arch: str, start: dict[str, Any], tmp_path: Path
) -> None:
    plain = tiny_model(arch)(input_ids=IDS).logits
    cohort = attach(tiny_model(arch), [lora_spec(**start)])
    assert apart(logits_of(cohort, "a"), plain) < CLOSE
    assert torch.equal(logits_of(cohort, None), plain)
    stir(cohort)
    tuned = logits_of(cohort, "a")
    assert apart(tuned, plain) > 1e-3

    # On the untouched base, in PEFT and here.
    folder = save(cohort, tmp_path / "a")
    assert apart(in_peft(folder, tiny_model(arch))(input_ids=IDS).logits, tuned) < CLOSE
    again = load(tiny_model(arch), {"a": folder})
    assert isinstance(again, PeftBacked) == ("use_dora" in start)
    assert apart(logits_of(again, "a"), tuned) < CLOSE

    # A live adapter takes the saved state back whole.
    fresh = attach(tiny_model(arch), [lora_spec(**start, seed=9)])
    fresh.restore("a", folder)
    assert torch.equal(logits_of(fresh, "a"), tuned)
    for key, parameter in cohort.parameters("a").items():
        assert torch.equal(parameter, fresh.parameters("a")[key]), key

    # Trap 31: merged equals unmerged.
    assert apart(cohort.fuse("a")(input_ids=IDS).logits, tuned) < 1e-4
    assert set(cohort.model.state_dict()) == set(tiny_model(arch).state_dict())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("start", STARTS, ids=["dora", "pissa", "olora"])
def test_loss_and_gradients_equal_plain_peft(arch: str, start: dict[str, Any]) -> None:
    if start.get("init_lora_weights") == "olora" and arch == "gpt2":
        pytest.skip("PEFT's own OLoRA does not know how GPT-2's Conv1D lies")
    cohort = attach(tiny_model(arch), [lora_spec(**start)])
    with torch.random.fork_rng():
        torch.manual_seed(42)
        config = configured(lora_spec(**start), tiny_model(arch))
        if "use_dora" not in start:
            config.init_lora_weights = start["init_lora_weights"]  # type: ignore[attr-defined]
        theirs = get_peft_model(tiny_model(arch), config).eval()
    own = {k: p for k, p in theirs.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in cohort.parameters("a").items():
            place = key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
            if place == key:
                place = key.replace(".weight", ".default.weight")
            if "use_dora" not in start:
                assert apart(parameter, own[place]) < CLOSE
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
            own[place].copy_(parameter)
    with cohort.using("a"):
        ours_logits = cohort.model(input_ids=IDS).logits
    losses = [
        F.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        for found in (ours_logits, theirs(input_ids=IDS).logits)
    ]
    assert apart(*losses) < CLOSE
    for loss in losses:
        loss.backward()
    found = {key: p.grad for key, p in cohort.parameters("a").items()}
    for (key, ours), theirs_p in zip(found.items(), own.values(), strict=True):
        assert ours is not None
        assert theirs_p.grad is not None
        assert apart(ours, theirs_p.grad) < 2 * CLOSE, key


@pytest.mark.parametrize(("rslora", "scale"), [(False, 1.5), (True, 3.0)])
def test_trap24_a_converted_start_keeps_its_scale_and_patterns(
    rslora: bool, scale: float, tmp_path: Path
) -> None:
    own = lora_spec(
        init_lora_weights="pissa", use_rslora=rslora,
        rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3.0},
    )  # fmt: skip
    cohort = attach(tiny_model("llama"), [own])
    stir(cohort)
    saved = json.loads((save(cohort, tmp_path / "a") / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"]) == (8, {"q_proj": 4})
    layer = in_peft(tmp_path / "a", tiny_model("llama")).get_submodule(
        "base_model.model.model.layers.0.mlp.up_proj"
    )
    assert layer.scaling["default"] == pytest.approx(scale)  # type: ignore[index]
    again = load(tiny_model("llama"), {"a": tmp_path / "a"})
    assert apart(logits_of(again, "a"), logits_of(cohort, "a")) < CLOSE


def test_trap27_a_converted_adapter_does_not_fit_another_model(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [lora_spec(use_dora=True)])
    folder = save(cohort, tmp_path / "a")
    with pytest.raises(UserError, match="was trained on another model"):
        load(tiny_model("llama", hidden_size=64), {"a": folder})
    with pytest.raises(UserError, match="lacks base_model"):
        load(tiny_model("llama", num_hidden_layers=3), {"a": folder})
    with pytest.raises(UserError, match="no adapter is called 'b'"), cohort.using("b"):
        pass


def test_an_adapter_that_needs_its_changed_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / files.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "init_lora_weights": "pissa"})
    )
    with pytest.raises(UserError, match="belongs to a base that it changed"):
        load(tiny_model("llama"), {"a": tmp_path})


def test_a_rank_above_the_layers_size_is_refused_where_it_comes_from_the_weight() -> None:
    with pytest.raises(UserError, match=r"k_proj has only 16 features"):
        attach(tiny_model("llama"), [AdapterSpec("a", r=20, init_lora_weights="pissa")])


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
    assert apart(merged(input_ids=IDS).logits, tuned) < 1e-4
    assert set(merged.state_dict()) == set(tiny_model("llama").state_dict())


@pytest.mark.parametrize("start", [*STARTS, {"peft": {"peft_type": "IA3"}}])
def test_packed_rows_and_recomputed_layers_learn_as_padded_ones(start: dict[str, Any]) -> None:
    def step(packed: bool, recompute: bool) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        model.config._attn_implementation = attention.NAME
        cohort = attach(model, [lora_spec(**start)])
        stir(cohort)
        if recompute:
            checkpoint_layers(model)
        return gradients(one_step(cohort, UNEVEN, 3, packed=packed)[1]["a"])

    attention.register()
    plain = step(False, False)
    assert all(float(value.abs().max()) > 0 for value in plain.values())
    assert_close(step(True, False), plain)
    assert_close(step(True, True), plain)


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
    loss, wanted = full_batch(cohort, "a", UNEVEN)
    report, members = one_step(cohort, UNEVEN, 2)
    assert report["a"].loss == pytest.approx(loss, rel=CLOSE)
    assert_close(gradients(members["a"]), wanted, 2 * CLOSE)


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
        wanted = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + 6:
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in (tokenizer.eos_token_id,):
                    break
            wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert together.texts == alone.texts == wanted


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


def test_dropout_is_drawn_from_the_rows_and_off_when_measured() -> None:
    own = lora_spec(use_dora=True, dropout=0.5)
    first, second = (one_step(attach(tiny_model("llama"), [own]), UNEVEN, 3)[1] for _ in range(2))
    assert_close(gradients(first["a"]), gradients(second["a"]), 1e-9)
    without = one_step(attach(tiny_model("llama"), [lora_spec(use_dora=True)]), UNEVEN, 3)[1]
    key = next(key for key in gradients(without["a"]) if "lora_B" in key)
    assert apart(gradients(first["a"])[key], gradients(without["a"])[key]) > 0.01
    cohort = attach(tiny_model("llama"), [own])
    stir(cohort)
    before = torch.random.get_rng_state()
    assert torch.equal(logits_of(cohort, "a"), logits_of(cohort, "a"))
    one_step(cohort, UNEVEN, 3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_trap8_and_trap29_a_head_inside_peft_learns_and_merges(tied: bool, whole: bool) -> None:
    own = (
        lora_spec(use_dora=True, modules_to_save=("lm_head",))
        if whole
        else lora_spec(use_dora=True, target_modules=("q_proj", "lm_head"))
    )
    cohort = attach(tiny_model("llama", tie_word_embeddings=tied), [own])
    stir(cohort)
    assert not cohort.supports_fast_loss
    _, wanted = full_batch(cohort, "a", UNEVEN)
    objective = Objective(cohort.model, cohort, fast=cohort.supports_fast_loss)
    members = one_step(cohort, UNEVEN, 2, objective=objective)[1]
    assert any("lm_head" in key for key in wanted)
    assert_close(gradients(members["a"]), wanted, 2 * CLOSE)
    tuned = logits_of(cohort, "a")
    assert apart(cohort.fuse("a")(input_ids=IDS).logits, tuned) < 1e-4
    assert cohort.model.config.tie_word_embeddings is False or not tied


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_folder), "dataset": str(chat_file), "output_dir": str(tmp_path / "run"),
        "max_steps": 4, "save_steps": 2, "learning_rate": 2e-2, "val_size": 0.2, "dtype": "float32",
        "progress": False, "per_device_train_batch_size": 4,
    }  # fmt: skip


RUNS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": True},
    "pissa": {"init_lora_weights": "pissa", "lora_r": 4},
    "ia3": {"peft": {"peft_type": "ia3"}, "learning_rate": 0.2},
    "prefix": {
        "peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
        "learning_rate": 0.3,
    },
    "p-tuning": {"peft": {"peft_type": "p-tuning", "num_virtual_tokens": 4}},
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("method", RUNS)
def test_a_run_trains_resumes_bitwise_evaluates_chats_and_loads_in_peft(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, **RUNS[method]}
    run = lighten.train(**settings)
    losses = [m["loss"] for m in run.metrics() if m["kind"] == "train"]
    assert losses[-1] < losses[0]
    info = run.info()
    (own,) = info["adapters"]
    assert own["trainable_parameters"] > 0
    assert own["serving"]
    assert info["base"]["parameters"] == sum(p.numel() for p in tiny_model("llama").parameters())
    packing = next(c for c in info["choices"] if c["what"] == "packing")
    assert (packing["value"] == "off") == (method in ("prefix", "p-tuning")), packing

    found = lighten.evaluate(run, max_examples=3, max_new_tokens=3)
    if method not in ("prefix", "p-tuning"):  # they begin far above the base
        assert found.metric("default", "loss")["value"] < found.metric("base", "loss")["value"]
    assert own["method"] in lighten.report(run).read_text(encoding="utf-8")
    said = io.StringIO()
    chat(str(run.folder), max_new_tokens=3, lines=io.StringIO("hello\n/exit\n"), out=said)
    assert said.getvalue()

    folder = run.adapters()["default"]
    theirs = in_peft(folder, tiny_model("llama"))(input_ids=IDS).logits[:, -IDS.shape[1] :]
    ours = logits_of(load(tiny_model("llama"), {"a": folder}), "a")
    assert apart(ours, theirs) < CLOSE
    assert apart(ours, tiny_model("llama")(input_ids=IDS).logits) > 1e-3

    before = load_file(folder / files.WEIGHTS)
    shutil.rmtree(folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    run.update(status="interrupted")
    lighten.train(**settings, resume=True)
    after = load_file(folder / files.WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_packing_and_recomputing_that_a_method_cannot_do_are_refused(
    settings: dict[str, Any],
) -> None:
    prefix = {**settings, **RUNS["prefix"]}
    with pytest.raises(UserError, match="gradient_checkpointing: PREFIX_TUNING keeps"):
        lighten.train(**prefix, gradient_checkpointing=True)
    with pytest.raises(UserError, match="packing: PREFIX_TUNING puts a learnt prompt"):
        lighten.train(**{**prefix, "output_dir": settings["output_dir"] + "2"}, packing=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft": {"peft_type": "IA4"}}, "did you mean IA3?"),
        ({"peft": {"peft_type": "VERA", "vera_dropot": 0.1}}, "did you mean vera_dropout?"),
        ({"peft": {"peft_type": "VERA", "inference_mode": True}}, "set by lighten itself"),
        ({"peft": {"peft_type": "ADALORA"}}, "does not train here: it has to be told"),
        ({"peft": {"peft_type": "LORA", "bias": "all"}}, "trains the base's own weights"),
        ({"peft": {"peft_type": "LORA", "init_lora_weights": "pissa"}}, "leave the peft section"),
        ({"peft": {"peft_type": "LORA", "task_type": "SEQ_CLS"}}, "must be CAUSAL_LM"),
        ({"peft": {"r": 4}}, "peft names no peft_type"),
        ({"peft": {"peft_type": "IA3"}, "lora_r": 4}, "lora_r has no effect beside peft"),
        ({"peft": {"peft_type": "IA3"}, "use_dora": True}, "use_dora has no effect beside peft"),
        ({"peft": {"peft_type": "IA3"}, "adapters": [{"name": "x", "lora_r": 2}]},
         "lora_r has no effect beside peft"),
        ({"use_dora": True, "lora_r": [2, 4]}, "use_dora trains one adapter at a time"),
        ({"init_lora_weights": "pissa", "lora_r": [2, 4]}, "init_lora_weights: pissa trains one"),
        ({"peft": {"peft_type": "IA3"}, "learning_rate": [0.1, 0.2]}, "peft trains one adapter"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "exclude each other"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' does not do"),
    ],
)  # fmt: skip
def test_what_does_not_hold_together_is_told_before_anything_is_loaded(
    change: dict[str, Any], told: str, settings: dict[str, Any]
) -> None:
    settings = {**settings, "model": "/nowhere/at/all"}
    with pytest.raises(UserError, match=told):
        lighten.train(**{**settings, **change})


def test_a_method_that_the_base_cannot_take_is_told_with_pefts_reason() -> None:
    with pytest.raises(UserError, match=r"ROAD cannot train this base: .*divisible"):
        attach(tiny_model("llama"), [AdapterSpec("a", peft={"peft_type": "ROAD"})])
    with pytest.raises(UserError, match="cannot tell the rows of 2 adapters"):
        attach(tiny_model("llama"), [lora_spec(use_dora=True), AdapterSpec("b")])


def test_two_saved_adapters_of_which_one_is_pefts_are_refused(tmp_path: Path) -> None:
    dora = save(attach(tiny_model("llama"), [lora_spec(use_dora=True)]), tmp_path / "dora")
    with pytest.raises(UserError, match="load it alone"):
        load(tiny_model("llama"), {"a": dora, "b": dora})


def test_the_recipe_takes_the_inits_that_it_names() -> None:
    for start in ("pissa_niter_16", "olora", "orthogonal", False):
        made = Recipe.from_values(
            {"model": "x", "dataset": __file__, "init_lora_weights": start}
        ).cohort()
        assert made[0].init_lora_weights == start
    with pytest.raises(RecipeError, match="pissa_niter_0"):
        Recipe.from_values(
            {"model": "x", "dataset": __file__, "init_lora_weights": "pissa_niter_0"}
        )


ATTENTION = {
    "gpt2": {"attn.c_attn", "attn.c_proj"}, "phi3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "opt": {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
}  # fmt: skip
MLP = {
    "gpt2": {"mlp.c_fc", "mlp.c_proj"}, "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {"fc1", "fc2"},
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_groups_of_targets_are_the_linear_layers_of_their_blocks(arch: str, tmp_path: Path) -> None:
    usual = {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    gated = {f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    for group, wanted in (
        ("attention", ATTENTION.get(arch, usual)), ("mlp", MLP.get(arch, gated)),
    ):  # fmt: skip
        if (arch, group) == ("mixtral", "mlp"):
            with pytest.raises(UserError, match="fused experts are reached through peft"):
                attach(tiny_model(arch), [AdapterSpec("a", target_modules="mlp")])
            continue
        for targets in (group, (group,), (group, "lm_head")):
            spec = AdapterSpec("a", target_modules=targets, init_lora_weights=False)
            cohort = attach(tiny_model(arch), [spec])
            ends = {
                next((w for w in sorted(wanted) if path.endswith(f".{w}")), path)
                for path in cohort.linears
            }
            assert ends == wanted | ({"lm_head"} if "lm_head" in targets else set())
            assert len([p for p in cohort.linears if p != "lm_head"]) == 2 * len(wanted)
        folder = save(cohort, tmp_path / group)
        saved = json.loads((folder / files.CONFIG).read_text())["target_modules"]
        assert not {"attention", "mlp"} & set(saved)
        assert apart(in_peft(folder, tiny_model(arch))(input_ids=IDS).logits,
                     logits_of(cohort, "a")) < CLOSE  # fmt: skip


def test_a_linear_layer_that_is_called_like_a_group_is_meant_before_it() -> None:
    class Named(nn.Module):
        """A linear layer under the name of a group."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.attention = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attention(x)
            return out

    model = tiny_model("llama")
    path = "model.layers.0.mlp.up_proj"
    model.set_submodule(path, Named(model.get_submodule(path)))
    cohort = attach(model, [AdapterSpec("a", target_modules=("attention",))])
    assert set(cohort.linears) == {f"{path}.attention"}


def test_groups_of_targets_work_for_pefts_methods_too() -> None:
    cohort = attach(tiny_model("gpt2"), [AdapterSpec("a", peft={
        "peft_type": "LORA", "target_modules": ["attention"], "lora_bias": True})])  # fmt: skip
    places = {key.partition(".lora_")[0].rpartition("h.")[2] for key in cohort.parameters("a")}
    assert {place.partition(".")[2] for place in places} == {"attn.c_attn", "attn.c_proj"}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_orthogonal_factors_start_at_nothing_and_are_not_nothing(arch: str) -> None:
    spec = AdapterSpec("a", r=4, init_lora_weights="orthogonal")
    cohort = attach(tiny_model(arch), [spec])
    assert not isinstance(cohort, PeftBacked)
    assert apart(logits_of(cohort, "a"), tiny_model(arch)(input_ids=IDS).logits) < CLOSE
    for layer in cohort.linears.values():
        A, B = layer.lora_A["a"], layer.lora_B["a"]
        assert float((B @ A).abs().max()) < 1e-7 < float(A.abs().max())
        assert 0.03 < float(A.std()) < 0.15  # PEFT's scale: a tenth, over half of the rank
        assert torch.linalg.matrix_rank(A.double(), atol=1e-6) == 2
    with pytest.raises(UserError, match="orthogonal halves the rank, but 3 is odd"):
        attach(tiny_model(arch), [AdapterSpec("a", r=3, init_lora_weights="orthogonal")])


def test_saving_keeps_whole_modules_and_new_tokens(tmp_path: Path) -> None:
    def grown() -> PreTrainedModel:
        model = tiny_model("llama")
        model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
        return model

    own = lora_spec(use_dora=True, modules_to_save=("embed_tokens", "lm_head"))
    cohort = attach(grown(), [own])
    stir(cohort)
    folder = save(cohort, tmp_path / "a")
    again = load(tiny_model("llama"), {"a": folder})
    assert torch.equal(logits_of(again, "a"), logits_of(cohort, "a"))
