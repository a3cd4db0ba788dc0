"""The base's own weights in training: all of them, or those of its last decoder layers.

Weights that learn are float32, and so are their gradients and the optimiser's state; products run
in the base's format through autocast (mixed precision, arXiv 1710.03740). What stays frozen keeps
the base's format, and nothing below the first layer that learns is kept for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lighten.adapters import fake_quant
from lighten.adapters.decoder import decoder_layers
from lighten.adapters.layers import Share
from lighten.adapters.shards import STEM, Shard, Shards
from lighten.adapters.trained import Trained
from lighten.errors import UserError


class WholeBase(Trained):
    """A base that learns itself: its parameters are trained, under their own names.

    Args:
        model: The base; what learns of it becomes float32.
        dtype: Format of the products, and of the frozen weights and the finished model, but for
            what the base has in float32 beside 16 bits (routers of experts).
        last: Train the last so many decoder layers only; None: everything.
        name: What the base is called where adapters have names.
        qat_group_size: Compute as once quantised to int8 activations and int4 weights in groups of
            so many; None: as the weights are.
        layers_later: Decoder layers' matrices are not float32 yet: whoever spreads them over ranks
            makes them so, a layer at a time (`make_float32`).

    Raises:
        UserError: The base has fewer layers, does not say which they are, or is quantised.
    """

    folder: ClassVar[str] = "weights"
    learns_base: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        last: int | None = None,
        name: str = "default",
        qat_group_size: int | None = None,
        layers_later: bool = False,
    ) -> None:
        self.model, self.last = model, last
        self._name, self._dtype = name, dtype
        layers = decoder_layers(model) if last is not None else []
        if last is not None and not layers:
            raise UserError(
                f"trainable_layers: {type(model).__name__} does not say which its decoder layers "
                "are; use method: full, or adapters"
            )
        if last is not None and last > len(layers):
            raise UserError(
                f"trainable_layers: last_{last} is more than the {len(layers)} decoder layers of "
                f"{type(model).__name__}; use at most last_{len(layers)}, or method: full to train "
                "everything"
            )
        learning = layers[-last:] if last is not None else [model]
        self._wide = _in_float32(model)
        model.requires_grad_(False)
        for parameter in (p for module in learning for p in module.parameters()):
            if not parameter.is_floating_point():
                raise UserError(
                    f"method: full cannot train {type(model).__name__}'s quantised weights "
                    f"({parameter.dtype}); load the base unquantised, or train adapters"
                )
            parameter.requires_grad_(True)
        for module in learning:
            make_float32(module, layers_later=layers_later)
        if qat_group_size is not None:
            fake_quant.fake_quantise(model, qat_group_size, computes=dtype)
        self._hooks: list[RemovableHandle] = []
        self._wrapped: list[nn.Module] = []
        if dtype != torch.float32:
            head = model.get_output_embeddings() if last is None else None
            outer = [model, model.base_model, head] if last is None else learning
            self._mix({id(m): m for m in outer if m is not None}.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self._name,)

    @property
    def dtype(self) -> torch.dtype:
        """The format that products are computed in."""
        return self._dtype

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that learn, by the base's own names; a tied one appears once."""
        assert name == self._name
        return {key: p for key, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def using(self, name: str | None) -> Iterator[PreTrainedModel]:
        """The model as it is.

        Raises:
            UserError: Another name, or the untouched base, which is no longer there.
        """
        if name != self._name:
            raise UserError(
                f"the base's own weights are being trained under the name {self._name!r}; "
                "the untouched base has to be loaded anew"
            )
        yield self.model

    @contextmanager
    def sharing(
        self, shares: Sequence[Share], starts: Sequence[int] | None = None
    ) -> Iterator[PreTrainedModel]:
        """Every row takes the base."""
        assert {share.adapter for share in shares} == {self._name}
        del starts  # rows are told apart by attention alone
        yield self.model

    def contents(
        self, name: str, *, base_model: str | None = None, revision: str | None = None
    ) -> Mapping[str, bytes | Shard]:
        """What a checkpoint keeps: the weights that learn, in float32."""
        del base_model, revision  # a checkpoint's own files say neither
        return Shards(self.parameters(name), STEM)

    def describe(self, name: str) -> str:
        """In words for the user."""
        assert name == self._name
        if self.last is None:
            return "every weight of the base"
        return f"the base's last {self.last} of {len(decoder_layers(self.model))} decoder layers"

    def facts(self, name: str) -> dict[str, Any]:
        """What `run.json` keeps: a base that learns has neither rank nor alpha."""
        assert name == self._name
        return {"kind": "model", "r": None, "alpha": None}

    def detach(self) -> PreTrainedModel:
        """The plain model with its weights as they are."""
        for hook in self._hooks:
            hook.remove()
        for module in self._wrapped:
            del module.forward
        self._hooks, self._wrapped = [], []
        fake_quant.make_plain(self.model)
        return self.model

    def format_of(self, key: str) -> torch.dtype:
        """What a weight that learnt is rounded to in the finished model."""
        return torch.float32 if key in self._wide else self._dtype

    @torch.no_grad()
    def fuse(self, name: str) -> PreTrainedModel:
        """The plain model, its weights rounded once to the base's formats, nothing learning."""
        for key, parameter in self.parameters(name).items():
            parameter.data = parameter.data.to(self.format_of(key))
            parameter.grad = None
            parameter.requires_grad_(False)
        return self.detach()

    def _mix(self, outer: Any) -> None:
        """Autocast inside the outer modules; what crosses modules is in the products' format.

        Modules that multiply by a float32 weight outside autocast's list (norms, embeddings) would
        hand float32 on: twice the activations, and formats that attention kernels cannot mix.
        """
        for module in outer:
            module.forward = _autocast(module.forward, self.model, self._dtype)
            self._wrapped.append(module)
        for module in self.model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                self._hooks.append(module.register_forward_hook(self._in_format))

    def _in_format(self, *call: Any) -> Any:
        """A forward hook: (module, arguments, what came out)."""
        out = call[-1]
        floating = isinstance(out, Tensor) and out.is_floating_point()
        return out.to(self._dtype) if floating else out


def _in_float32(model: PreTrainedModel) -> frozenset[str]:
    """Weights that a model in 16 bits has in float32, which is so on purpose."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    if not any(value.dtype in (torch.bfloat16, torch.float16) for value in weights.values()):
        return frozenset()
    return frozenset(key for key, value in weights.items() if value.dtype == torch.float32)


@torch.no_grad()
def make_float32(module: nn.Module, *, layers_later: bool = False) -> None:
    """Give a module's weights the format in which weights learn.

    Args:
        module: A model, or a part of it.
        layers_later: Leave the matrices of a model's decoder layers as they are.
    """
    later: set[nn.Parameter] = set()
    if layers_later and isinstance(module, PreTrainedModel):
        layers = decoder_layers(module)
        later = {p for layer in layers for p in layer.parameters() if p.dim() > 1}
    for parameter in module.parameters():
        # One of eight bits has a scale somewhere, and is no number by itself.
        if parameter not in later and parameter.is_floating_point() and parameter.itemsize > 1:
            # The same object in another format: a tied head stays tied (trap 29).
            parameter.data = parameter.data.float()


def _autocast(forward: Any, model: PreTrainedModel, dtype: torch.dtype) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Where the model is now: one that is spread over ranks is moved as it is.
        with torch.autocast(model.device.type, dtype=dtype):
            return forward(*args, **kwargs)

    return run
