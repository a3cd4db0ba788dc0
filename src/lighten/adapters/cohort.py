"""The cohort: one or more adapters attached to one frozen base, trained and used together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lighten.adapters import fake_quant, ops
from lighten.adapters.frozen import make_dense
from lighten.adapters.layers import CohortCopies, CohortLinear, Route, Routing, Share, Siblings
from lighten.adapters.spec import AdapterSpec
from lighten.adapters.targets import low_rank_paths, saved_paths, sibling_paths
from lighten.adapters.trained import Trained
from lighten.errors import UserError

log = logging.getLogger(__name__)


class Cohort(Trained):
    """Adapters on a frozen base, and the say over which row of a batch takes which of them.

    Attributes:
        model: The base with the cohort's layers in place. It stays a plain transformers model:
            its forward and `generate` work inside `using` or `sharing`.
        specs: The adapters by name, in order.
        group_size: Of quantisation-aware training; None: layers compute as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.group_size: int | None = None
        self.specs: dict[str, AdapterSpec] = {}
        self.routing = Routing.new()
        self.linears: dict[str, CohortLinear] = {}
        self.copies: dict[str, CohortCopies] = {}
        self._apart = False

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(self.specs)

    def add(self, spec: AdapterSpec) -> None:
        """Attach one more adapter.

        Raises:
            UserError: The name is taken, or targets match nothing.
        """
        if spec.name in self.specs:
            raise UserError(f"two adapters are called {spec.name!r}; give each its own name")
        with self._detached():
            paths, copy_paths = low_rank_paths(self.model, spec), saved_paths(self.model, spec)
        # Experts gather tokens by themselves: only a lone adapter can follow them there.
        hidden = [path for path in paths if ".experts." in path]
        if hidden and self.specs:
            raise UserError(
                f"adapter {spec.name!r} targets {hidden[0]}, inside a mixture of experts, where "
                "rows of several adapters cannot be told apart; train it alone or drop the target"
            )
        if self.group_size is not None:
            self._require_fakes(spec, copy_paths)
        generator = torch.Generator().manual_seed(spec.seed)
        for path in paths:
            if path not in self.linears:
                self.linears[path] = CohortLinear(
                    self.model.get_submodule(path), path, self.routing
                )
                self.model.set_submodule(path, self.linears[path])
            self.linears[path].add(spec, generator)
        for group in sibling_paths(self.linears):
            Siblings([self.linears[path] for path in group])
        for path in copy_paths:
            if path not in self.copies:
                self.copies[path] = CohortCopies(self.model.get_submodule(path), path, self.routing)
                self.model.set_submodule(path, self.copies[path])
            self.copies[path].add(spec.name)
        self.specs[spec.name] = spec

    def fake_quantise(self, group_size: int) -> None:
        """Every linear layer but the head computes as once quantised, with its rows' adapters.

        Inside `using(None)` the base stays as it was.

        Raises:
            UserError: The base's layers do not suit.
        """
        routing = self.routing

        def untouched() -> bool:
            now = routing.now
            return now.everyone is None and all(share.adapter is None for share in now.shares)

        fake_quant.fake_quantise(self.model, group_size, plain=untouched)
        self.group_size = group_size

    def _require_fakes(self, spec: AdapterSpec, copy_paths: Sequence[str]) -> None:
        """What an adapter changes can be rounded together with the weight."""
        if spec.dropout:
            raise UserError(
                f"adapter {spec.name!r}: lora_dropout cannot be used with qat, which adds the "
                "update to the weight before it is rounded; set lora_dropout to 0"
            )
        inside = [p for p in copy_paths for m in self.model.get_submodule(p).modules()
                  if isinstance(m, fake_quant.FakeQuantLinear)]  # fmt: skip
        if inside:
            raise UserError(
                f"adapter {spec.name!r}: modules_to_save names {inside[0]}, whose copy qat does "
                "not round; target it with a low-rank update, or leave qat out"
            )

    @property
    def no_workers(self) -> str | None:
        """Why threads cannot each train on a micro-batch of their own, or None."""
        if self.group_size is not None:
            return "quantisation-aware layers round their weights once for each micro-batch"
        if self.copies:
            return "modules_to_save take their module's place while they compute"
        return None

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's trainable parameters by their key in PEFT's file format."""
        parameters: dict[str, nn.Parameter] = {}
        for path, linear in self.linears.items():
            if name in linear.specs:
                parameters[f"base_model.model.{path}.lora_A.weight"] = linear.lora_A[name]
                parameters[f"base_model.model.{path}.lora_B.weight"] = linear.lora_B[name]
        for path, copies in self.copies.items():
            if name in copies.copies:
                for key, value in copies.copies[name].named_parameters():
                    parameters[f"base_model.model.{path}.{key}"] = value
        return parameters

    def _modules(self, name: str) -> Iterator[nn.Module]:
        """The copies trained whole; the factors of low-rank layers are no modules."""
        for copies in self.copies.values():
            if name in copies.copies:
                yield from copies.copies[name].modules()

    @contextmanager
    def using(self, name: str | None) -> Iterator[PreTrainedModel]:
        """Every row takes this adapter (None: the base alone), without dropout.

        Raises:
            UserError: No adapter has that name.
        """
        if name is not None and name not in self.specs:
            raise UserError(f"no adapter is called {name!r}; there are {', '.join(self.names)}")
        with self.routing.following(Route(everyone=name)):
            yield self.model

    @contextmanager
    def sharing(
        self, shares: Sequence[Share], starts: Sequence[int] | None = None
    ) -> Iterator[PreTrainedModel]:
        """The batch's rows take the adapters that the shares say; they cover it from row 0 on.

        Args:
            shares: Runs of rows by adapter.
            starts: Where each row begins in a packed batch, and its whole length at the end.
        """
        assert shares[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(shares))
        packed = None if starts is None else tuple(starts)
        route = Route(tuple(shares), starts=packed, merges=not self._apart)
        with self.routing.following(route):
            yield self.model

    @property
    def shares_products(self) -> bool:
        """Whether several adapters are one product on this device; see `ops.MERGED_RANKS`."""
        factors = (A for linear in self.linears.values() for A in linear.lora_A.values())
        return not self._apart and any(map(ops.launches_cost, factors))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Each adapter's products are its own."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def contents(
        self, name: str, *, base_model: str | None = None, revision: str | None = None
    ) -> Mapping[str, bytes]:
        """The adapter's files in PEFT's format."""
        from lighten.adapters import files

        return files.contents(self, name, base_model=base_model, revision=revision)

    def describe(self, name: str) -> str:
        """In words for the user."""
        return f"adapter {name}: r {self.specs[name].r}, alpha {self.specs[name].alpha:g}"

    def facts(self, name: str) -> dict[str, Any]:
        """What `run.json` keeps of an adapter."""
        return {"kind": "adapter", "r": self.specs[name].r, "alpha": self.specs[name].alpha}

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """The base's own modules back in place for a moment, so that paths read as in the base."""
        self._place(lambda layer: layer.base)
        try:
            yield
        finally:
            self._place(lambda layer: layer)

    def _place(self, choose: object) -> None:
        assert callable(choose)
        for path, layer in (*self.linears.items(), *self.copies.items()):
            self.model.set_submodule(path, choose(layer))

    def detach(self) -> PreTrainedModel:
        """Take the cohort off and give the untouched base back."""
        self._place(lambda layer: layer.base)
        fake_quant.make_plain(self.model)
        return self.model

    @torch.no_grad()
    def fuse(self, name: str) -> PreTrainedModel:
        """Merge one adapter into the base's weights and take the cohort off.

        A tied head is untied when the embedding or the head was trained: one of the two has
        changed (trap 29). A quantised base becomes dense, and its configuration says so under
        `merged_base`: these are the dequantised weights that the adapter learned on (trap 30);
        `lighten export` merges onto the original ones unless `--onto dequantized` is given.
        """
        with self.using(name):
            pass  # says so if there is no such adapter
        self._place(lambda layer: layer.fused(name))
        fake_quant.make_plain(self.model)
        self._note_dense(name, make_dense(self.model))
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and head.weight is not embedding.weight:
            self.model.config.tie_word_embeddings = False
        return self.model

    def _note_dense(self, name: str, sentence: str | None) -> None:
        """Write down what a quantised base became when the adapter was merged (trap 30)."""
        if sentence is not None:
            self.model.config.merged_base = sentence
            log.warning("adapter %s is merged into %s", name, sentence)
