"""The receipt: whether an artefact still answers as what it was made from.

Both are given the same prompts, one after another and never in a batch: first the texts must be the
same tokens in both, then the probabilities of every next token are compared, then greedy answers,
token by token.

Dimensions: T tokens of a prompt, V words.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lighten.errors import UserError
from lighten.peft_config import WEIGHTS, tensor_shapes
from lighten.quantization.gguf_source import Array
from lighten.quantization.questions import LONGEST_ANSWER, Questions
from lighten.quantization.rounding import Rounding
from lighten.quantization.runtime_loss import RuntimeLoss
from lighten.runs import write_json
from lighten.wording import first_line

RECEIPT = "receipt.json"
LONGEST, ANSWER = 256, 24
# A next token whose probability is so near (in nats) to the likeliest's is a tie that rounding
# breaks either way.
NEAR = 0.05
# Mean KL divergence (nats a token) that each kind of artefact may be away. The numbers are of what
# its format rounds away on models of 0.1 to 8 billion parameters, doubled.
ALLOWED = {
    "adapter": 1e-6, "float32": 1e-5, "float16": 1e-3, "bfloat16": 0.02, "f32": 1e-4,
    "f16": 1e-3, "bf16": 0.02, "q8_0": 0.02, "q6_k": 0.04, "q5": 0.08, "q4": 0.25, "int8": 0.05,
    "nf4": 0.25, "int4": 0.25, "executorch": 0.25,
}  # fmt: skip
OTHERWISE = 0.5


class Answering(Protocol):
    """Something that continues texts."""

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        """Of the next token after every token, [T, V], natural logarithms."""

    def greedy(self, tokens: Sequence[int], most: int) -> list[int]:
        """What follows when the likeliest token is taken each time."""


@dataclass(frozen=True)
class Receipt:
    """How far an artefact's answers are from its source's.

    Attributes:
        artefact: Name of what was compared.
        kind: Its format: what `ALLOWED` names.
        against: What it was compared with.
        prompts: How many.
        tokens: Of all prompts.
        other_tokens: Prompts that are other tokens in the artefact: nothing else of them counts.
        largest_difference: Of any log-probability among the source's likeliest 50 of a token.
        mean_kl: Mean KL divergence from the source, nats a token.
        allowed_kl: What its kind may be away.
        same_likeliest: Share of tokens after which both find the same next one likeliest.
        same_answers: Prompts with the same greedy answer.
        ties: Answers that differ first at a near tie.
        answers: Prompts answered.
        runtime: Where the same rounding was computed in PyTorch too: what its runtime adds.
        metrics: Of the answers against the right ones, where those are known: by name the `label`,
            and the values `before` and `after`. They are told and not judged by: so few questions
            cannot tell a small loss from chance.
    """

    artefact: str
    kind: str
    against: str
    prompts: int
    tokens: int
    other_tokens: int
    largest_difference: float
    mean_kl: float
    allowed_kl: float
    same_likeliest: float
    same_answers: int
    ties: int
    answers: int
    runtime: RuntimeLoss | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether it answers as its kind may; None: that cannot be told."""
        # Not the other way round: what is no number is not within it either.
        if self.other_tokens or not self.mean_kl <= self.allowed_kl:
            return False
        return True if self.runtime is None else self.runtime.within

    def to_dict(self) -> dict[str, Any]:
        """For `receipt.json`."""
        return {**asdict(self), "passed": self.passed}

    def sentence(self) -> str:
        """In words."""
        if self.other_tokens:
            return (
                f"{self.artefact}: {self.other_tokens} of {self.prompts} prompts are other tokens "
                "than in training; it will not answer as it learnt"
            )
        ties = f" (and {self.ties} that differ at a near tie)" if self.ties else ""
        return (
            f"{self.artefact}: mean KL {self.mean_kl:.2g} nats a token (allowed "
            f"{self.allowed_kl:g}), the same likeliest token after "
            f"{100 * self.same_likeliest:.1f} % of {self.tokens}, "
            f"{self.same_answers} of {self.answers} greedy answers the same{ties}"
            f"{'' if self.runtime is None else f'; {self.runtime.sentence()}'}{self._task()}"
        )

    def _task(self) -> str:
        texts = (
            f"{metric['label']} {metric['after']:.1f} ({metric['before']:.1f} before)"
            for metric in self.metrics.values()
        )
        return "".join(f"; {text}" for text in texts)


class InTransformers:
    """A model folder or a base with an adapter, in transformers and PEFT, in float32.

    The model is loaded when it is first used, and again after `release`.

    Args:
        folder: Of the model.
        adapter: Folder of an adapter on it.
        tokenizer: Folder of the tokenizer; the model's when None.
        rounding: What its weights became in training; None: they stay as they are.
        words: Rows that its vocabulary has at least, where tokens were added.
    """

    def __init__(
        self, folder: Path, adapter: Path | None = None, tokenizer: Path | None = None,
        rounding: Rounding | None = None, words: int = 0,
    ) -> None:  # fmt: skip
        import torch
        from transformers import AutoTokenizer

        self._torch, self._loaded = torch, None
        self._parts = (folder, adapter, rounding, words)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                tokenizer or folder, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{adapter or folder} cannot be loaded: {first_line(error)}") from error

    @property
    def model(self) -> Any:
        """The model."""
        if self._loaded is None:
            self._loaded = self._load(*self._parts)
        return self._loaded

    @model.setter
    def model(self, model: Any) -> None:
        self._loaded = model

    def release(self) -> None:
        """Give the model's memory back."""
        from lighten.machine import heap

        self._loaded = None
        gc.collect()
        heap.trim()

    def _load(
        self, folder: Path, adapter: Path | None, rounding: Rounding | None, words: int
    ) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from lighten.adapters.files import word_rows
        from lighten.models.stored import (
            bring_into_format,
            keep_float32,
            on_processor,
            stored_as,
        )
        from lighten.models.vocabulary import grow
        from lighten.quantization.dense import dense_base, untie

        try:
            model: Any
            stored = (stored_as(folder) or {}).get("quant_method")
            if adapter is not None and stored == "bitsandbytes":
                # As it learnt: bitsandbytes' own products are in 16 bits.
                model = dense_base(folder)
            else:
                keep_float32(folder)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, **on_processor(folder)
                )
                bring_into_format(model, folder, torch.float32)
            if adapter is not None:
                words = max(words, word_rows(model, tensor_shapes(adapter / WEIGHTS)))
            grow(model, words)
            if rounding is not None:
                rounding.apply(model)
            if adapter is not None:
                from peft import PeftModel

                untie(model, adapter)
                model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{adapter or folder} cannot be loaded: {first_line(error)}") from error
        return model.eval()

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        """Of the next token after every token, [T, V]."""
        with self._torch.inference_mode():
            logits = self.model(input_ids=self._torch.tensor([list(tokens)])).logits[0]
            log_probs: Array = logits.float().log_softmax(-1).numpy()
        return log_probs

    def greedy(self, tokens: Sequence[int], most: int) -> list[int]:
        """The likeliest continuation, token by token."""
        from transformers import GenerationConfig

        from lighten.evaluation.generate import settings_alone

        bare = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        ids = self._torch.tensor([list(tokens)])
        with self._torch.inference_mode(), settings_alone(bare):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=most, pad_token_id=0
                ),
            )
        answer: list[int] = out[0, len(tokens) :].tolist()
        return answer


@contextmanager
def in_llamacpp(model: Path, adapter: Path | None = None) -> Iterator[Answering]:
    """A GGUF file, with a GGUF adapter on it, in llama.cpp with float32 keys and values."""
    import torch

    from lighten.quantization.llamacpp import Runtime

    class Bare(Runtime):
        def greedy(self, tokens: Sequence[int], most: int, *, stop: bool = False) -> list[int]:
            return super().greedy(tokens, most, stop=stop)

    adapters = {adapter: 1.0} if adapter else None
    threads = torch.get_num_threads()
    room = LONGEST + LONGEST_ANSWER
    with Bare(model, adapters, context_tokens=room, threads=threads) as opened:
        yield opened


def compare(
    source: Answering,
    other: Answering,
    questions: Questions,
    *,
    artefact: str,
    kind: str,
    against: str,
    context_tokens: int | None = None,
) -> Receipt:
    """The receipt of an artefact.

    The artefact answers everything first and is let go of: one model at a time is in memory.

    Args:
        source: What it was made from.
        other: The artefact.
        questions: What both are asked.
        artefact: Its name.
        kind: Its format.
        against: Name of the source.
        context_tokens: Prompt and answer together, where the artefact takes no more.

    Raises:
        UserError: A runtime fails, or a metric of the user's does.
    """
    most = ANSWER if context_tokens is None else min(ANSWER, context_tokens // 2)
    longest = LONGEST if context_tokens is None else min(LONGEST, context_tokens - most)
    scored = _Scored(questions, context_tokens)
    tokens = same_likeliest = same_answers = ties = answers = 0
    largest = divergence = 0.0
    alike: list[tuple[int, list[int]]] = []
    for number, prompt in enumerate(questions.prompts):
        ids = source.tokenise(prompt)[-longest:]
        if other.tokenise(prompt)[-longest:] == ids:
            alike.append((number, ids))
    probabilities = [other.log_probabilities(ids) for _, ids in alike]
    other_answers = [other.greedy(ids, most) for _, ids in alike]
    whole_answers = [
        scored.whole(ids, other, answer)
        for (_, ids), answer in zip(alike, other_answers, strict=True)
    ]
    if isinstance(other, InTransformers):
        other.release()
    for (number, ids), other_answer, whole in zip(alike, other_answers, whole_answers, strict=True):
        p, q = source.log_probabilities(ids), probabilities[answers]
        words = min(p.shape[1], q.shape[1])  # one of them may be padded
        p, q = p[:, :words], q[:, :words]
        likely = np.argpartition(-p, min(50, words - 1), axis=1)[:, :50]
        between = np.abs(np.take_along_axis(p, likely, 1) - np.take_along_axis(q, likely, 1))
        largest = max(largest, float(between.max()))
        divergence += float((np.exp(p) * (p - q)).sum())
        same_likeliest += int((p.argmax(1) == q.argmax(1)).sum())
        tokens += len(ids)
        source_answer = beside(source, ids, most, other_answer)
        rest = whole[len(other_answer) :] if source_answer == other_answer else []
        scored.add(number, scored.whole(ids, source, source_answer, rest), whole)
        answers += 1
        if source_answer == other_answer:
            same_answers += 1
        else:
            ties += _at_a_tie(source, ids, source_answer, other_answer)
    return Receipt(
        artefact, kind, against, len(questions.prompts), tokens,
        len(questions.prompts) - len(alike), largest,
        max(divergence, 0.0) / max(tokens, 1), allowed(kind), same_likeliest / max(tokens, 1),
        same_answers, ties, answers, metrics=scored.metrics(),
    )  # fmt: skip


def beside(source: Answering, ids: Sequence[int], most: int, likely: Sequence[int]) -> list[int]:
    """A greedy answer that is likely another's: read at once, and written on where it is not.

    Args:
        source: What answers.
        ids: Of the prompt.
        most: Tokens of the answer.
        likely: The other's answer.
    """
    if not likely or not most:
        return source.greedy(ids, most) if most else []
    likely = likely[:most]
    log_probs = source.log_probabilities([*ids, *likely[:-1]])[len(ids) - 1 :]
    answer: list[int] = []
    for token, here in zip(log_probs.argmax(-1).tolist(), likely, strict=True):
        answer.append(token)
        if token != here:
            break
    left = most - len(answer)
    return [*answer, *source.greedy([*ids, *answer], left)] if left else answer


class _Scored:
    """Whole answers of source and artefact, against the right ones."""

    def __init__(self, questions: Questions, context_tokens: int | None) -> None:
        self._questions, self._context = questions, context_tokens
        self._before: list[list[int]] = []
        self._after: list[list[int]] = []
        self._references: list[str] = []

    def whole(
        self, ids: list[int], model: Answering, begun: list[int], likely: Sequence[int] = ()
    ) -> list[int]:
        """An answer to its end, which was compared as far as it had begun.

        Args:
            ids: Of the prompt.
            model: What answers.
            begun: The answer's beginning.
            likely: What probably follows.
        """
        task = self._questions.task
        if task is None:
            return begun
        room = task.answer_tokens
        if self._questions.limits is not None:
            room = self._questions.limits.room(len(ids), room)
        if self._context is not None:
            room = min(room, self._context - len(ids))
        if len(task.until_stop(begun)) == len(begun) < room:  # it had not ended
            return [*begun, *beside(model, [*ids, *begun], room - len(begun), likely)]
        return begun[:room]

    def add(self, number: int, before: list[int], after: list[int]) -> None:
        """Two whole answers to a question."""
        if (task := self._questions.task) is not None:
            self._before.append(task.until_stop(before))
            self._after.append(task.until_stop(after))
            self._references.append(self._questions.references[number])

    def metrics(self) -> dict[str, dict[str, Any]]:
        """As a receipt has them."""
        task = self._questions.task
        if task is None or not self._references:
            return {}
        before = task.values(self._before, self._references)
        after = task.values(self._after, self._references)
        return {
            name: {"label": label, "before": before[name]["value"], "after": after[name]["value"]}
            for name, label in task.labels.items()
        }


def _at_a_tie(
    source: Answering, ids: Sequence[int], source_answer: Sequence[int], other_answer: Sequence[int]
) -> bool:
    place = next(
        (i for i, (a, b) in enumerate(zip(source_answer, other_answer, strict=False)) if a != b),
        len(other_answer),
    )
    if place >= min(len(source_answer), len(other_answer)):
        return False
    log_probs = source.log_probabilities([*ids, *source_answer[:place]])[-1]
    return bool(log_probs[source_answer[place]] - log_probs[other_answer[place]] < NEAR)


def allowed(kind: str) -> float:
    """Mean KL divergence that a kind of artefact may be away, nats a token."""
    kind = kind.removeprefix("gguf:").removesuffix("_0").removesuffix("_1")
    limits = [value for name, value in ALLOWED.items() if kind.startswith(name.removesuffix("_0"))]
    return limits[0] if limits else OTHERWISE


def write_receipt(receipt: Receipt, folder: Path) -> Path:
    """Store a receipt beside its artefact."""
    path = folder / RECEIPT
    write_json(path, receipt.to_dict())
    return path
