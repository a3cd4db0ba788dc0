"""Greedy answers in left-padded batches.

Dimensions: B prompts, T tokens of the longest, left-padded, so that each prompt's last token
stands right before its answer (trap 17).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lighten import data
from lighten.data import LearntAnswers
from lighten.data.special import special_tokens, visible
from lighten.evaluation.partial_results import PartialResults, key_of
from lighten.models import Limits


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: One answer per prompt, without the token that ends it; other special tokens are
            part of it.
        tokens: Of the answers, padding not counted.
        decoded: Those of them that were computed one after another; None: all of them.
        seconds: Time that these took.
        shortened: Answers that ended where the model's positions end, empty ones included.
        limited: Answers that were cut off at `max_new_tokens`.
    """

    texts: list[str]
    tokens: int
    seconds: float
    shortened: int = 0
    limited: int = 0
    decoded: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """How fast it answered; None where all was known beforehand."""
        decoded = self.tokens if self.decoded is None else self.decoded
        return decoded / self.seconds if decoded else None


def stop_tokens(
    model: PreTrainedModel, tokenizer: Any, learnt: LearntAnswers | None = None
) -> list[int]:
    """Every token that ends an answer of this model, those that ended its training's first."""
    config = model.generation_config
    return data.stop_tokens(tokenizer, config.eos_token_id if config else None, learnt)


def hidden_tokens(tokenizer: Any, learnt: LearntAnswers | None = None) -> set[int]:
    """Tokens that no answer shows: padding and the start of a text, unless answers hold them."""
    inside = learnt.inside if learnt else ()
    return {
        token
        for token in (tokenizer.pad_token_id, tokenizer.bos_token_id)
        if token is not None and token not in inside
    }


def as_shown(reference: str, tokenizer: Any) -> str:
    """A reference as an answer with the same tokens is shown.

    Special tokens may swallow white space beside them; text without any is left as it is.
    """
    if not any(token in reference for token in special_tokens(tokenizer).texts):
        return reference
    return visible(tokenizer(reference, add_special_tokens=False)["input_ids"], tokenizer)


@contextmanager
def settings_alone(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` follow the settings it is given and nothing that came with the model.

    transformers fills what they leave open from the model's own (a repetition penalty, beams), so
    that "greedy" would not be.
    """
    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


@contextmanager
def head_reads_whole_rows(model: PreTrainedModel) -> Iterator[None]:
    """The head's input lies in one piece, by its strides too.

    `generate` cuts each prompt's last position out of the batch, and of such a view PyTorch copies
    the head's weight once per prompt: 1.8 GB and 2.7 s for 32 prompts of a 135M model. Of one
    prompt, too: the view of a single row is contiguous, but its strides are those of the prompt.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, args: (args[0].reshape(-1).view(args[0].shape), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    learnt: LearntAnswers | None = None,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
    partial: PartialResults | None = None,
) -> Answers:
    """Answer prompts greedily, longest first.

    Args:
        model: In eval mode.
        tokenizer: To decode with, and for the padding token.
        prompts: Token ids of each.
        max_new_tokens: Longest answer.
        batch_size: Prompts answered together.
        learnt: What the answers that the model was trained on end with and hold.
        limits: Of the model; where its positions end an answer ends too, and a prompt that fills
            them has an empty one.
        progress: Log how many are done, and of how many.
        partial: Answers of an earlier session that was ended in the middle; new ones are added.
    """
    stops = stop_tokens(model, tokenizer, learnt)
    hidden = hidden_tokens(tokenizer, learnt)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rooms = [
        max_new_tokens if limits is None else limits.room(len(prompt), max_new_tokens)
        for prompt in prompts
    ]
    texts, tokens, seconds = [""] * len(prompts), 0, 0.0
    done, shortened, limited = 0, 0, 0
    for batch, room in _batches(order, rooms, batch_size):
        done += len(batch)
        if room == 0:
            shortened += len(batch)
            continue
        # A batch is kept whole: in other company an answer may be rounded to another.
        key = key_of("answers", [prompts[i] for i in batch], room)
        before = None if partial is None else partial.get(key)
        if before is not None and "limited" in before:
            for i, text in zip(batch, before["texts"], strict=True):
                texts[i] = text
            tokens, seconds = tokens + before["tokens"], seconds + before["seconds"]
            shortened, limited = shortened + before["shortened"], limited + before["limited"]
            continue
        began, so_far = time.perf_counter(), (tokens, shortened, limited)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=room, eos_token_id=stops or None, pad_token_id=pad
        )
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        with settings_alone(model), head_reads_whole_rows(model):
            out = model.generate(  # type: ignore[operator]  # typed as a tensor by nn.Module
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
        for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
            answer_ids = _until_stop(answer, set(stops))
            tokens += len(answer_ids) + (len(answer_ids) < len(answer))
            texts[i] = visible(answer_ids, tokenizer, hidden=hidden)
            unfinished = len(answer_ids) == room
            shortened += unfinished and room < max_new_tokens
            limited += unfinished and room == max_new_tokens
        took_s = time.perf_counter() - began
        seconds += took_s
        if partial is not None:
            partial.put(
                key,
                {"texts": [texts[i] for i in batch], "tokens": tokens - so_far[0],
                 "shortened": shortened - so_far[1], "limited": limited - so_far[2],
                 "seconds": took_s},
            )  # fmt: skip
        if progress is not None:
            progress(done, len(order))
    return Answers(texts, tokens, seconds, shortened, limited)


def _batches(
    order: Sequence[int], rooms: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Prompts that are answered together and the tokens that each may answer with."""
    for room, group in groupby(order, key=lambda i: rooms[i]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size], room


def _until_stop(answer: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(answer):
        if token in stops:
            return answer[:place]
    return answer
