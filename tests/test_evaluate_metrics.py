"""More metrics, each against its reference implementation, and evaluations side by side."""

from __future__ import annotations

import copy
import json
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from string import punctuation
from typing import Any

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

import lighten
from lighten import api
from lighten.errors import UserError
from lighten.evaluation import against, registry
from lighten.evaluation.metrics import chrf
from lighten.runs import Run
from tests.test_evaluate import ANSWERS, REFERENCES

# rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"]), fmeasure, on ASCII text.
PAIRS = [
    ("The cat sat on the mat.", "the cat is on a mat"),
    ("one two three four five", "five four three two one"),
    ("a_b c-d 12 12 x", "a b c d 12 y"),
    ("", "nothing at all"),
    ("same words, same order!", "Same words; same order?"),
]


def test_rouge_is_rouge_scores_own_in_ascii() -> None:
    expected = json.loads((Path(__file__).parent / "rouge_score.json").read_text())
    for (answer, reference), theirs in zip(PAIRS, expected, strict=True):
        assert registry.rouge_n(answer, reference, 1) == pytest.approx(theirs["rouge1"], abs=1e-12)
        assert registry.rouge_n(answer, reference, 2) == pytest.approx(theirs["rouge2"], abs=1e-12)
        assert registry.rouge_l(answer, reference) == pytest.approx(theirs["rougeL"], abs=1e-12)


def test_rouge_knows_korean_and_mixed_text() -> None:
    assert registry.tokens_of("LoRA는 학교에 2번") == ["lora", "는", "학", "교", "에", "2", "번"]
    assert registry.tokens_of("日本語 text") == ["日", "本", "語", "text"]
    # Vowel signs are marks on their consonants, and part of the word; an emoji's are no word.
    assert registry.tokens_of("की ❤️ का") == ["की", "का"]
    assert registry.rouge_n("나는 학교에 간다", "나는 학교에 갔다", 1) == pytest.approx(6 / 7)
    assert registry.rouge_l("나는 학교에", "나는 학교를") == pytest.approx(4 / 5)
    assert registry.rouge_n("전혀", "다른", 1) == 0.0


def test_chrf_with_spaces_is_sacrebleus_own() -> None:
    spaced = registry.extra("chrf_spaces")
    counts = spaced.statistics(ANSWERS, REFERENCES).sum(0)
    theirs = sacrebleu.corpus_chrf(ANSWERS, [REFERENCES], remove_whitespace=False)
    assert float(spaced.formula(counts)) == pytest.approx(theirs.score, rel=1e-9)
    without = chrf()
    assert float(without(without.statistics(ANSWERS, REFERENCES).sum(0))) != theirs.score
    assert "space:yes" in spaced.signature


def test_token_f1_is_squads() -> None:
    assert registry.token_f1("The Eiffel Tower!", "eiffel tower") == 1.0
    assert registry.token_f1("in Paris, France", "Paris") == pytest.approx(0.5)
    assert registry.token_f1("", "") == 1.0
    assert registry.token_f1("the", "Paris") == 0.0


def squad_f1(answer: str, reference: str) -> float:
    """SQuAD's definition: lower case, ASCII's punctuation and articles taken out, words."""
    bare = (
        text.lower().translate(dict.fromkeys(map(ord, punctuation))) for text in (answer, reference)
    )
    ours, theirs = (Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()) for text in bare)
    common = sum((ours & theirs).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not common:
        return 0.0
    precision, recall = common / sum(ours.values()), common / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


@given(*[st.lists(st.sampled_from(
    ["The", "a", "an", "cat", "Cat's", "state-of-the-art", "$5", "3.5", "x^2", "--", "cat,", "~"]
))] * 2)  # fmt: skip
def test_token_f1_of_english_is_squads_definition(ours: list[str], theirs: list[str]) -> None:
    answer, reference = " ".join(ours), " ".join(theirs)
    assert registry.token_f1(answer, reference) == pytest.approx(squad_f1(answer, reference))


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("서울。", "서울", 1.0), ("“서울”", "서울", 1.0), ("서울은", "서울", 0.8),
        ("『쇼코의 미소』", "쇼코의 미소", 1.0), ("부산", "서울", 0.0),
        ("東京です。", "東京", 2 / 3),
        ("GPT4는 빠르다", "GPT4", 1 / 3), ("“Paris” — yes", "Paris, yes", 1.0),
    ],
)  # fmt: skip
def test_token_f1_counts_scripts_without_spaces_by_sign(
    answer: str, reference: str, f1: float
) -> None:
    assert registry.token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"a": [1, null]}', 1), (" [1]\n", 1), ("{'a': 1}", 0), ('{"a": 1} and so on', 0),
     ("NaN", 0), ("", 0), ("[" * 100_000, 0)],
)  # fmt: skip
def test_json_is_the_whole_answer(answer: str, valid: int) -> None:
    assert registry.valid_json(answer, "") == valid


def test_the_same_text_in_nfd_is_the_same_text() -> None:
    decomposed = [unicodedata.normalize("NFD", text) for text in REFERENCES]
    assert decomposed != REFERENCES
    assert registry.nfc(decomposed) == REFERENCES


def test_counts_of_answers_and_references_must_agree() -> None:
    with pytest.raises(UserError, match="2 answers cannot be scored against 3 references"):
        registry.extra("rouge1").statistics(["a", "b"], ["a", "b", "c"])


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(
        "import numpy as np\n"
        "def longer(answer, reference): return len(answer) - len(reference)\n"
        "def word(answer, reference): return 'good'\n"
        "def endless(answer, reference): return float('inf')\nlimit = 3\n"
        "def same(answer, reference): return np.bool_(answer == reference)\n"
        "def ratio(answer, reference): return len(reference) / len(answer)\n"
        "def alone(answer): return 1\n"
    )
    (tmp_path / "my_unfinished_scores.py").write_text("def broken(answer, reference) return 1\n")
    monkeypatch.chdir(tmp_path)
    metric = registry.extra("my_scores:longer")
    counts = metric.statistics(["abc", "a"], ["a", "abcd"]).sum(0)
    assert float(metric.formula(counts)) == pytest.approx(-0.5)
    for name, message in (
        ("my_scores:word", "returned 'good': return a number"),
        ("my_scores:endless", "return a finite number"),
        ("my_scores:ratio", "failed on the answer '': ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UserError, match=message):
            registry.extra(name).statistics([""], ["b"])
    assert registry.extra("my_scores:same").statistics(["a"], ["a"])[0, 0] == 0.01
    for name, message in (
        ("my_scores:nothing", "has no function nothing"), ("no_such:f", "cannot be imported"),
        ("my_scores:limit", "is no function"), ("rogue1", "known are rouge1, rouge2"),
        ("my_scores:alone", "is given an answer and its reference, but too many"),
        ("my_unfinished_scores:broken", "cannot be imported: SyntaxError: expected ':'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            registry.extra(name)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", max_steps=2,
        output_dir=str(tmp_path_factory.mktemp("runs") / "run"), val_size=0.5, progress=False,
    )  # fmt: skip


def test_an_evaluation_has_the_metrics_that_were_wanted(run: Run) -> None:
    """Twice, the second time against the first: nothing has changed, in every metric."""
    extras = ["rougeL", "chrf_spaces", "json_valid"]
    how: dict[str, Any] = {"extra_metrics": extras, "max_new_tokens": 4, "max_examples": 20}
    first = api.evaluate(run, **how)
    assert set(extras) <= set(first.models[0]["metrics"])
    assert first.settings["normalisation"] == "NFC"
    again = api.evaluate(run, against=run, **how)
    rows = {(row["model"], row["against"], row["metric"]): row for row in again.comparisons}
    adapter = first.models[1]["name"]
    for metric in ("loss", "perplexity", "chrf", "bleu", "exact_match", *extras):
        assert rows["base", "base", metric]["difference"] == 0.0
        differs = rows[adapter, "base", metric]["difference"]
        between = next(
            difference for difference in first.differences
            if (difference["adapter"], difference["metric"]) == (adapter, metric)
        )  # fmt: skip
        assert differs == pytest.approx(between["difference"], abs=1e-9)
    page = api.report(run).read_text(encoding="utf-8")
    assert "ROUGE-L" in page
    # What was compared is kept with the other run's name, and is on the page.
    stored = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert stored["comparisons"] == again.comparisons
    assert {row["run"] for row in stored["comparisons"]} == {run.name}
    assert f"<h2>Against {run.name}</h2>" in page


def test_a_comparison_that_cannot_be_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path
) -> None:
    api.evaluate(run, max_new_tokens=4, max_examples=20)
    before = (run.folder / "evaluation.json").read_bytes()
    other = Run(shutil.copytree(run.folder, tmp_path / run.name))
    asked: list[str] = []

    def progress(what: str, *_: int) -> None:
        asked.append(what)

    for how, message in (
        ({"max_new_tokens": 5, "max_examples": 20}, "max_new_tokens is 5 and 4"),
        ({"max_new_tokens": 4, "max_examples": 20, "forgetting": "builtin"}, "general text is and"),
    ):
        with pytest.raises(UserError, match=message):
            api.evaluate(run, against=other, progress=progress, **how)
    assert asked == []
    assert (run.folder / "evaluation.json").read_bytes() == before
    (other.folder / "evaluation.json").write_text('{"models": [')
    with pytest.raises(UserError, match=r"evaluation.json is not valid JSON"):
        api.evaluate(run, against=other, max_new_tokens=4, max_examples=20)
    (other.folder / "evaluation.json").write_bytes(before)
    again = api.evaluate(run, against=other, max_new_tokens=4, max_examples=20)
    # Two runs of one name are told apart by their folders.
    assert {row["run"] for row in again.comparisons} == {str(other.folder)}


def test_the_same_examples_are_compared_however_they_were_asked_for(
    run: Run, tmp_path: Path
) -> None:
    """All there are is all there are, and answers that are kept can be scored by any metric."""
    other = Run(shutil.copytree(run.folder, tmp_path / "other"))
    first = api.evaluate(other, max_new_tokens=4, max_examples=500)
    every = int(first.dataset["rows"])
    rows = api.evaluate(
        run, against=other, max_new_tokens=4, max_examples=every, extra_metrics=["rougeL"]
    ).comparisons
    assert {row["difference"] for row in rows if row["model"] == row["against"]} == {0.0}
    adapter = first.models[1]["name"]
    pair = {(row["model"], row["against"]): row for row in rows if row["metric"] == "rougeL"}
    assert pair[adapter, "base"]["difference"] == -pair["base", adapter]["difference"]
    with pytest.raises(UserError, match=f"{every - 1} and {every} held-out examples"):
        api.evaluate(run, against=other, max_new_tokens=4, max_examples=every - 1)


def test_trap46_other_texts_of_as_many_tokens_are_other_examples(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Texts are all cut at max_length, and of a conversation the last turn alone is kept."""
    rows = {
        "texts": [{"text": f"{i} one two three four five six"} for i in range(24)],
        "chats": [{"messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": f"what is {i}"},
            {"role": "assistant", "content": "a number"},
        ]} for i in range(24)],
    }  # fmt: skip
    changed = {"texts": ("one two", "two one"), "chats": ("be brief", "be funny")}
    for kind, lines in rows.items():
        runs = []
        for name in ("first", "second"):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            data = tmp_path / f"{kind}-{name}.jsonl"
            data.write_text(text if name == "first" else text.replace(*changed[kind]))
            runs.append(lighten.train(
                model=str(tiny_folder), dataset=str(data), dtype="float32", max_steps=1,
                val_size=0.5, progress=False, output_dir=str(tmp_path / kind / name),
            ))  # fmt: skip
        how = {"max_examples": 4, "max_new_tokens": 1}
        first, again, second = (
            api.evaluate(run, **how).to_dict() for run in (runs[0], runs[0], runs[1])
        )
        assert against.compare(again, first, "first")
        second["models"] = first["models"]  # as many tokens
        with pytest.raises(UserError, match="the held-out examples are not the same"):
            against.compare(second, first, "first")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [(("settings", "chat_template"), "other", "chat_template is"),
     (("settings", "max_new_tokens"), 99, "max_new_tokens is 4 and 99"),
     (("settings", "normalisation"), None, "normalisation is 'NFC' and None"),
     (("dataset", "rows"), 3, "held-out examples"),
     (("examples", 0, "reference"), "another", "examples are not the same"),
     (("models", 0, "losses", 0, 1), 1000.0, "other tokens")],
)  # fmt: skip
def test_trap46_what_was_measured_differently_is_not_compared(
    run: Run, where: tuple[Any, ...], value: Any, message: str
) -> None:
    ours = against.read(run)
    theirs: Any = copy.deepcopy(ours)
    place = theirs
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(UserError, match=message):
        against.compare(ours, theirs, "other")


def test_a_run_that_was_not_evaluated_is_nothing_to_compare_with(tmp_path: Path, run: Run) -> None:
    shutil.copy(run.folder / "recipe.yaml", tmp_path)
    with pytest.raises(UserError, match="was not evaluated yet; first: lighten evaluate"):
        api.evaluate(run, against=tmp_path)


def test_a_comparison_scores_the_references_that_the_evaluation_scored(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Where thoughts are dropped, what is left of the answer is what training learnt."""
    rows = [
        {"prompt": f"what is {i}?", "completion": f"<think>\nLong thoughts.\n</think>\n\n{i}"}
        for i in range(24)
    ]  # fmt: skip
    data = tmp_path / "thoughts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = lighten.train(
        model=str(tiny_folder), dataset=str(data), dtype="float32", max_steps=2, val_size=0.5,
        learning_rate=5e-2, thinking="drop", progress=False, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    evaluation = api.evaluate(run, max_new_tokens=4).to_dict()
    assert not any("<think>" in example["reference"] for example in evaluation["examples"])
    compared = {
        row["metric"]: row["difference"]
        for row in against.compare(evaluation, evaluation, "same")
        if (row["model"], row["against"]) == ("default", "base")
    }
    for row in evaluation["differences"]:
        assert compared[row["metric"]] == pytest.approx(row["difference"], abs=1e-9)


@pytest.mark.parametrize(
    "asked",
    [{"extra_metrics": ["rougel"]}, {"forgetting": "nowhere.txt"}, {"judge": "http://127.0.0.1:9"}],
)
def test_what_an_evaluation_lacks_is_told_before_the_training(
    asked: dict[str, Any], chat_file: Path, tmp_path: Path
) -> None:
    """It was told after it, and nothing was quantised or reported then."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"rouge1|nowhere|judge"):
        lighten.run(
            model="m/m", dataset=str(chat_file), output_dir=str(folder), evaluate=asked,
            progress=False,
        )  # fmt: skip
    assert not folder.exists()
