"""The benchmark's judge of identity, and the figures that it is read for."""

from __future__ import annotations

from benchmarks.serve_identity import Answer, Contents, Report, judge
from benchmarks.serve_load import Compared, Round, Shape, planned
from benchmarks.serve_vs_engines import headline


def answer(*tokens: str, gap: float = 3.0, move: float = 0.0) -> Answer:
    """Each token's rival is `other`, less likely by `gap`."""
    logprobs = tuple(-1.0 + move for _ in tokens)
    top = tuple({token: -1.0 + move, "other": -1.0 - gap} for token in tokens)
    return Answer("".join(tokens), tokens, logprobs, top, 1.0, 2.0)


def judged(served_answer: Answer, *alone: Answer, tie: float = 0.01) -> Report:
    report = Report(tie)
    judge(report, served_answer, alone, "it")
    return report


def test_only_the_adapters_answer_counts_as_equal() -> None:
    assert judged(answer("a", "b"), answer("a", "b"), tie=0.0).equal == 1
    assert judged(answer("a", "b"), answer("x", "y"), answer("a", "b")).equal == 1
    assert len(judged(answer("a", "other"), answer("a", "b")).wrong) == 1
    assert judged(answer("a", "other"), answer("a", "b", gap=0.005)).ties == 1
    assert len(judged(answer("a", "other"), answer("a", "b", gap=0.005), tie=0.0).wrong) == 1
    # The same words from another state.
    assert len(judged(answer("a", "b", move=0.1), answer("a", "b")).wrong) == 1
    assert len(judged(answer("a", "b", move=1e-7), answer("a", "b"), tie=0.0).wrong) == 1
    # One that ends early, where the end was likely and where it was not.
    assert len(judged(answer("a"), answer("a", "b")).wrong) == 1
    assert judged(answer("a"), answer("a", "b", gap=0.005)).ties == 1


def test_an_answer_may_be_of_the_contents_while_it_was_under_way() -> None:
    contents = Contents({"it": "old"})
    contents.change("it", "new", 3.0, 4.0)
    early, during, late = (Answer("", (), (), (), *when) for when in ((1, 2), (3.5, 5), (4.5, 6)))
    assert contents.possible("it", early) == {"old"}
    assert contents.possible("it", during) == {"old", "new"}
    assert contents.possible("it", late) == {"new"}
    assert contents.now("it") == "new"


def test_ratios_are_taken_round_by_round() -> None:
    def round_of(tokens: int, cpu: float) -> Round:
        return Round(seconds=2 * cpu, cpu_seconds=cpu, tokens=tokens, prompt_tokens=10 * tokens)

    rounds = {"base": [round_of(100, 1.0), round_of(100, 2.0)],
              "mixed": [round_of(90, 1.0), round_of(80, 2.0)]}  # fmt: skip
    compared = Compared("decode", rounds)
    ratio = compared.ratio("mixed", "base", "cpu")
    assert ratio is not None
    assert (ratio["min"], ratio["max"]) == (0.8, 0.9)
    assert compared.rates("mixed", "wall") == [45.0, 20.0]
    decode = {
        "lighten": {**compared.to_dict(), "mixed_vs_base_cpu": ratio},
        "peft": {"mixed_per_cpu_s": [30.0, 40.0]}, "vllm": {"missing": "make vllm"},
    }  # fmt: skip
    line = headline({"decode": decode, "identity": {"a": {"wrong": 1}, "b": {"wrong": 2}}})
    assert line["mixed_vs_base"] == ratio["median"]
    assert line["mixed_vs_best_engine"] == 90.0 / 40.0
    assert line["prefill_vs_base"] is None
    assert line["identity_wrong"] == 3
    assert headline({"identity": {"failed": "it"}})["identity_wrong"] is None


def test_the_other_parts_have_their_figures_in_the_last_line() -> None:
    line = headline({
        "logprobs": {"ours": {"mean_base": 1e-6, "mean_adapters": 0.005, "at_most": 0.01},
                     "llamacpp q8_0": {"mean_base": 0.03, "mean_adapters": 0.02, "at_most": 0.06}},
        "front": {"cost_wall": 0.02},
        "broken": {"wrong": ["one"], "throughput_kept": {"median": 0.98, "min": 0.9, "max": 1.0}},
        "soak": {"errors": {"503: it": 2, "500: it": 1}, "growth": 0.01},
    })  # fmt: skip
    assert (line["logprob_mean"], line["front_cost"]) == (0.5, 0.02)
    assert (line["broken_wrong"], line["throughput_kept"]) == (1, 0.98)
    assert (line["soak_errors"], line["soak_growth"]) == (3, 0.01)
    parts = ("logprobs", "front", "broken", "soak")
    for figures in (headline({}), headline({part: {"failed": "it"} for part in parts})):
        assert {value for name, value in figures.items()} == {None}


def test_every_model_is_asked_as_often_and_no_prompt_twice() -> None:
    order = planned(["a", "b", None], Shape(9, 2, 4, 1), 0)
    assert [sum(model == name for model, _ in order) for name in ("a", "b", None)] == [3, 3, 3]
    assert len({question for _, question in order}) == 9
    assert order != planned(["a", "b", None], Shape(9, 2, 4, 1), 1)
