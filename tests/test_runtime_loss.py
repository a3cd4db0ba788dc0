"""Whether a runtime loses more than its rounding, told from chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from typer.testing import CliRunner

from lighten.data import FEWEST
from lighten.quantization.gguf_source import Array
from lighten.quantization.runtime_loss import HALF_WIDTH, RuntimeLoss, runtime_loss
from lighten.quantization.verify import Receipt

WORDS, TOKENS = 12, 30


class Drawn:
    """Probabilities that are a fixed model's with noise of its own on each text.

    Args:
        noise: Standard deviation of scores' noise; a text has up to twice it, or next to none.
        seed: Of it: another one is another right computation of the same rounding.
    """

    def __init__(self, noise: float, seed: int) -> None:
        self.noise, self.seed, self.read = noise, seed, 0

    def tokenise(self, text: str) -> list[int]:
        return [int(text)] * TOKENS

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        self.read += 1
        scores = np.random.default_rng(tokens[0]).normal(size=(len(tokens), WORDS))
        hard = 2 * np.random.default_rng(tokens[0]).uniform()
        own = np.random.default_rng((self.seed, tokens[0])).normal(size=scores.shape)
        scores = scores + self.noise * hard * own
        log_probs: Array = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return log_probs

    def greedy(self, tokens: Sequence[int], most: int) -> list[int]:
        raise AssertionError("nothing is answered here")


def told(noise: float, seed: int, texts: int = 400, first: int = 0) -> RuntimeLoss:
    """Of a runtime with some noise, beside a rounding with noise 0.5."""
    numbers = [str(first + number) for number in range(texts)]
    return runtime_loss(Drawn(0, 0), Drawn(0.5, 1), Drawn(noise, seed), numbers, TOKENS)


def test_the_same_rounding_never_fails_and_half_more_never_passes() -> None:
    """A loss goes by the noise's square: 0.5 is the rounding's own, 0.6124 half more than it."""
    for seed in range(2, 10):
        assert told(0.5, seed, first=1000 * seed).within is True
        assert told(0.5 * 1.5**0.5, seed, first=1000 * seed).within is False


def test_it_reads_until_the_interval_is_narrow_and_no_further() -> None:
    same = told(0.5, 2)
    assert same.low is not None
    assert same.high is not None
    assert max(same.high - same.more, same.more - same.low) <= HALF_WIDTH
    assert FEWEST <= same.texts < 400
    assert same.tokens == TOKENS * same.texts
    assert told(0.5, 2, texts=same.texts + 5) == same
    fewer = told(0.5, 2, texts=same.texts - 4)  # the look before, or none of so few
    assert fewer.low is not None
    assert fewer.high is not None
    wide = max(fewer.high - fewer.more, fewer.more - fewer.low)
    assert wide > HALF_WIDTH or fewer.texts < FEWEST


def test_a_pair_that_is_one_is_exact() -> None:
    """Paired on tokens: where runtime and reference are the same there is no chance in it."""
    exact = told(0.5, 1)
    assert exact.texts == FEWEST
    assert exact.between_kl == 0
    assert exact.more == pytest.approx(0, abs=0.002)  # but for what float32 may be away
    assert exact.low == pytest.approx(exact.more, abs=0.002)


def test_what_cannot_be_told_is_said_so() -> None:
    """At the bar itself, and of few texts: the interval lies across it, or is none."""
    at_the_bar = told(0.5 * 1.25**0.5, 3)
    assert at_the_bar.within is None
    assert "cannot be told" in at_the_bar.sentence()
    assert f"{100 * at_the_bar.more:.0f} % more" in at_the_bar.sentence()
    assert told(0.5 * 3**0.5, 3, texts=FEWEST - 1).within is None
    assert told(0.5, 3, texts=1).within is None
    assert "95 %" not in told(0.5, 3, texts=1).sentence()


def test_reading_ends_with_its_time() -> None:
    program = Drawn(0.5, 2)
    texts = [str(number) for number in range(400)]
    added = runtime_loss(Drawn(0, 0), Drawn(0.5, 1), program, texts, TOKENS, most_seconds=0)
    assert added.texts == program.read == FEWEST


def receipt(runtime: RuntimeLoss | None, mean_kl: float = 0.1) -> Receipt:
    return Receipt("a.pte", "executorch", "run", 8, 498, 0, 1.0, mean_kl, 0.25, 0.9, 8, 0, 8,
                   runtime=runtime)  # fmt: skip


def test_a_receipt_passes_fails_or_cannot_tell() -> None:
    """What a format may lose is a bar of its own, whatever the runtime adds."""
    same, much, unknown = told(0.5, 2), told(0.9, 2), told(0.5, 2, texts=3)
    assert [receipt(loss).passed for loss in (same, much, unknown, None)] == [
        True, False, None, True,
    ]  # fmt: skip
    assert [receipt(loss, 0.26).passed for loss in (same, much, unknown, None)] == [False] * 4
    assert dataclasses.replace(receipt(same), other_tokens=1).passed is False
    stored = receipt(unknown).to_dict()
    assert stored["passed"] is None
    assert stored["runtime"]["texts"] == 3
    assert same.sentence() in receipt(same).sentence()


class Broken(Drawn):
    """A runtime whose numbers overflowed, on one text."""

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        log_probs = super().log_probabilities(tokens)
        return np.full_like(log_probs, np.nan) if tokens[0] == 3 else log_probs


def test_what_answers_with_no_numbers_never_passes() -> None:
    """llama.cpp rounds activations to float16 for weights in it: large ones become infinite."""
    numbers = [str(number) for number in range(400)]
    broken = runtime_loss(Drawn(0, 0), Drawn(0.5, 1), Broken(0.5, 2), numbers, TOKENS)
    assert broken.within is False
    assert receipt(broken).passed is False
    assert receipt(None, float("nan")).passed is False
    assert receipt(told(0.5, 2), float("nan")).passed is False


@pytest.mark.parametrize(("noise", "texts", "code"), [(0.5, 400, 0), (0.9, 400, 1), (0.5, 3, 2)])
def test_each_verdict_has_its_exit_code(
    noise: float, texts: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten import api
    from lighten.cli.main import app

    monkeypatch.setattr(api, "verify", lambda *_, **__: receipt(told(noise, 2, texts=texts)))
    result = CliRunner().invoke(app, ["verify", "a.pte", "--against", "run"])
    assert result.exit_code == code
    assert ("cannot be told" in result.output.replace("\n", " ")) == (code == 2)
