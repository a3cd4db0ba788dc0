"""A model's greedy answers to rows that were read behind each other in one.

Rows of any kind of adapter that changes a layer are read by the model as it stands, attention
excepted: a forward inside `Slotted.reading` leaves keys and values behind, whatever it is for. From
there each answer goes on by a token in a step of all.

Dimensions: n answers under way, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lighten.cpu import products
from lighten.errors import UserError
from lighten.generation import attention, kernels
from lighten.generation.attention import Batch, Prefill, SlotCache
from lighten.models import attention as blocks

# Tokens of a row, behind what all rows begin with, that attend in one product.
BLOCK = 512
# Last positions of a row whose logits are compared with the model's.
COMPARED = 2


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot answer from slots here; None where it can."""
    if model.device.type != "cpu":
        return f"keys and values lie in slots on a processor alone, not on {model.device.type}"
    if str(model.config._attn_implementation) != blocks.NAME:
        return f"{model.config._attn_implementation} attention reads no rows behind each other"
    try:
        attention.require_plain(model)
    except UserError as error:
        return str(error)
    return kernels.obstacle()


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory of a token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * key_heads * width * model.dtype.itemsize


@contextmanager
def slots_in(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's attention leave keys and values in slots where it is told to."""
    implementation = str(model.config._attn_implementation)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    products.quicken(model)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


class Slotted:
    """Keys and values of a model's rows, a slot each; used inside `slots_in`.

    Args:
        model: In eval mode.
        slots: Rows.
        tokens: Of the longest, its answer included.
    """

    def __init__(self, model: PreTrainedModel, slots: int, tokens: int) -> None:
        self._model = model
        self._cache = SlotCache(slots, tokens)
        self._cache.reserve(tokens)

    @contextmanager
    def reading(
        self, starts: Sequence[int], slots: Sequence[int], cached: int = 0
    ) -> Iterator[None]:
        """A forward of packed rows inside leaves their keys and values in slots.

        Args:
            starts: Where each row begins, and where the last one ends.
            slots: Of each row.
            cached: Tokens of each row that its slot holds already; the forward has the others.
        """
        lengths = torch.tensor([stop - start for start, stop in pairwise(starts)])
        first = torch.tensor(starts[:-1]).repeat_interleave(lengths) - cached
        positions = torch.arange(starts[-1]) - first
        prefills = [
            Prefill(start, stop, slot, cached)
            for (start, stop), slot in zip(pairwise(starts), slots, strict=True)
        ]
        token_slots = torch.tensor(slots).repeat_interleave(lengths)
        batch = Batch(self._cache, token_slots, positions, (), prefills, BLOCK, packed=not cached)
        with attention.attending(batch):
            yield

    def begin(self, tokens: Sequence[int]) -> None:
        """Let every slot hold the tokens that all rows begin with."""
        ids = torch.tensor([list(tokens)])
        with self.reading([0, len(tokens)], [0]):
            self._model.base_model(input_ids=ids, use_cache=False)
        self._cache.repeat(len(tokens))

    def step(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The logits [n, V] that follow on a token of each of n rows.

        Args:
            tokens: The newest of each row, whose keys and values its slot takes now.
            slots: Of the rows.
            positions: Of the tokens in their rows; what stands there and later is forgotten.
        """
        batch = Batch(
            self._cache, torch.tensor(slots), torch.tensor(positions), range(len(tokens)), ()
        )
        with attention.attending(batch):
            logits: Tensor = self._model(
                input_ids=torch.tensor([list(tokens)]), position_ids=batch.positions[None],
                use_cache=False,
            ).logits[0]  # fmt: skip
        return logits

    def largest_difference(self, rows: Sequence[Sequence[int]], slots: Sequence[int]) -> float:
        """How far logits from the slots are from the model's, relative to these; the largest.

        Args:
            rows: Whole ones that lie in slots.
            slots: Theirs.

        Returns:
            Not a number where logits are none.
        """
        keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": COMPARED} if keeps else {}
        differences = [0.0]
        for ids, slot in zip(rows, slots, strict=True):
            first = max(0, len(ids) - COMPARED)
            reference = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False, **options)
            for place in range(first, len(ids)):
                logits = self.step([ids[place]], [slot], [place])[0].double()
                expected = reference.logits[0, place - len(ids)].double()
                differences.append(float((logits - expected).norm() / expected.norm()))
        return float(torch.tensor(differences).max())  # which keeps what is not a number

    def answers(
        self, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]],
        rooms: Sequence[int], stops: Container[int],
    ) -> list[list[int]]:  # fmt: skip
        """The likeliest tokens one after another.

        Args:
            prompts: Each is the beginning of the row that was read into the slot of its place.
            begun: What is known of each answer: the row goes on with it behind the prompt.
            rooms: Tokens that each is answered with at most.
            stops: Tokens that end an answer.

        Returns:
            Each answer's tokens, the one that ended it among them.
        """
        answers = [list(tokens) for tokens in begun]

        def goes_on(place: int) -> bool:
            answer = answers[place]
            return len(answer) < rooms[place] and not (answer and answer[-1] in stops)

        under_way = [place for place in range(len(prompts)) if goes_on(place)]
        while under_way:
            # The last token of what was read is computed once more: then all go on alike.
            logits = self.step(
                [(answers[place] or prompts[place])[-1] for place in under_way], under_way,
                [len(prompts[place]) + len(answers[place]) - 1 for place in under_way],
            )  # fmt: skip
            for place, token in zip(under_way, logits.argmax(-1).tolist(), strict=True):
                answers[place].append(token)
            under_way = [place for place in under_way if goes_on(place)]
        return answers
