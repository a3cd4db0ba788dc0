"""Metrics against their sources, intervals against theory, and whole evaluations."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import lighten
from lighten import data, models
from lighten.adapters import AdapterSpec, attach
from lighten.engine.loss import Objective
from lighten.engine.validation import held_out
from lighten.errors import UserError
from lighten.evaluation import metrics, run_models
from lighten.evaluation.bootstrap import Estimate, Resamples
from lighten.evaluation.chat import Conversation, chat
from lighten.evaluation.generate import generate, head_reads_whole_rows, stop_tokens
from lighten.evaluation.verdicts import verdict
from lighten.machine import hardware
from lighten.models import Base
from lighten.reporting import comparison
from lighten.runs import Run
from tests.test_train_step import row
from tests.tiny import ARCHITECTURES, VOCAB, save_tiny, tiny_model, tiny_tokenizer

ANSWERS = ["the cat sat on the mat", "a dog", "나는 학교에 간다", "one two three four five", ""]
REFERENCES = ["the cat sat on a mat", "the dog ran", "나는 학교에 갔다", "one two three four five",
              "nothing"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", lora_r=[2, 8],
        output_dir=str(tmp_path_factory.mktemp("runs") / "run"), max_steps=25, val_size=0.5,
        learning_rate=2e-2, progress=False,
    )  # fmt: skip


def test_bleu_and_chrf_from_summed_counts_are_sacrebleus_own() -> None:
    for ours, theirs in (
        (metrics.bleu(), sacrebleu.corpus_bleu), (metrics.chrf(), sacrebleu.corpus_chrf),
    ):  # fmt: skip
        counts = ours.statistics(ANSWERS, REFERENCES)
        total, part = float(ours(counts.sum(0))), float(ours(counts[:2].sum(0)))
        assert total == pytest.approx(theirs(ANSWERS, [REFERENCES]).score, rel=1e-9)
        assert part == pytest.approx(theirs(ANSWERS[:2], [REFERENCES[:2]]).score, rel=1e-9)
        assert "nrefs:1" in ours.signature


def test_exact_match_ignores_outer_space_only() -> None:
    counts = metrics.exact_match_statistics([" a ", "B", "c"], ["a", "b", "c"])
    assert float(metrics.percent(counts.sum(0))) == pytest.approx(200 / 3)


def test_trap44_perplexity_is_of_all_tokens_not_of_rows() -> None:
    counts = metrics.likelihood_statistics([1.0, 30.0], [1, 10])
    assert float(metrics.perplexity(counts.sum(0))) == pytest.approx(math.exp(31 / 11))


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    counts = np.stack([values, np.ones(400)], axis=1)
    estimate = Resamples(400, 4000, seed=3).estimate(counts, lambda s: s[..., 0] / s[..., 1])
    error = values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(error, rel=0.05)
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(10, 5, 200)
    ours = base - 0.3 + rng.normal(0, 0.1, 200)
    ones = np.ones(200)
    draws = Resamples(200, 2000)
    difference = draws.difference(
        np.stack([ours, ones], 1), np.stack([base, ones], 1), lambda s: s[..., 0] / s[..., 1]
    )
    assert (difference.low, difference.high) == pytest.approx((-0.3, -0.3), abs=0.05)
    assert verdict(difference, 200, lower_is_better=True) == "better"
    assert verdict(difference, 200, lower_is_better=False) == "worse"


def test_trap45_a_verdict_knows_its_direction_and_its_doubt() -> None:
    assert verdict(Estimate(1, 1, 0.5, 1.5), 20, lower_is_better=True) == "worse"
    assert verdict(Estimate(1, 1, 0.5, 1.5), 20, lower_is_better=False) == "better"
    assert verdict(Estimate(1, 1, -0.5, 1.5), 20, lower_is_better=False) == "no difference found"
    assert verdict(Estimate(1, 1, 0.5, 1.5), 19, lower_is_better=True) == "too few examples"
    assert {m.name for m in metrics.METRICS if m.lower_is_better} == {
        "loss",
        "perplexity",
        "general_loss",
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap17_an_answer_in_a_padded_batch_is_the_answer_alone(arch: str) -> None:
    model, tokenizer = tiny_model(arch), tiny_tokenizer()
    prompts = [row(length, 0, seed=length).input_ids for length in (3, 17, 9, 26)]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    for prompt, answer in zip(prompts, together.texts, strict=True):
        alone = generate(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)
        assert alone.texts == [answer]
    assert together.tokens <= 24


def test_the_head_reads_the_last_positions_in_one_piece() -> None:
    """Of a view into the batch PyTorch would copy the head's weight once per prompt."""
    model, pieces = tiny_model("llama"), []
    logits = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weight is model.lm_head.weight:
            pieces.append((tuple(x.shape), x.is_contiguous()))
        return logits(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        generate(model, tiny_tokenizer(), [[5, 6, 7], [8, 9]], max_new_tokens=3, batch_size=2)
    assert pieces == [((2, 1, model.config.hidden_size), True)] * 3


def test_greedy_is_greedy_whatever_came_with_the_model() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [row(9, 0, seed=i).input_ids for i in range(4)]
    plain = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=2)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=2).texts == plain.texts
    assert model.generation_config.num_beams == 3


def test_an_evaluation_falls_back_to_the_models_own_logits_too() -> None:
    model = tiny_model("gemma2")
    objective = Objective(model, attach(model, [AdapterSpec("a")]))
    objective.rule = type(objective.rule)()  # as if the soft cap were not known
    rows = [row(20, 12, seed=1)]
    ids = torch.tensor([rows[0].input_ids])
    labels = torch.where(torch.tensor([rows[0].supervised]), ids, -100)
    with torch.no_grad():
        expected = float(model(ids, labels=labels).loss)
    assert held_out(objective, rows, None, max_rows=1).loss == pytest.approx(expected, rel=1e-5)
    assert not objective.fast


def test_a_split_of_changed_data_is_refused(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data.jsonl"
    copy.write_bytes(chat_file.read_bytes())
    run = lighten.train(
        model=str(tiny_folder), dataset=str(copy), max_steps=1, progress=False,
        output_dir=str(tmp_path / "r"),
    )  # fmt: skip
    copy.write_text("".join(chat_file.read_text().splitlines(keepends=True)[10:]))
    with pytest.raises(UserError, match="has changed since the run was trained"):
        lighten.evaluate(run)


def test_a_wrong_setting_of_an_evaluation_is_told_like_any_other(run: Run) -> None:
    with pytest.raises(UserError, match=r"evaluate\.generate is not a setting; see"):
        lighten.evaluate(run, generate=3)  # learning_rate is alike, and no setting of it
    with pytest.raises(UserError, match=r"evaluate\.dataset is not a setting; set eval_dataset"):
        lighten.evaluate(run, dataset="mine.jsonl")
    with pytest.raises(UserError, match=r"evaluate\.max_exampels is not a setting; did you mean"):
        lighten.evaluate(run, max_exampels=5)
    with pytest.raises(UserError, match=r"evaluate\.max_examples: 0 does not do"):
        lighten.evaluate(run, **{"evaluate.max_examples": 0})


def test_one_metric_or_task_needs_no_brackets(run: Run) -> None:
    """`--tasks my_task`, as the documentation has it."""
    chosen = run.recipe().with_evaluate({"tasks": "my_task", "extra_metrics": "rougeL"})
    assert (chosen.tasks, chosen.extra_metrics) == (["my_task"], ["rougeL"])


def test_an_answer_ends_at_any_stop_token_and_counts_it() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = [5, 6, 7]
    free = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, 3:].tolist()
    model.generation_config.eos_token_id = [free[2]]
    assert free[2] in stop_tokens(model, tokenizer)
    answers = generate(model, tokenizer, [prompt], max_new_tokens=5, batch_size=1)
    first_stop = min(i for i, token in enumerate(free) if token in stop_tokens(model, tokenizer))
    assert answers.tokens == first_stop + 1
    assert answers.texts == [tokenizer.decode(free[:first_stop], skip_special_tokens=True)]


def test_trap43_memory_does_not_grow_with_the_evaluation_set() -> None:
    model = tiny_model("llama", vocab_size=30_000)
    objective = Objective(model, attach(model, [AdapterSpec("a")]))
    peaks = []
    for count in (8, 8, 160):  # the first one also warms the allocator up
        rows = [row(60, 50, seed=i) for i in range(count)]
        peak = hardware.PeakMemory()
        held_out(objective, rows, "a", max_rows=8)
        peaks.append(peak.read()["peak_bytes"])
    logits_of_all = 160 * 50 * 30_000 * 4
    assert peaks[2] - peaks[1] < logits_of_all / 50


def test_an_evaluation_measures_base_and_every_adapter_on_the_same_examples(run: Run) -> None:
    evaluation = lighten.evaluate(run, max_new_tokens=8)
    stored = run.evaluation()
    assert stored is not None
    assert [model["name"] for model in stored["models"]] == ["base", "r2", "r8"]
    assert evaluation.metric("r8", "loss")["value"] < evaluation.metric("base", "loss")["value"] - 1
    verdicts = {(d["adapter"], d["metric"]): d["verdict"] for d in stored["differences"]}
    assert verdicts["r8", "perplexity"] == "better"
    for model in stored["models"]:
        for figures in model["metrics"].values():
            assert figures["low"] <= figures["value"] <= figures["high"]
    assert (
        len(stored["examples"]) == stored["dataset"]["answered"] == run.info()["data"]["eval_rows"]
    )
    assert set(stored["examples"][0]["answers"]) == {"base", "r2", "r8"}
    # What training said of its last held-out loss, evaluation finds again.
    last_loss = run.info()["adapters"][1]["eval_loss"]
    assert evaluation.metric("r8", "loss")["value"] == pytest.approx(last_loss, rel=1e-5)


def test_evaluating_twice_gives_the_same_figures(run: Run) -> None:
    first = lighten.evaluate(run, max_new_tokens=4).models
    again = lighten.evaluate(run, max_new_tokens=4).models
    assert [m["metrics"] for m in first] == [m["metrics"] for m in again]


def test_a_loss_that_is_no_number_is_no_equal(run: Run, tmp_path: Path) -> None:
    broken = Run(shutil.copytree(run.folder, tmp_path / "broken"))
    path = broken.folder / "adapters" / "r8" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight * float("nan") for name, weight in weights.items()}, path)
    evaluation = lighten.evaluate(broken, max_new_tokens=2)
    verdicts = {(d["adapter"], d["metric"]): d["verdict"] for d in evaluation.differences}
    assert verdicts["r8", "loss"] == verdicts["r8", "perplexity"] == "not a number"
    assert verdicts["r2", "loss"] == "better"
    (note,) = [note for note in evaluation.dataset["notes"] if "not a number" in note]
    assert note.startswith("the loss of r8 is not a number")
    sentences = comparison.compare([broken, run]).sentences
    assert not any("Not evaluated: broken" in sentence for sentence in sentences)
    assert f"broken: {note}" in sentences


def test_nothing_to_evaluate_on_is_one_clear_sentence(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model": str(tiny_folder), "dataset": str(chat_file), "val_size": 0, "max_steps": 1,
        "output_dir": str(tmp_path / "r"), "progress": False,
    }  # fmt: skip
    run = lighten.train(**settings)
    with pytest.raises(UserError, match="has no held-out examples"):
        lighten.evaluate(run)
    for path in run.adapters().values():
        (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no trained adapter yet"):
        lighten.evaluate(run)


def test_a_test_file_is_taken_before_the_held_out_one(tiny_folder: Path, tmp_path: Path) -> None:
    for split, count in (("train", 12), ("valid", 3), ("test", 5)):
        lines = [{"prompt": f"{split} {i}", "completion": f"{i}"} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = lighten.train(
        model=str(tiny_folder), dataset=str(tmp_path), max_steps=1, progress=False,
        output_dir=str(tmp_path / "r"),
    )  # fmt: skip
    assert run.info()["data"]["eval_rows"] == 3
    evaluation = lighten.evaluate(run, max_new_tokens=2)
    assert evaluation.dataset["rows"] == 5
    assert evaluation.dataset["path"].endswith("test.jsonl")
    # And data that are named before both, whatever lies beside what was trained on.
    lines = [{"prompt": f"train {i + 9}", "completion": f"{i}"} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluation = lighten.evaluate(run, eval_dataset=str(tmp_path / "own.jsonl"), max_new_tokens=2)
    assert [model["name"] for model in evaluation.models] == ["base", "default"]
    assert evaluation.dataset["rows"] == 4
    assert evaluation.dataset["path"].endswith("own.jsonl")
    assert evaluation.dataset["shared_prompts"] == 3
    with pytest.raises(UserError, match=r"elsewhere\.jsonl"):
        lighten.evaluate(run, eval_dataset=str(tmp_path / "elsewhere.jsonl"))


def test_chat_answers_through_a_pipe_and_compares(run: Run) -> None:
    out = io.StringIO()
    typed = "What is 1 plus 1?\n\n/adapter r2\nAnd?\n/reset\n/help\n/exit\nno\n"
    chat(str(run.folder), compare=True, max_new_tokens=5, out=out, lines=io.StringIO(typed))
    output = out.getvalue()
    assert output.count("[base]") == 2
    assert output.count("[r8]") == 0  # the run's first adapter is r2
    assert output.count("[r2]") == 2
    assert "/adapter NAME" in output
    with pytest.raises(UserError, match="no adapter is called 'r9'; there are: r2, r8"):
        chat(str(run.folder), adapter="r9", lines=io.StringIO(), out=out)


def test_trap9_and_18_chat_asks_with_the_ids_that_training_saw(run: Run, tmp_path: Path) -> None:
    talk = Conversation(str(run.folder))
    question = "What is 3 plus 3? please please please "
    example = data.Example("f", 1, (data.Message("user", question), data.Message("assistant", "x")))
    prompt, _ = data.prompt_of(example, talk.base.tokenizer)
    assert talk.prompt(question)[0].tolist() == prompt
    folder = save_tiny(tmp_path / "m", template=None)
    bos = tiny_tokenizer(template="{{ bos_token }}" + data.choose_template(
        tiny_tokenizer(template=None), "chatml").text, add_bos=True)  # fmt: skip
    bos.save_pretrained(folder)
    ids = Conversation(str(folder)).prompt("hi")[0].tolist()
    assert ids.count(bos.bos_token_id) == 1


def test_chat_greedily_says_what_generate_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our engine streams what transformers does, piece by piece."""
    talk = Conversation(str(run.folder), max_new_tokens=24)
    assert talk.why_no_engine is None

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("not today")

    monkeypatch.setattr(run_models, "open_engine", refuse)
    other = Conversation(str(run.folder), max_new_tokens=24)
    assert other.why_no_engine == "not today"
    opened = run_models.Models(run, "cpu", keep=False).open(None)
    texts = []
    for name in ("r8", None):
        pieces = list(talk.answer("hello", name))
        assert pieces == list(other.answer("hello", name))
        with opened.trained.using(name):
            texts += generate(
                opened.base.model, talk.base.tokenizer, talk.prompt("hello").tolist(),
                max_new_tokens=24, batch_size=1,
            ).texts  # fmt: skip
        assert "".join(pieces) == texts[-1]
    assert texts[0] != texts[1]
    talk.close()


def test_an_adapters_folder_talks_as_it_does_in_its_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it lies there, and copied to elsewhere: there nothing tells the format it learnt in."""
    monkeypatch.setattr(hardware, "BFLOAT16", ())
    folder = run.adapters()["r8"]
    shutil.copytree(folder, tmp_path / "copied")
    of_run = Conversation(str(run.folder), max_new_tokens=24)
    for adapter in (folder, tmp_path / "copied"):
        talk = Conversation(str(adapter), max_new_tokens=24)
        assert talk.why_no_engine is None
        assert talk.resolve(None) == adapter.name
        for ours, theirs in ((adapter.name, "r8"), (None, None)):
            assert list(talk.answer("hello", ours)) == list(of_run.answer("hello", theirs))
        talk.close()
    of_run.close()


def test_chat_ends_where_the_model_does(tmp_path: Path) -> None:
    """A token that ends an answer is not shown, in our engine as in transformers."""
    folder = save_tiny(tmp_path / "model")
    base = models.load(str(folder))
    talk = Conversation(str(folder), max_new_tokens=8)
    prompt = talk.prompt("hello")[0].tolist()
    talk.close()
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer = ids[len(prompt) :]
    stop = next(place for place in range(1, 8) if answer[place] not in answer[:place])
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": answer[stop]}))
    talk, base = Conversation(str(folder), max_new_tokens=8), models.load(str(folder))
    shown = generate(base.model, base.tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    assert "".join(talk.answer("hello", None)) == shown.texts[0]
    assert shown.tokens == stop + 1
    talk.close()


@pytest.mark.parametrize(
    ("arch", "why"),
    [("falcon", "falcon's attention cannot be replaced"),
     ("doge", "this model's attention has a mask of its own")],
)  # fmt: skip
def test_a_model_that_our_engine_does_not_take_chats_in_transformers(
    arch: str, why: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / arch, arch)
    out, logged = io.StringIO(), []
    chat(str(folder), lines=io.StringIO("hello\n"), out=out, max_new_tokens=4, log=logged.append)
    assert len(out.getvalue()) > 1
    (line,) = logged
    assert line.startswith("transformers answers")
    assert why in line


def test_an_adapter_that_our_engine_does_not_take_chats_in_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    base = models.load(str(folder))
    trained = attach(base.model, [AdapterSpec("d", use_dora=True, r=2)])
    for name, content in trained.contents("d").items():
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(content)
    opened = run_models.open_model(models.load(str(folder)), {"d": tmp_path / "d"}, "chatml")
    assert opened.engine is None
    assert "use_dora" in str(opened.why_no_engine)
    with opened.trained.using("d"):
        assert opened.base.model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_the_head_reads_the_last_position_of_one_prompt_in_one_product() -> None:
    """A view whose strides are those of the prompt makes PyTorch copy the head's weight."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    products: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.bmm.default:
                products.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    ids = torch.arange(5, 15)[None]
    with torch.inference_mode(), head_reads_whole_rows(model), Products():
        model(input_ids=ids, logits_to_keep=1)
    assert not [shape for shape in products if VOCAB in shape]


def test_the_real_model_answers_and_is_scored_as_transformers_scores_it(smollm2: Base) -> None:
    model = models.load("smollm2-135m", dtype="float32").model
    tokenizer = smollm2.tokenizer
    example = data.Example(
        "f", 1,
        (data.Message("user", "What is the capital of France?"),
         data.Message("assistant", "The capital of France is Paris.")),
    )  # fmt: skip
    encoded = data.encode([example], tokenizer, max_length=200).rows[0]
    cohort = attach(model, [AdapterSpec("a")])
    measured = held_out(Objective(model, cohort), [encoded], None, max_rows=1)
    ids = torch.tensor([encoded.input_ids])
    labels = torch.where(torch.tensor([encoded.supervised]), ids, -100)
    with torch.no_grad():
        # float32 logits of about 20 carry some 2e-6 of rounding each.
        assert measured.loss == pytest.approx(float(model(ids, labels=labels).loss), abs=1e-5)
    prompt, _ = data.prompt_of(example, tokenizer)
    answers = generate(model, tokenizer, [prompt], max_new_tokens=12, batch_size=1)
    assert "Paris" in answers.texts[0]
