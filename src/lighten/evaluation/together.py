"""Losses and greedy answers in one pass over the rows, on a processor.

A row whose loss is measured begins with the prompt that is answered, so the prompt goes through the
model once: its keys and values stay in a slot (`generation.slotted`), and the answer goes on from
there. Where the answer begins as the row does, that is known from the row's losses. What all rows
begin with, a chat template's system message, is computed once. Rows are packed, without padding.
What cannot be done so is measured apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from lighten.adapters import Trained
from lighten.data import LearntAnswers
from lighten.data.batches import Item, MicroBatch, TokenRow, collate, layout
from lighten.data.special import visible
from lighten.engine.forward_backward import undropped
from lighten.engine.loss import Objective
from lighten.engine.validation import held_out
from lighten.engine.validation_loss import ValidationLoss
from lighten.evaluation.generate import Answers, hidden_tokens, stop_tokens
from lighten.evaluation.partial_results import PartialResults, key_of
from lighten.generation import slotted
from lighten.generation.slotted import Slotted
from lighten.models import limits_of

Progress = Callable[[int, int], None]

# Keys and values of the rows that answer at the same time, and how many rows more of them gain
# nothing: their products run at a processor's full rate.
CACHE_BYTES = 512 * 2**20
ENOUGH_ROWS = 64
# Tokens that all rows begin with are computed once where they are so many, and such a share of a
# row: the attention behind them is slower than that of whole rows.
FEWEST_SHARED, SHARE = 8, 0.1
# A token that is lost less than this, in nats, is likelier than all others together (ln 2 = 0.69).
CERTAIN = 0.6
# How far logits from the slots may be from the model's, relative.
AGREEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Disagrees(Exception):
    """The model does something to its rows that slots do not know."""


@dataclass(frozen=True)
class Job:
    """A row that is read, and the answer that it is continued with.

    Attributes:
        input_ids: The prompt, and what follows it in the row that is scored.
        supervised: Whether each token is a target.
        row: Which of the scored rows it is; None: a prompt alone.
        prompt: Which of the prompts it begins with.
        prompt_tokens: Of that.
        room: Tokens that it is answered with at most.
    """

    input_ids: list[int]
    supervised: list[bool]
    row: int | None
    prompt: int
    prompt_tokens: int
    room: int

    @property
    def tokens(self) -> int:
        """Of the row or of prompt and answer, whichever is longer."""
        return max(len(self.input_ids), self.prompt_tokens + self.room)


@dataclass(frozen=True)
class Suffix:
    """What of a row is read behind the tokens that all rows begin with."""

    input_ids: Sequence[int]
    supervised: Sequence[bool]


@dataclass
class Pass:
    """One model's pass over rows and prompts.

    Attributes:
        model: In eval mode.
        tokenizer: Its.
        trained: What was trained on it.
        adapter: Which of that answers; None: the base.
        learnt: What the answers that it was trained on end with and hold.
        max_new_tokens: Longest answer.
        max_rows: Read at once at most.
        max_tokens: Read at once at most.
        at_once: Rows that answer at the same time at least, where there are so many.
        progress: Log how many prompts are answered, and of how many.
        partial: What an earlier session measured before it was ended; new parts are added.
    """

    model: PreTrainedModel
    tokenizer: Any
    trained: Trained
    adapter: str | None
    learnt: LearntAnswers
    max_new_tokens: int
    max_rows: int
    max_tokens: int | None
    at_once: int
    progress: Progress | None = None
    partial: PartialResults | None = None
    _shared: int = field(default=0, init=False)
    _compared: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._stops = stop_tokens(self.model, self.tokenizer, self.learnt)
        self._hidden = hidden_tokens(self.tokenizer, self.learnt)
        self._objective = Objective(
            self.model, self.trained, fast=self.trained.supports_fast_loss, packs=True
        )

    def run(
        self, rows: Sequence[TokenRow], prompts: Sequence[Sequence[int]]
    ) -> tuple[ValidationLoss, Answers]:
        """The loss of each row that has a supervised token, and the answer to each prompt.

        Raises:
            Disagrees: It has to be measured otherwise.
        """
        limits = limits_of(self.model)
        rooms = [limits.room(len(prompt), self.max_new_tokens) for prompt in prompts]
        # A prompt that fills the positions has no answer, and one beyond them cannot be read.
        jobs = [job for job in _jobs(rows, prompts, rooms) if job.row is not None or job.room]
        if not jobs:
            raise Disagrees("no prompt leaves room for an answer")
        self._shared = _shared_tokens(jobs)
        nll, supervised = [0.0] * len(rows), [0] * len(rows)
        texts, tokens, decoded, seconds = [""] * len(prompts), 0, 0, 0.0
        limited = 0
        done = shortened = len(prompts) - len(jobs)
        with slotted.slots_in(self.model):
            for wave in self._waves(jobs):
                part = self._resume_or_measure(wave)
                for place, job in enumerate(wave):
                    texts[job.prompt] = part["texts"][place]
                    if job.row is not None:
                        nll[job.row], supervised[job.row] = part["nll"][place], part["of"][place]
                tokens, decoded = tokens + part["tokens"], decoded + part["decoded"]
                seconds += part["seconds"]
                shortened, limited = shortened + part["shortened"], limited + part["limited"]
                done += len(wave)
                if self.progress is not None:
                    self.progress(done, len(prompts))
        read = {job.row for job in jobs}
        scored = [place for place, row in enumerate(rows) if any(row.supervised[1:])]
        alone = [place for place in scored if place not in read]
        for place, loss, count in zip(alone, *self._scored([rows[i] for i in alone]), strict=True):
            nll[place], supervised[place] = loss, count
        losses = ValidationLoss(tuple(nll[i] for i in scored), tuple(supervised[i] for i in scored))
        return losses, Answers(texts, tokens, seconds, shortened, limited, decoded)

    def _waves(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs that answer at the same time: the same ones however often a session is ended."""
        token = slotted.bytes_per_token(self.model)
        remaining = sorted(jobs, key=lambda job: -job.tokens)
        while remaining:
            rows_in_cache = CACHE_BYTES // max(1, token * remaining[0].tokens)
            count = max(self.at_once, min(ENOUGH_ROWS, rows_in_cache))
            yield remaining[:count]
            remaining = remaining[count:]

    def _resume_or_measure(self, wave: Sequence[Job]) -> dict[str, Any]:
        """What an earlier session kept of a wave, or what is measured now."""
        # A wave is kept whole: in other company an answer may be rounded to another.
        made_of = [part for job in wave for part in (job.input_ids, (job.prompt_tokens, job.room))]
        key = key_of("loss-and-answers", made_of)
        before = None if self.partial is None else self.partial.get(key)
        if before is not None and "decoded" in before:
            return before
        part = self._measure(wave)
        if self.partial is not None:
            self.partial.put(key, part)
        return part

    def _measure(self, wave: Sequence[Job]) -> dict[str, Any]:
        slots = Slotted(self.model, len(wave), max(job.tokens for job in wave))
        nll, of, begun = self._read(wave, slots)
        began = time.perf_counter()
        with torch.inference_mode(), self.trained.using(self.adapter):
            answers = slots.answers(
                [job.input_ids[: job.prompt_tokens] for job in wave], begun,
                [job.room for job in wave], self._stops,
            )  # fmt: skip
        # Neither the reading for the loss is answering nor what the loss says of the answers.
        seconds = time.perf_counter() - began
        tokens = sum(map(len, answers))
        texts, shortened, limited = [], 0, 0
        for job, answer in zip(wave, answers, strict=True):
            answer_ids = answer[:-1] if answer and answer[-1] in self._stops else answer
            texts.append(visible(answer_ids, self.tokenizer, hidden=self._hidden))
            unfinished = len(answer_ids) == job.room
            shortened += unfinished and job.room < self.max_new_tokens
            limited += unfinished and job.room == self.max_new_tokens
        return {
            "nll": nll, "of": of, "texts": texts, "tokens": tokens,
            "decoded": tokens - sum(map(len, begun)), "shortened": shortened, "limited": limited,
            "seconds": seconds,
        }  # fmt: skip

    @torch.no_grad()
    def _read(
        self, wave: Sequence[Job], slots: Slotted
    ) -> tuple[list[float], list[int], list[list[int]]]:
        """Put each row into the slot of its place.

        Returns:
            Each row's loss, the tokens that this is of, and how its answer is known to begin.
        """
        nll, of = [0.0] * len(wave), [0] * len(wave)
        begun: list[list[int]] = [[] for _ in wave]
        suffixes = [
            Suffix(job.input_ids[self._shared :], job.supervised[self._shared :]) for job in wave
        ]
        if not self._compared:
            self._verify(wave)
        if self._shared:
            with self.trained.using(self.adapter):
                slots.begin(wave[0].input_ids[: self._shared])
        items = [Item(self.adapter, place, 0) for place in range(len(wave))]
        lengths = [len(suffix.input_ids) for suffix in suffixes]
        for part in layout(
            items, lengths, max_rows=self.max_rows, max_tokens=self.max_tokens, packed=True
        ):
            batch = collate(part, suffixes, [self.adapter], packed=True)
            places = [item.row for item in batch.items]
            lost = self._losses(batch, slots, places)
            for number, place in enumerate(places):
                span = slice(batch.supervised_before[number], batch.supervised_before[number + 1])
                nll[place], of[place] = float(lost[span].double().sum()), span.stop - span.start
                begun[place] = self._begun(wave[place], lost[span].tolist())
            if not self._compared:
                self._compare(wave, slots, places)
        return nll, of, begun

    def _losses(self, batch: MicroBatch, slots: Slotted, places: Sequence[int]) -> torch.Tensor:
        """Of each supervised token, in nats, [S]; keys and values go into slots."""
        starts = batch.starts
        assert starts is not None
        assert batch.position_ids is not None
        batch = replace(batch, position_ids=batch.position_ids + self._shared)
        shares = undropped(batch)
        weights = torch.ones(len(batch.labels))
        with self._objective.at(batch, shares), slots.reading(starts, places, self._shared):
            _, lost = self._objective(batch, shares, weights)
        return lost

    def _begun(self, job: Job, lost: Sequence[float]) -> list[int]:
        """What is known of an answer: the row's tokens as long as each is likelier than others.

        Args:
            job: Whose.
            lost: Of each of its supervised tokens.
        """
        begun: list[int] = []
        expected = job.prompt_tokens
        targets = [
            position for position, marked in enumerate(job.supervised) if marked and position > 0
        ]
        for position, nats in zip(targets, lost, strict=True):
            if position < expected:  # an answer before the one that is asked for
                continue
            # A loss that is no number is not below anything: nothing is known then.
            if position != expected or not nats < CERTAIN or len(begun) == job.room:
                break
            begun.append(job.input_ids[position])
            expected += 1
            if begun[-1] in self._stops:
                break
        return begun

    def _verify(self, wave: Sequence[Job]) -> None:
        """Two rows' losses by the objective's quick ways and by the model's own forward.

        Raises:
            Disagrees: They are another when the rows stand behind each other.
        """
        scored = [place for place, job in enumerate(wave) if any(job.supervised[1:])]
        if not scored:
            return
        two = dict.fromkeys((scored[0], scored[-1]))
        batch = collate([Item(self.adapter, place, 0) for place in two], wave, [self.adapter],
                        packed=True)  # fmt: skip
        self._objective.verify(batch, undropped(batch))
        if not self._objective.packs:
            raise Disagrees(self._objective.packing_reason)

    def _compare(self, wave: Sequence[Job], slots: Slotted, places: Sequence[int]) -> None:
        """Two rows' last tokens by the slots and by the model as it stands.

        Raises:
            Disagrees: They are another.
        """
        two = list(dict.fromkeys((places[0], places[-1])))
        with self.trained.using(self.adapter):
            difference = slots.largest_difference([wave[place].input_ids for place in two], two)
        if not difference <= AGREEMENT.get(self.trained.dtype, 1e-1):
            raise Disagrees(f"logits from the slots are {difference:.1e} from the model's")
        self._compared = True

    def _scored(self, rows: Sequence[TokenRow]) -> tuple[Sequence[float], Sequence[int]]:
        """Losses and supervised tokens of rows that no prompt begins."""
        if not rows:
            return (), ()
        key = key_of("loss", [row.input_ids for row in rows])
        before = None if self.partial is None else self.partial.get(key)
        if before is None:
            losses = held_out(
                self._objective, rows, self.adapter, max_rows=self.max_rows,
                max_tokens=self.max_tokens, device=self.model.device,
            )  # fmt: skip
            before = {"nll": losses.nll, "tokens": losses.tokens}
            if self.partial is not None:
                self.partial.put(key, before)
        return before["nll"], before["tokens"]


def _jobs(
    rows: Sequence[TokenRow], prompts: Sequence[Sequence[int]], rooms: Sequence[int]
) -> list[Job]:
    """One for each prompt: with a row that it begins, up to one of its answers, or by itself."""
    waiting: dict[tuple[int, ...], list[int]] = {}
    for prompt in reversed(range(len(prompts))):
        waiting.setdefault(tuple(map(int, prompts[prompt])), []).append(prompt)
    lengths = {len(prompt) for prompt in prompts}
    jobs = []
    for row, scored in enumerate(rows):
        ids = list(map(int, scored.input_ids))
        marks = [*map(bool, scored.supervised)]
        for start in reversed(range(1, len(ids))):
            if not marks[start] or marks[start - 1] or start not in lengths:
                continue
            asking = waiting.get(tuple(ids[:start]))
            if asking:
                prompt = asking.pop()
                jobs.append(Job(ids, marks, row, prompt, start, rooms[prompt]))
                break
    for asking in waiting.values():
        for prompt in asking:
            ids = list(map(int, prompts[prompt]))
            jobs.append(Job(ids, [False] * len(ids), None, prompt, len(ids), rooms[prompt]))
    return jobs


def _shared_tokens(jobs: Sequence[Job]) -> int:
    """How many tokens all rows begin with, 0 where they are too few to be read apart.

    Each row has one more token that its prompt's last and its first target are predicted from.
    """
    if len(jobs) < 2:
        return 0
    first, last = min(job.input_ids for job in jobs), max(job.input_ids for job in jobs)
    pairs = zip(first, last, strict=False)  # what these two share, all between them share
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    targets = [
        position
        for job in jobs
        for position, marked in enumerate(job.supervised)
        if marked and position
    ]
    shared = min(
        alike, *(job.prompt_tokens - 1 for job in jobs), *(position - 1 for position in targets)
    )
    share = shared * len(jobs) / sum(len(job.input_ids) for job in jobs)
    return shared if shared >= FEWEST_SHARED and share >= SHARE else 0
