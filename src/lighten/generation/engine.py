"""Continuous batching of answers by many adapters.

Every step computes one token of each answer under way and a part of the prompts that wait.

The model is transformers' own. Its linear layers are products of rows sorted by adapter
(`linears`), its attention reads a cache of slots (`attention`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lighten.errors import UserError
from lighten.generation import attention
from lighten.generation.adapter import LoadedAdapter, read_factors, require_same
from lighten.generation.attention import Batch, Prefill, SlotCache
from lighten.generation.linears import install
from lighten.generation.request import Request, Taken
from lighten.generation.sampling import Chosen, Sampler
from lighten.generation.segments import Segments
from lighten.generation.slots import Slots

# Of prompts, read in one step.
PREFILL_TOKENS = 512
# Of logits of prompts in one step, in float32: as many rows as that are read, one block at least.
LOGIT_BYTES = 128 * 2**20


def require_taken(model: PreTrainedModel) -> None:
    """Refuse a base that the engine does not answer with.

    Args:
        model: Its weights may be shapes alone.

    Raises:
        UserError: Says why.
    """
    taken = inspect.signature(model.forward).parameters
    if missing := [name for name in ("position_ids", "logits_to_keep") if name not in taken]:
        raise UserError(f"{type(model).__name__} takes no {missing[0]}")
    attention.require_plain(model)


class Engine:
    """A base in memory, adapters on it, and a thread that answers.

    Args:
        model: In eval mode, with plain attention; its linear layers are replaced.
        max_sequences: Answers under way at once; more requests wait.
        max_tokens: Of prompt and answer together.
        prefill_tokens: Of prompts, read in one step: fewer keep answers under way fluent.
        prefix_caching: Whether what a slot holds serves prompts with the same beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int = 16,
        max_tokens: int = 4096,
        prefill_tokens: int = PREFILL_TOKENS,
        prefix_caching: bool = True,
    ) -> None:
        require_taken(model)
        attention.take_over(model)
        self._model = model
        self._step, self._groups = install(model)
        self._each_group = tuple(dict.fromkeys(self._groups.values()))
        self._cache = SlotCache(max_sequences, max_tokens)
        self.max_tokens = max_tokens
        self._prefill_tokens = prefill_tokens
        self._block = min(attention.BLOCK, prefill_tokens)
        words = int(model.config.get_text_config().vocab_size)
        self._logit_rows = max(self._block, LOGIT_BYTES // (4 * words))
        self._slots = Slots(self._cache, self._block, reuse=prefix_caching)
        self._adapters: dict[str, LoadedAdapter] = {}
        self._waiting: deque[Taken] = deque()
        self._running: list[Taken] = []
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._plans: dict[tuple[bool, tuple[LoadedAdapter, ...]], Segments] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lighten-engine", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in memory."""
        return tuple(self._adapters)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closed and self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Answers under way, and requests that wait."""
        return len(self._running), len(self._waiting)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Memory of adapters and of the cache."""
        adapters = sum(adapter.size_bytes for adapter in self._adapters.values())
        return {"adapters": adapters, "cache": self._cache.size_bytes}

    def submit(self, request: Request) -> Callable[[], None]:
        """Answer a request; what it returns cancels it.

        Raises:
            UserError: The prompt is empty or too long, or no such adapter is loaded.
        """
        if self._closed:
            raise UserError("the engine has stopped")
        if not request.prompt:
            raise UserError("the prompt has no tokens")
        if len(request.prompt) + 1 > self.max_tokens:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens; with its answer at most "
                f"{self.max_tokens} fit"
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UserError(f"no adapter is called {request.adapter!r}")
        adapter = None if request.adapter is None else self._adapters[request.adapter]
        sampler = Sampler(request.sampling, request.top_logprobs, request.grammar)
        sequence = Taken(request, adapter, sampler, list(request.prompt))
        self._inbox.put(lambda: self._waiting.append(sequence))

        def cancel() -> None:
            sequence.cancelled = True

        return cancel

    def load_adapter(self, name: str, folder: Path) -> None:
        """Take an adapter in, in place of one of the same name: answers under way end with that.

        Raises:
            UserError: It cannot be served unmerged, is of another base, or finds no memory.
        """
        factors, saved = read_factors(folder, self._groups)
        for path, weight in saved.items():
            require_same(folder, path, weight, functools.partial(self._weight_at, path))
        for path, pair in factors.items():
            group = self._groups[path]
            columns = group.columns[group.paths.index(path)]
            expected = (group.inputs, columns.stop - columns.start, pair.A.shape[0])
            if (pair.A.shape[1], pair.B.shape[0], pair.B.shape[1]) != expected:
                raise UserError(
                    f"{folder}: the factors of {path} do not fit this base; it was trained on "
                    "another model"
                )
        adapter = LoadedAdapter(name)
        device = self._model.device
        try:
            for group in self._each_group:
                adapter.size_bytes += group.add(adapter, factors, device)
        except RuntimeError as error:  # PyTorch's, of a processor's memory and of a GPU's
            for group in self._each_group:
                group.forget(adapter)
            raise UserError(
                f"there is no memory for the adapter {folder}; unload another one first"
            ) from error.with_traceback(None)
        self._call(lambda: self._adopt(adapter))

    def _weight_at(self, path: str, places: torch.Tensor) -> torch.Tensor:
        return self._groups[path].weight_at(path, places.to(self._model.device)).cpu()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; answers under way end with it.

        Raises:
            UserError: There is none of that name.
        """
        self._call(lambda: self._drop(name))

    def close(self, timeout_s: float | None = None) -> None:
        """End the thread when the answers under way are complete; what waits is answered too."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _call(self, action: Callable[[], None]) -> None:
        """Run something between two steps, and wait for it; its error is raised here."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except Exception as error:  # the caller's, not of the answers under way
                done.set_exception(error)

        self._inbox.put(run)
        while not wait([done], 1.0).done:
            if not self._thread.is_alive():
                raise RuntimeError("the engine's thread has ended")
        done.result()

    def _adopt(self, adapter: LoadedAdapter) -> None:
        previous = self._adapters.get(adapter.name)
        self._adapters[adapter.name] = adapter
        if previous is not None:
            self._forget(previous)

    def _drop(self, name: str) -> None:
        if name not in self._adapters:
            raise UserError(f"no adapter is called {name!r}")
        self._forget(self._adapters.pop(name))

    def _forget(self, adapter: LoadedAdapter) -> None:
        """Free the memory of an adapter that no answer under way takes."""
        loaded = any(other is adapter for other in self._adapters.values())
        used = any(sequence.adapter is adapter for sequence in (*self._running, *self._waiting))
        if loaded or used:
            return
        self._plans.clear()
        for group in self._each_group:
            group.forget(adapter)
        self._slots.forget(adapter)

    def _work(self) -> None:
        stopping = False
        while True:
            idle = not self._running and not self._waiting
            if idle and stopping:
                return
            try:
                item = self._inbox.get(block=idle)
                while True:
                    if item is None:
                        stopping = True
                    else:
                        item()
                    item = self._inbox.get(block=False)
            except queue.Empty:
                pass
            self._admit()
            if self._running:
                try:
                    self._advance()
                except Exception as error:  # told to each request; the server goes on
                    self._fail(error)

    def _fail(self, error: Exception) -> None:
        for sequence in list(self._running):
            self._end(sequence, error)

    @torch.inference_mode()
    def _admit(self) -> None:
        for sequence in [queued for queued in self._waiting if queued.cancelled]:
            self._waiting.remove(sequence)
            sequence.request.on_end("cancelled")
            if sequence.adapter is not None:
                self._forget(sequence.adapter)
        while self._waiting and self._slots.free:
            sequence = self._waiting.popleft()
            sequence.slot, sequence.cached = self._slots.take(
                sequence.tokens, sequence.adapter, empty=sequence.reads_whole
            )
            self._running.append(sequence)

    def _end(self, sequence: Taken, reason: str | BaseException) -> None:
        self._running.remove(sequence)
        self._slots.give_back(sequence.slot, broken=isinstance(reason, BaseException))
        sequence.request.on_end(reason)
        if sequence.adapter is not None:
            self._forget(sequence.adapter)

    @torch.inference_mode()
    def _advance(self) -> None:
        """One step."""
        for sequence in [running for running in self._running if running.cancelled]:
            self._end(sequence, "cancelled")
        parts = self._parts()
        if not parts or not self._have_room(parts):
            return
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        decode_rows: list[int] = []
        prefills: list[Prefill] = []
        rows: list[int] = []  # tokens of the step whose logits are wanted
        read: list[tuple[Taken, int]] = []
        for sequence, count in parts:
            start = len(ids)
            ids += sequence.tokens[sequence.cached : sequence.cached + count]
            slots += [sequence.slot] * count
            positions += range(sequence.cached, sequence.cached + count)
            if sequence.decoding:
                decode_rows.append(start)
            else:
                prefills.append(Prefill(start, start + count, sequence.slot, sequence.cached))
            if wanted := sequence.rows_wanted(count):
                rows += range(len(ids) - wanted, len(ids))
                read.append((sequence, wanted))
        device = self._model.device
        batch = Batch(
            self._cache, torch.tensor(slots, device=device),
            torch.tensor(positions, device=device), decode_rows, prefills, self._block,
        )  # fmt: skip
        self._step.segments = self._segments(parts)
        self._step.last = self._segments(read, head=True)
        with attention.attending(batch):
            logits = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(rows or [0], device=device),
            ).logits[0]
        for sequence, count in parts:
            sequence.cached += count
            self._slots.computed(sequence.slot, sequence.cached)
        if read:
            self._choose(*self._last_rows(read, logits))

    def _last_rows(
        self, read: Sequence[tuple[Taken, int]], logits: torch.Tensor
    ) -> tuple[list[Taken], torch.Tensor]:
        """The sequences that a next token follows on, and their logits; prompts are told of.

        Args:
            read: Sequences with the number of their rows.
            logits: Of all these rows.
        """
        complete, last, row = [], [], 0
        for sequence, count in read:
            row += count
            if sequence.reads_whole and not sequence.decoding:
                sequence.tell_prompt(logits[row - count : row])
            if not sequence.waiting_tokens:
                complete.append(sequence)
                last.append(row - 1)
        return complete, logits if len(last) == len(logits) else logits[last]

    def _have_room(self, parts: Sequence[tuple[Taken, int]]) -> bool:
        """Room for a step's tokens; where memory has none, the answers that want it end."""
        wanted = {sequence.slot: sequence.cached + count for sequence, count in parts}
        try:
            self._cache.reserve(max(wanted.values()))
        except RuntimeError as error:  # PyTorch's, of a processor's memory and of a GPU's
            for sequence, _ in parts:
                tokens = wanted[sequence.slot]
                if tokens > self._cache.capacity:
                    failure = MemoryError(
                        f"there is no memory for keys and values of {tokens} tokens in each of "
                        f"{self._cache.slots} answers; start the server with a smaller "
                        "--max-num-seqs or --max-model-len"
                    )
                    failure.__cause__ = error.with_traceback(None)
                    self._end(sequence, failure)
            return False
        return True

    def _parts(self) -> list[tuple[Taken, int]]:
        """Sequences of the next step and how many of their tokens, sorted by adapter."""
        begun = [
            sequence for place, sequence in enumerate(self._running)
            if sequence.begun or self._begins(sequence, self._running[:place])
        ]  # fmt: skip
        shares = self._shares([sequence for sequence in begun if not sequence.decoding])
        parts = []
        for sequence in begun:
            if count := shares.get(sequence, 1):  # of an answer the last token
                parts.append((sequence, count))
                if not sequence.begun:
                    sequence.begun = True
                    sequence.request.on_begin(sequence.cached)
        return sorted(parts, key=lambda part: id(part[0].adapter) if part[0].adapter else 0)

    def _shares(self, prompts: Sequence[Taken]) -> dict[Taken, int]:
        """Tokens of each prompt that the next step reads: whole blocks, or what is left of it.

        A block of the oldest, so that it comes to its end whatever else comes; then of those with
        the fewest tokens left: a question does not wait until a long document is read.
        """
        room, logit_rows = self._prefill_tokens, self._logit_rows
        shares = dict.fromkeys(prompts, 0)
        shortest_first = sorted(prompts, key=lambda sequence: sequence.waiting_tokens)
        for sequence, limit in (
            *((oldest, self._block) for oldest in prompts[:1]),
            *((prompt, room) for prompt in shortest_first),
        ):
            most = min(limit, room, logit_rows) if sequence.reads_whole else min(limit, room)
            count = sequence.waiting_tokens - shares[sequence]
            if count > most:
                count = most - most % self._block
            shares[sequence] += count
            room -= count
            logit_rows -= count * sequence.reads_whole
        return shares

    def _begins(self, sequence: Taken, earlier: Sequence[Taken]) -> bool:
        """Whether a prompt is read now: what one before it is reading of it, it takes from that."""
        if sequence.reads_whole:
            return True
        sequence.cached = self._slots.catch_up(sequence.slot)
        return all(
            self._slots.alike(sequence.slot, other.slot) <= sequence.cached
            for other in earlier if not other.decoding
        )  # fmt: skip

    def _segments(self, parts: Sequence[tuple[Taken, int]], *, head: bool = False) -> Segments:
        names, starts, stops = [], [], []
        row = 0
        for adapter, group in itertools.groupby(parts, key=lambda part: part[0].adapter):
            count = sum(part[1] for part in group)
            if adapter is not None:
                names.append(adapter)
                starts.append(row)
                stops.append(row + count)
            row += count
        # Sequences come and go in every few steps; which adapters they take changes seldom.
        key = head, tuple(names)
        segments = self._plans.get(key)
        if segments is not None:
            segments.move(starts, stops)
            return segments
        if len(self._plans) > 64:
            self._plans.clear()
        self._plans[key] = Segments(key[1], tuple(starts), tuple(stops))
        return self._plans[key]

    def _choose(self, sequences: Sequence[Taken], logits: torch.Tensor) -> None:
        likeliest = logits.argmax(-1)  # a number that is none counts as the largest
        finite = logits.gather(-1, likeliest[:, None])[:, 0].isfinite().tolist()
        greedy = likeliest.tolist()
        for row, sequence in enumerate(sequences):
            if not finite[row] or not sequence.is_finite:
                self._end(sequence, UserError(
                    "model: this model computes numbers that are not finite; its training "
                    "diverged, take an earlier checkpoint"
                ))  # fmt: skip
                continue
            if sequence.reads_whole and not sequence.decoding:
                sequence.request.on_prompt(sequence.prompt_told)
            if not sequence.request.max_tokens:
                self._end(sequence, "length")
                continue
            try:
                chosen = (
                    Chosen(greedy[row]) if sequence.sampler.plain
                    else sequence.sampler.choose(
                        logits[row], sequence.request.prompt, sequence.answer
                    )
                )  # fmt: skip
            except Exception as error:  # of this request's settings: others go on
                self._end(sequence, error)
                continue
            if chosen.token in sequence.request.stops:
                if sequence.request.tells_end:
                    sequence.request.on_token(chosen)
                self._end(sequence, "stop")
                continue
            sequence.tokens.append(chosen.token)
            sequence.answer.append(chosen.token)
            sequence.request.on_token(chosen)
            full = len(sequence.tokens) >= self.max_tokens
            if sequence.sampler.ended:
                self._end(sequence, "complete")
            elif len(sequence.answer) >= sequence.request.max_tokens or full:
                self._end(sequence, "length")
