"""What every kind of training offers the rooms that train, save and evaluate it."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lighten.adapters.layers import Share
from lighten.adapters.shards import Shard

# Biases and norms by their names, as transformers' `Trainer.get_decay_parameter_names` knows them.
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")


class Trained(ABC):
    """Weights that learn, by the names of their owners: adapters on a base, or the base itself.

    Attributes:
        model: A plain transformers model; its forward works inside `using` or `sharing`.
        folder: Where a checkpoint keeps the weights of each name.
        learns_base: What learns are weights of the base itself.
    """

    model: PreTrainedModel
    folder: ClassVar[str] = "adapters"
    learns_base: ClassVar[bool] = False

    @property
    def supports_fast_loss(self) -> bool:
        """Whether the head is a layer whose product can be formed in chunks."""
        return True

    @property
    def no_packing(self) -> str | None:
        """Why rows must not stand behind each other, or None."""
        return None

    @property
    def no_checkpointing(self) -> str | None:
        """Why layers cannot be recomputed in the backward pass, or None."""
        return None

    @property
    def no_workers(self) -> str | None:
        """Why threads cannot each train on a micro-batch of their own, or None."""
        return "micro-batches train side by side for low-rank adapters alone"

    @property
    def shares_products(self) -> bool:
        """Whether what is not finite under one name can reach others in a step."""
        return False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """It cannot, until the end of the block."""
        yield

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names, in order."""

    @property
    def dtype(self) -> torch.dtype:
        """The format that products are computed in."""
        return self.model.dtype

    @abstractmethod
    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of a name by their key in its files."""

    def undecayed(self, name: str) -> frozenset[str]:
        """Keys of the parameters that weight decay leaves alone: those of biases and norms.

        What transformers' Trainer leaves alone on PEFT's model or the plain one: whatever is called
        like a bias or a norm, or belongs to a LayerNorm.
        """
        norms = {
            id(parameter)
            for module in self._modules(name)
            if isinstance(module, nn.LayerNorm)
            for parameter in module.parameters()
        }
        return frozenset(
            key
            for key, parameter in self.parameters(name).items()
            if id(parameter) in norms or UNDECAYED.search(key.lower())
        )

    def _modules(self, name: str) -> Iterable[nn.Module]:
        """Modules that hold the parameters of a name, perhaps others too."""
        del name
        return self.model.modules()

    @abstractmethod
    def using(self, name: str | None) -> AbstractContextManager[PreTrainedModel]:
        """Every row takes what was trained under this name (None: the untouched base).

        Raises:
            UserError: There is no such name.
        """

    @abstractmethod
    def sharing(
        self, shares: Sequence[Share], starts: Sequence[int] | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """The batch's rows take what the shares say; they cover it from row 0 on."""

    @abstractmethod
    def contents(
        self, name: str, *, base_model: str | None = None, revision: str | None = None
    ) -> Mapping[str, bytes | Shard]:
        """The files of a name by file name, for whoever writes them safely (`runs.write_bytes`)."""

    @abstractmethod
    def detach(self) -> PreTrainedModel:
        """The plain model without whatever makes it learn."""

    @abstractmethod
    def describe(self, name: str) -> str:
        """In words for the user."""

    @abstractmethod
    def facts(self, name: str) -> dict[str, Any]:
        """What `run.json` keeps of a name.

        Its `kind` (adapter or model), rank `r` and `alpha`, None where there are none.
        """

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shape by key of the live weights, what `verify` compares with."""
        return {key: tuple(value.shape) for key, value in self.parameters(name).items()}

    def restore(
        self, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor],
        after_each: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Copy saved weights, or those of a folder, into the live ones.

        Args:
            name: Whose.
            source: The weights by key, or the folder that holds them.
            after_each: Is called when a weight was copied.

        Raises:
            UserError: They are not whole or do not fit.
        """
        from lighten.adapters import files  # which knows the cohort, and that knows this

        files.restore(self, name, source, after_each=after_each)

    def verify(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Reopen saved files: every key there with its shape, nothing empty or not finite.

        Raises:
            UserError: They are not whole; says which key.
        """
        from lighten.adapters import files  # which knows the cohort, and that knows this

        files.verify(folder, self.shapes(name))
