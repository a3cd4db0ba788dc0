"""Training that goes on from an adapter: PEFT's, or one of our runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lighten
from lighten import UserError
from lighten.peft_config import CONFIG, WEIGHTS
from lighten.recipe import Recipe
from lighten.runs import Run
from tests.conftest import HUB_COMMIT
from tests.tiny import save_tiny

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "one layer": {"layers_to_transform": [1], "use_rslora": True},
    "pattern": {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
    "head": {"modules_to_save": ["lm_head"]},
    "factors of a head": {"target_modules": ["q_proj", "lm_head"]},
}  # fmt: skip
IDS = [[5, 9, 14, 200, 31, 7], [8, 40, 41, 90, 3, 11]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in tokens, so that PEFT's model sees the same."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": ids, "labels": ids}) for ids in IDS))
    return path


def plain_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def peft_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT wrote, with a random B."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    config.base_model_name_or_path = str(base)
    get_peft_model(plain_model(base), config).save_pretrained(folder)
    return folder


def settings_of(rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": str(rows), "output_dir": str(output), "dtype": "float32", "val_size": 0,
        "max_steps": 1, "max_grad_norm": None, "lr_scheduler_type": "constant", "progress": False,
        "learning_rate": 1e-2, "planned": False, **changes,
    }  # fmt: skip


def trained(rows: Path, output: Path, **changes: Any) -> Run:
    return lighten.train(**settings_of(rows, output, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's; PEFT saves the base's head beside its factors."""
    saved = load_file(folder / WEIGHTS)
    return {key: value for key, value in saved.items() if ".base_layer." not in key}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("adapter_kind", KINDS)
def test_the_first_step_is_that_of_pefts_loaded_model(
    adapter_kind: str, optim: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    start = peft_adapter(base, tmp_path / "start", **KINDS[adapter_kind])
    run = trained(
        rows, tmp_path / "run", model=str(base), adapter_name_or_path=str(start), optim=optim
    )

    model = PeftModel.from_pretrained(plain_model(base), str(start), is_trainable=True).eval()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = chosen(learning, lr=1e-2, weight_decay=0.0)
    ids = torch.tensor(IDS)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "theirs")

    first_step = next(line for line in run.metrics() if line["kind"] == "train")
    assert first_step["loss"] == pytest.approx(loss.item(), abs=1e-5)
    ours, theirs = weights(run.adapters()["default"]), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    before = weights(start)
    assert any(not torch.equal(before[key], ours[key]) for key in ours)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5)
    mine, its = (json.loads((f / CONFIG).read_text()) for f in (run.adapters()["default"], start))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert mine[key] == its[key]


@pytest.mark.parametrize("adapter_kind", KINDS)
def test_a_rate_of_almost_nothing_gives_the_adapter_back_bit_for_bit(
    adapter_kind: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    start = peft_adapter(base, tmp_path / "start", **KINDS[adapter_kind])
    run = trained(
        rows, tmp_path / "run", model=str(base), adapter_name_or_path=str(start),
        learning_rate=1e-30,
    )  # fmt: skip
    before, after = weights(start), weights(run.adapters()["default"])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_start_that_names_another_base_is_told_among_the_choices(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """The base is a folder of the hub's cache, as far as its name goes."""
    place = tmp_path / "models--someone--tiny-chat" / "snapshots" / "1"
    shutil.copytree(base, place)
    start = peft_adapter(base, tmp_path / "start")
    config = json.loads((start / CONFIG).read_text())
    for number, (recorded, told) in enumerate((("someone/tiny-chat", False), ("a/other", True))):
        (start / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": recorded}))
        run = trained(
            rows, tmp_path / f"run-{number}", model=str(place), adapter_name_or_path=str(start)
        )
        reasons = {choice["what"]: choice["reason"] for choice in run.info()["choices"]}
        assert (f"names {recorded} as its base" in reasons["start"]) == told


def test_our_own_run_checkpoint_and_folder_are_starts_alike(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    first_run = trained(rows, tmp_path / "first", model=str(base), lora_r=3, lora_dropout=0.1)
    adapter = first_run.adapters()["default"]
    trained_weights = {}
    for name, start in (
        ("folder", adapter), ("run", first_run.folder),
        ("checkpoint", first_run.folder / "checkpoints" / "checkpoint-1"),
    ):  # fmt: skip
        run = trained(rows, tmp_path / name, model=str(base), adapter_name_or_path=str(start))
        assert run.recipe().lora_r == 3
        trained_weights[name] = weights(run.adapters()["default"])
    for other_weights in (trained_weights["run"], trained_weights["checkpoint"]):
        assert all(
            torch.equal(value, other_weights[key])
            for key, value in trained_weights["folder"].items()
        )


def test_an_adapter_of_the_hub_is_a_start(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, from the hub's cache; a repository without safetensors is refused by name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshots = {}
    for name in ("whole", "pickled"):
        repo = tmp_path / "hub" / f"models--someone--{name}"
        snapshots[name] = repo / "snapshots" / HUB_COMMIT
        peft_adapter(base, snapshots[name])
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(HUB_COMMIT)
    (snapshots["pickled"] / WEIGHTS).rename(snapshots["pickled"] / "adapter_model.bin")
    run = trained(
        rows, tmp_path / "run", model=str(base), adapter_name_or_path="someone/whole",
        learning_rate=1e-30,
    )  # fmt: skip
    before, after = weights(snapshots["whole"]), weights(run.adapters()["default"])
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name, message in (
        ("someone/pickled", f"is not an adapter in safetensors: it has no {WEIGHTS}"),
        ("someone/nothing", "the adapter someone/nothing does not exist"),
        ("./someone/whole", "does not exist; give the folder of an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe.from_values(
                {"model": str(base), "dataset": str(rows), "adapter_name_or_path": name}
            )


def test_an_adapter_as_the_model_is_its_base_and_a_start(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    start = peft_adapter(base, tmp_path / "start")
    text = (start / CONFIG).read_text()
    (start / CONFIG).write_bytes(text.encode("utf-8-sig"))
    recipe = Recipe.from_values({"model": str(start), "dataset": str(rows)})
    assert (recipe.model_name_or_path, recipe.adapter_name_or_path) == (str(base), str(start))
    assert (recipe.lora_r, recipe.lora_alpha) == (4, 6)
    assert any("is an adapter of" in notice for notice in recipe.notices)
    run = trained(rows, tmp_path / "run", model=str(start))
    explicit_run = trained(
        rows, tmp_path / "same", model=str(base), adapter_name_or_path=str(start)
    )
    ours, theirs = (
        weights(trained_run.adapters()["default"]) for trained_run in (run, explicit_run)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert lighten.plan(model=str(start), device="cpu", changes=False).memory.expected > 0


def test_evaluation_resume_and_a_moved_adapter(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"  # enough of them to hold some out
    token_rows = [[*IDS[number % 2][:6], number] for number in range(4, 20)]
    rows.write_text("\n".join(json.dumps({"input_ids": ids, "labels": ids}) for ids in token_rows))
    start = peft_adapter(base, tmp_path / "start")
    chosen = {
        "model": str(base), "adapter_name_or_path": str(start), "val_size": 0.5,
    }  # fmt: skip
    run = trained(rows, tmp_path / "run", max_steps=3, save_steps=1, **chosen)
    plain_run = trained(rows, tmp_path / "plain", model=str(base), val_size=0.5)
    measured, plain_evaluation = (
        lighten.evaluate(trained_run, max_examples=1, max_new_tokens=1)
        for trained_run in (run, plain_run)
    )
    assert measured.metric("base", "loss") == plain_evaluation.metric("base", "loss")

    final = weights(run.adapters()["default"])
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-3")
    run.update(status="interrupted")
    again = trained(rows, tmp_path / "run", max_steps=3, save_steps=1, resume=True, **chosen)
    assert all(torch.equal(final[k], v) for k, v in weights(again.adapters()["default"]).items())
    run.update(status="interrupted")
    shutil.rmtree(run.folder / "checkpoints")  # from the first step, which is not zero again
    anew = trained(rows, tmp_path / "run", max_steps=3, save_steps=1, resume=True, **chosen)
    assert all(torch.equal(final[k], v) for k, v in weights(anew.adapters()["default"]).items())

    start.rename(tmp_path / "elsewhere")
    opened = Run(run.folder).recipe()
    assert opened.lora_r == 4
    assert opened.changed({"max_steps": 2}).lora_alpha == 6
    lighten.evaluate(run, max_examples=1, max_new_tokens=1)
    with pytest.raises(UserError, match="does not exist"):
        trained(rows, tmp_path / "new", **chosen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, r"lora_r is 8, but the adapter .* has 4"),
        ({"lora_alpha": 16}, r"lora_alpha is 16, but .* has 6"),
        ({"lora_target_modules": ["q_proj"]}, r"lora_target_modules is \['q_proj'\], but"),
        ({"use_rslora": True}, "use_rslora is True, but .* has False"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern is .* but"),
        ({"modules_to_save": ["norm"]}, "modules_to_save is .* has None"),
        ({"lora_r": [4, 8]}, "lora_r is 8, but"),
        ({"adapters": [{"name": "a"}, {"name": "b", "lora_r": 2}]}, "b: lora_r is 2, but"),
        ({"method": "full"}, "adapter_name_or_path has no effect with method: full"),
        ({"trainable_layers": "last_1"}, "adapter_name_or_path has no effect with method: full"),
        ({"use_dora": True}, "use_dora"),
        ({"peft": {"peft_type": "IA3"}}, "peft:"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights: gaussian has no effect"),
    ],
)
def test_what_contradicts_the_adapter_is_one_sentence(
    changes: dict[str, Any], message: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    start = peft_adapter(base, tmp_path / "start")
    for model in ({"adapter_name_or_path": str(start), "model": str(base)}, {"model": str(start)}):
        with pytest.raises(UserError, match=message) as error:
            Recipe.from_values({**model, "dataset": str(rows), **changes})
        assert "\n" not in str(error.value)


def test_targets_may_be_named_as_other_tools_name_them(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    start = peft_adapter(base, tmp_path / "start", modules_to_save=["lm_head"])
    settings = {"model": str(start), "dataset": str(rows), "lora_target": "up_proj, q_proj"}
    recipe = Recipe.from_values({**settings, "additional_target": "lm_head"})
    assert sorted(recipe.lora_target_modules) == ["q_proj", "up_proj"]
    assert recipe.modules_to_save == ["lm_head"]


def test_several_adapters_start_from_one(base: Path, rows: Path, tmp_path: Path) -> None:
    start = peft_adapter(base, tmp_path / "start")
    run = trained(
        rows, tmp_path / "run", model=str(start), learning_rate=[1e-30, 1e-2], lora_r=[4, 4]
    )
    still, moved = (weights(folder) for folder in run.adapters().values())
    before = weights(start)
    assert all(torch.equal(before[key], still[key]) for key in before)
    assert not all(torch.equal(before[key], moved[key]) for key in before)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"gpt": 1}]
)
def test_another_base_is_one_sentence_before_training(
    changes: dict[str, Any], base: Path, rows: Path, tmp_path: Path
) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    model = tiny_model("gpt2") if "gpt" in changes else tiny_model("llama", **changes)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    start = peft_adapter(base, tmp_path / "start")
    with pytest.raises(UserError, match=f"adapter_name_or_path: {start}") as error:
        trained(
            rows, tmp_path / "run", model=str(tmp_path / "other"), adapter_name_or_path=str(start)
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"adapter_name_or_path: {start}"):
        lighten.plan(
            model=str(tmp_path / "other"), adapter_name_or_path=str(start), device="cpu",
            changes=False,
        )  # fmt: skip


def start_reason(run: Run) -> str:
    (reason,) = (c["reason"] for c in run.info()["choices"] if c["what"] == "start")
    return str(reason)


def test_tokens_and_a_template_that_an_adapter_learnt_with_are_told(
    base: Path, chat_file: Path, tmp_path: Path
) -> None:
    """It was trained on in another form of words, without a word of it."""
    form = {"chat_template": "alpaca", "added_tokens": ["<call>"]}
    first = trained(chat_file, tmp_path / "first", model=str(base), **form)
    again = {"model": str(base), "adapter_name_or_path": str(first.folder)}
    reason = start_reason(trained(chat_file, tmp_path / "other", **again))
    template = first.adapters()["default"] / "chat_template.jinja"
    assert 'added_tokens: ["<call>"]' in reason
    assert reason.endswith(f"chat_template: {template}")
    said = {**form, "chat_template": str(template)}
    assert start_reason(trained(chat_file, tmp_path / "same", **again, **said)) == (
        "adapter_name_or_path"
    )


def test_an_adapter_that_learnt_new_words_asks_for_them(
    base: Path, chat_file: Path, tmp_path: Path
) -> None:
    """It was called one of another model."""
    # The base has rows for some more tokens than it knows.
    words = {"added_tokens": ["<call>", *(f"<{number}>" for number in range(30)), "<답>"]}
    first = trained(
        chat_file, tmp_path / "first", model=str(base), modules_to_save=["embed_tokens", "lm_head"],
        **words,
    )  # fmt: skip
    again = {"model": str(base), "adapter_name_or_path": str(first.folder)}
    with pytest.raises(UserError, match=r'added_tokens: \["<call>", "<0>", .*"<답>"\]$'):
        trained(chat_file, tmp_path / "second", **again)
    on = trained(chat_file, tmp_path / "second", **again, **words, learning_rate=1e-30)
    before, after = weights(first.adapters()["default"]), weights(on.adapters()["default"])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_no_start_is_one_sentence(base: Path, rows: Path, tmp_path: Path) -> None:
    two = trained(rows, tmp_path / "two", model=str(base), lora_r=[2, 4]).folder
    dora = peft_adapter(base, tmp_path / "dora", use_dora=True)
    cut = peft_adapter(base, tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:40])
    orphan = peft_adapter(base, tmp_path / "orphan")
    config = json.loads((orphan / CONFIG).read_text())
    (orphan / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    for start, message in (
        (two, "holds several adapters"), (dora, "use_dora"), (cut, "not a whole safetensors"),
        (base, "is not an adapter"), (tmp_path / "nothing", "does not exist"),
    ):  # fmt: skip
        values = {"model": str(base), "adapter_name_or_path": str(start), "dataset": str(rows)}
        with pytest.raises(UserError, match=message) as error:
            Recipe.from_values(values)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="names no base model"):
        Recipe.from_values({"model": str(orphan), "dataset": str(rows)})
