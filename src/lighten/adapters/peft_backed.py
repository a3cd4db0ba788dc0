"""A cohort of one that PEFT's own modules train: DoRA, PiSSA, OLoRA, and every method PEFT has.

PEFT replaces modules for the whole batch at once, so one adapter is all that fits. What it trains
is float32; on a base of another format its modules run under autocast, so that products are in the
base's format and what they hand on is too. Quantised layers are shown to it as plain ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_state
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import PreTrainedModel

from lighten.adapters import dense_view, virtual_tokens
from lighten.adapters.cohort import Cohort
from lighten.adapters.frozen import formats
from lighten.adapters.layers import Share
from lighten.adapters.ops import mixed_seed
from lighten.adapters.peft_methods import configured
from lighten.adapters.peft_starts import Starts
from lighten.adapters.spec import OWN_INITS, AdapterSpec
from lighten.errors import UserError

# PEFT's name for the one adapter; ours may hold dots.
KEY = "default"
# What trains a prompt and is not saved with it, for going on from a checkpoint.
ENCODER = "prompt_encoder.safetensors"


class PeftBacked(Cohort):
    """One adapter of PEFT's on a base, with a cohort's interface.

    Outside of `using` and `sharing` the adapter is active.

    Args:
        model: The frozen base.
        spec: The adapter.
        config: PEFT's configuration, if it is not to be made from the spec.

    Raises:
        UserError: The method does not fit the base.
    """

    def __init__(
        self, model: PreTrainedModel, spec: AdapterSpec, config: PeftConfig | None = None
    ) -> None:
        super().__init__(model)
        self.specs = {spec.name: spec}
        self._format = model.dtype
        self._formats = formats(model)
        self._on, self._learns = True, True
        self._requires_grad: dict[str, bool] = {}
        self._config = configured(spec, model) if config is None else config
        self.method = str(self._config.peft_type.value)  # type: ignore[union-attr]
        base = {id(parameter) for parameter in model.parameters()}
        dense_view.put_on(model)
        with _seeded(model, spec.seed):
            try:
                self._peft = get_peft_model(model, self._config, KEY)
            except (ValueError, TypeError, ImportError, NotImplementedError) as error:
                raise UserError(f"peft: {self.method} cannot train this base: {error}") from error
            self._parts = self._outermost()
            self._starts = Starts(self._parts, spec, KEY)
        self._added = {n: p for n, p in self._peft.named_parameters() if id(p) not in base}
        for parameter in self._added.values():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        self._prompted: nn.Module | None = None
        if self._config.is_prompt_learning:
            self._prompted = virtual_tokens.install(self._peft, model, lambda: self._on)
        for path, part in self._parts.items():
            if path in self._starts or self._format != torch.float32:
                part.forward = self._in_format(path, part)
        self._drop(False)  # new modules begin in train mode

    @property
    def dtype(self) -> torch.dtype:
        """The base's format."""
        return self._format

    @property
    def supports_fast_loss(self) -> bool:
        """Whether the head is a plain layer, whose product can be formed in chunks."""
        return self.model.get_output_embeddings() not in self._parts.values()

    @property
    def no_packing(self) -> str | None:
        """Why rows must not stand behind each other, or None."""
        if self._config.is_prompt_learning:
            return f"{self.method} puts a learnt prompt in front of every row"
        return None

    @property
    def no_workers(self) -> str | None:
        """Why threads cannot each train on a micro-batch of their own, or None."""
        return f"{self.method} is computed by PEFT's own modules, one micro-batch at a time"

    @property
    def no_checkpointing(self) -> str | None:
        """Why layers cannot be recomputed in the backward pass, or None."""
        if self._config.peft_type in virtual_tokens.PREFIXES:
            return f"{self.method} keeps keys and values, to which a layer run twice adds twice"
        return None

    def describe(self, name: str) -> str:
        """In words for the user."""
        facts = self.facts(name)
        size = f", r {facts['r']}, alpha {facts['alpha']:g}" if facts["alpha"] else ""
        return f"adapter {name}: {facts['method']}{size}"

    def facts(self, name: str) -> dict[str, Any]:
        """What `run.json` keeps of the adapter, and who can serve it as it is."""
        spec = self.specs[name]
        if spec.peft is None:
            start = "" if spec.init_lora_weights in OWN_INITS else f" ({spec.init_lora_weights})"
            method = ("DoRA" if spec.use_dora else "LoRA") + start
            size: dict[str, Any] = {"r": spec.r, "alpha": spec.alpha}
        else:
            method, size = self.method, {"r": spec.peft.get("r"), "alpha": None}
        plain = method.startswith("LoRA") and spec.peft is None
        merging = "PEFT alone" if self._config.is_prompt_learning else "merge it for vLLM"
        return {**size, "method": method, "serving": "as it is" if plain else merging}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters by their key in PEFT's files, where they have one there."""
        assert name in self.specs
        places = {_place(value): key for key, value in self._state().items()}
        return {places.get(_place(p), key): p for key, p in self._added.items() if p.requires_grad}

    def _modules(self, name: str) -> Iterator[nn.Module]:
        """The base with PEFT's modules in it, and the learnt prompt."""
        assert name in self.specs
        return self._peft.modules()

    def contents(
        self, name: str, *, base_model: str | None = None, revision: str | None = None
    ) -> Mapping[str, bytes]:
        """The adapter's files in PEFT's format, to be used on the untouched base."""
        assert name in self.specs
        config = {**self._config.to_dict(), **self._starts.config()}
        config |= {"base_model_name_or_path": base_model, "revision": revision}
        config["inference_mode"] = True
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
        weights = {key: _on_cpu(value) for key, value in self._saved().items()}
        files = {
            "adapter_config.json": text.encode(),
            "adapter_model.safetensors": to_bytes(weights, metadata={"format": "pt"}),
        }
        if encoder := self._encoder():
            files[ENCODER] = to_bytes({key: _on_cpu(value) for key, value in encoder.items()})
        return files

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shape by key of what `contents` saves."""
        assert name in self.specs
        return {key: tuple(value.shape) for key, value in self._saved().items()}

    @torch.no_grad()
    def restore(
        self, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor],
        after_each: Callable[[], None] | None = None, *, where: str | None = None,
    ) -> None:  # fmt: skip
        """As of any method; PEFT copies all weights at once, and `after_each` is called after that.

        Raises:
            UserError: They are not whole or do not fit.
        """
        from lighten.adapters import files  # which knows this

        assert name in self.specs
        folder = None if isinstance(source, Mapping) else Path(source)
        weights = dict(source) if isinstance(source, Mapping) else files.read_weights(Path(source))
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        files.check_fit(shapes, self.shapes(name), where or str(folder or "what is to be restored"))
        weights = self._starts.parted(weights)
        device = {key: value.to(self.model.device) for key, value in weights.items()}
        set_state(self._peft, device, KEY)
        if encoder := self._encoder():
            if folder is None or not (folder / ENCODER).is_file():
                raise UserError(
                    f"{folder}: has no {ENCODER}, so that {self.method} can be used but not "
                    "trained further"
                )
            for key, value in load_file(folder / ENCODER).items():
                encoder[key].copy_(value)
        if after_each is not None:
            after_each()

    @contextmanager
    def using(self, name: str | None) -> Iterator[PreTrainedModel]:
        """Every row takes the adapter (None: the base alone), without dropout.

        Raises:
            UserError: No adapter has that name.
        """
        with super().using(name):
            was_on = self._on
            self._switch(name is not None)
            try:
                yield self.model
            finally:
                self._switch(was_on)

    @contextmanager
    def sharing(
        self, shares: Sequence[Share], starts: Sequence[int] | None = None
    ) -> Iterator[PreTrainedModel]:
        """Every row takes the one adapter, or none.

        PEFT draws its dropout for the batch as a whole. The draws are a function of the seed and of
        the rows' keys, so that a resumed run repeats them, but not of a row alone.
        """
        adapters = {share.adapter for share in shares}
        assert len(adapters) == 1, "PEFT's modules cannot tell rows apart"
        name = adapters.pop()
        keys = [key for share in shares for key in share.dropout_keys or ()]
        learns = name is not None and bool(keys)
        with super().sharing(shares, starts), self.using(name):
            was_learning = self._learns
            self._drop(learns)
            try:
                if not learns:
                    yield self.model
                else:
                    with _seeded(self.model, mixed_seed(self.specs[str(name)].seed, *keys)):
                        yield self.model
            finally:
                self._drop(was_learning)

    def detach(self) -> PreTrainedModel:
        """Take the adapter off and give the untouched base back."""
        self._switch(True)
        for path, part in self._parts.items():
            module: Any = part
            wrapped = isinstance(part, AuxiliaryTrainingWrapper)
            self.model.set_submodule(
                path, module.original_module if wrapped else _base_layer(module)
            )
        if self._prompted is not None:
            del self._prompted.forward
            self._prompted = None
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        dense_view.take_off(self.model)
        self._parts = {}
        return self.model.requires_grad_(False)

    @torch.no_grad()
    def fuse(self, name: str) -> PreTrainedModel:
        """Merge the adapter into the base's weights through PEFT; a quantised base becomes dense.

        Raises:
            UserError: The method cannot be merged, or no adapter has that name.
        """
        with self.using(name):
            pass
        tuner = self._peft.base_model
        if self._config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
            raise UserError(f"{self.method} is no change of weights, so it cannot be merged")
        self._untie()
        sentence = dense_view.settle(self.model)
        self._starts.merge()
        try:
            tuner.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise UserError(f"{self.method} cannot be merged: {error}") from error
        dense_view.turn(self.model)
        self._note_dense(name, sentence)
        for key, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self._formats.get(key, self._format))
        self._parts = {}
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and head.weight is not embedding.weight:
            self.model.config.tie_word_embeddings = False
        return self.model.requires_grad_(False)

    def _outermost(self) -> dict[str, nn.Module]:
        """PEFT's modules that stand in the base's places, by path."""
        outermost: dict[str, nn.Module] = {}
        last: str | None = None
        for path, module in self.model.named_modules():
            inside = last is not None and path.startswith(f"{last}.")
            if not inside and _is_pefts(module):
                outermost[path], last = module, path
        return outermost

    def _in_format(self, path: str, part: nn.Module) -> Any:
        """The part's forward in the base's format, what the start took from the base taken off."""
        forward, dtype = part.forward, self._format
        device = self.model.device.type
        subtracts_start = path in self._starts

        def run(x: Tensor, *args: Any, **options: Any) -> Any:
            if not self._on:
                return forward(x, *args, **options)
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                out = forward(x, *args, **options)
            if subtracts_start:
                out = out - self._starts.product(path, x)
            return out.to(dtype) if isinstance(out, Tensor) else out

        return run

    def _switch(self, on: bool) -> None:
        """Adapter or base; PEFT turns every weight's gradient on with the adapter."""
        if on == self._on:
            return
        self._on = on
        if self._config.is_prompt_learning:
            return
        tuner: Any = self._peft.base_model
        if on:
            tuner.enable_adapter_layers()
        else:
            self._requires_grad = {key: p.requires_grad for key, p in self._added.items()}
            tuner.disable_adapter_layers()
        for key, parameter in self._added.items():
            parameter.requires_grad_(self._requires_grad[key])

    def _drop(self, on: bool) -> None:
        """PEFT's modules in train mode, for their dropout; the base never is."""
        if on == self._learns:
            return
        self._learns = on
        for part in self._parts.values():
            part.train(on)
        if self._config.is_prompt_learning:
            self._peft.prompt_encoder.train(on)

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = get_peft_model_state_dict(
            self._peft, adapter_name=KEY, save_embedding_layers=False
        )
        return state

    def _saved(self) -> dict[str, Tensor]:
        """What goes into the adapter's file: with a start from the base, twice the rank."""
        return self._starts.joined(self._state())

    def _encoder(self) -> dict[str, Tensor]:
        """Parameters that train a prompt but are not what is saved of it."""
        if not self._config.is_prompt_learning or self._config.inference_mode:
            return {}
        saved = {tuple(value.shape) for value in self._state().values()}
        saved_as_is = (
            len(self._added) == 1 and {tuple(p.shape) for p in self._added.values()} == saved
        )
        return {} if saved_as_is else {key: p.detach() for key, p in self._added.items()}

    def _untie(self) -> None:
        """A tied head or embedding that learnt gets a weight of its own before it is merged."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is None or _base_layer(head).weight is not _base_layer(embedding).weight:
            return
        for part in (head, embedding):
            if part in self._parts.values() and isinstance(part, BaseTunerLayer):
                layer = _base_layer(part)
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
                self.model.config.tie_word_embeddings = False


def load(
    model: PreTrainedModel, name: str, folder: str | os.PathLike[str], weights: Mapping[str, Tensor]
) -> PeftBacked:
    """Attach a saved adapter of any PEFT method to a base, frozen.

    Args:
        model: The base.
        name: What it shall be called.
        folder: Its folder.
        weights: Its own tensors, see `files.adapter_tensors`.

    Raises:
        UserError: The method is not known here, or does not fit the base.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: PEFT cannot read this adapter: {error}") from error
    config.inference_mode = True
    settings = config.to_dict()
    lora = config.peft_type == "LORA"
    spec = AdapterSpec(name, peft={"peft_type": str(config.peft_type.value)})
    if lora:
        config.init_lora_weights = True  # the saved ones come anyway
        spec = AdapterSpec(
            name, settings["r"], settings["lora_alpha"], use_dora=bool(settings.get("use_dora"))
        )
    adapter = PeftBacked(model, spec, config)
    adapter.restore(name, weights, where=str(folder))
    for parameter in adapter.parameters(name).values():
        parameter.requires_grad_(False)
    return adapter


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from this seed inside, and afterwards as if nothing had been drawn."""
    device: torch.device = model.device  # type: ignore[assignment]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _is_pefts(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _base_layer(part: Any) -> Any:
    return part.get_base_layer() if hasattr(part, "get_base_layer") else part


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Where a tensor lies: one that is fake has no address, but a storage of its own."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.shape
