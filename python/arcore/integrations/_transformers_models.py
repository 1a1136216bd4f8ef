"""Causal language models of transformers in our decoding loops, and our attention op in models of transformers."""

from __future__ import annotations

import contextvars
import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore._optional import require
from arcore.masks import IntervalMask, TreeMask
from arcore.nn.causal import left_aligned
from arcore.nn.decoder import attend
from arcore.nn.protocols import Extended, Parents
from arcore.nn.token_cache import TokenCache

ATTENTION = "arcore"
# The mask of the call in progress; without one, transformers' own mask is translated.
_MASK: contextvars.ContextVar[IntervalMask | TreeMask | None] = contextvars.ContextVar("mask", default=None)


def register_attention() -> str:
    """Make the name "arcore" an attention implementation of transformers.

        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register_attention())

    Causal masks, sliding windows and padding are translated into ranges of keys; a mask that has no such form is an
    error. Calling this twice does no harm.

    Returns:
        The name, `"arcore"`.

    Raises:
        ImportError: transformers is missing.
    """
    require("transformers", extra="transformers")
    modeling = require("transformers.modeling_utils", extra="transformers")
    masking = require("transformers.masking_utils", extra="transformers")
    modeling.AttentionInterface.register(ATTENTION, _attention)
    masking.AttentionMaskInterface.register(ATTENTION, _mask(masking.sdpa_mask))
    return ATTENTION


def _mask(original: Any) -> Any:
    def arcore_mask(*args: Any, **kwargs: Any) -> Any:
        # A mask of booleans is only made where ours is not known already.
        return None if _MASK.get() is not None else original(*args, **kwargs)

    return arcore_mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} asks for attention with {name}, which this integration does not pass on; use "
                'attn_implementation="sdpa"'
            )
    if dropout:
        raise NotImplementedError(
            f'attention of "arcore" has no dropout but {type(module).__name__} asks for {dropout}; set it to 0'
        )
    mask = _MASK.get()
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if attention_mask is None:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            # A single query of a cache sees all keys; transformers leaves the mask out then.
            mask = masks.causal(queries, keys - queries) if causal else masks.full(queries, keys)
        else:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            mask = masks.from_bool(allowed[..., :keys])
        mask = mask.to(query.device)
    if scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6:
        query = query * (scaling * query.shape[-1] ** 0.5)
    return attend(query, key, value, mask).transpose(1, 2), None


class TransformersModel(nn.Module):
    """A causal language model of transformers as a model of our loops.

        model = TransformersModel(AutoModelForCausalLM.from_pretrained("..."))
        arcore.decoding.generate(model, ids, max_new_tokens=20)

    Models that are made of attention alone read drafts too (`extend`), so they can be the target or the drafter of
    speculative decoding, and their keys and values lie in a `TokenCache`, where nothing is concatenated. Others, such
    as Mamba, can be prefilled and stepped.

    Args:
        model: the model, on any device.

    Raises:
        ImportError: transformers is missing.
        TypeError: it is no causal language model.
    """

    def __new__(cls, model: Any) -> TransformersModel:
        made: type[TransformersModel] = _Stateful if _is_stateful(model) else _Attentive
        return super().__new__(made if cls is TransformersModel else cls)

    def __init__(self, model: Any) -> None:
        super().__init__()
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                f"expected a causal language model of transformers but got {type(model).__name__}"
            )
        self.model = model
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        # The argument's name has changed over the versions of transformers.
        parameters = inspect.signature(model.forward).parameters
        names = [name for name in ("cache", "past_key_values", "cache_params") if name in parameters]
        if not names:
            raise TypeError(f"{type(model).__name__} takes no cache by a name that is known here")
        self._name = names[0]

    def make_cache(self, batch: int, max_length: int) -> Any:
        """An empty cache for `batch` rows of up to `max_length` tokens, drafts included."""
        raise NotImplementedError

    def prefill(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
        """See `TokenModel`."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """See `TokenModel`."""
        return self.prefill(ids.unsqueeze(1), cache)


class _Attentive(TransformersModel):
    """Attention layers only."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.text = model.config.get_text_config()
        windows = getattr(self.text, "sliding_window", None)
        kinds = set(getattr(self.text, "layer_types", None) or [])
        if windows and kinds != {"full_attention"}:
            raise TypeError(
                f"{type(model).__name__} has layers with a sliding window, which is not supported here; "
                "arcore.create_model loads Mistral"
            )
        model.set_attn_implementation(register_attention())

    def make_cache(self, batch: int, max_length: int) -> _KeysAndValues:
        longest = getattr(self.text, "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise ValueError(
                f"the model is made for texts of {longest} tokens but {max_length} were asked for"
            )
        return _KeysAndValues(self.model, batch, max_length)

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: _KeysAndValues, mask: Tensor | None = None) -> Tensor:
        tokens = cache.tokens
        ids, counts = left_aligned(ids, tokens, mask)
        if isinstance(counts, int):
            logits = self._read(ids, cache, None, logits_to_keep=1)[0][:, -1]
        else:
            last = torch.tensor(counts, device=ids.device) - 1
            logits = self._read(ids, cache, None)[0][torch.arange(len(ids), device=ids.device), last]
        tokens.commit(counts)
        return logits

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: _KeysAndValues, parents: Parents | None = None) -> Extended:
        """See `DraftableModel`."""
        logits, hidden = self._read(ids, cache, parents, output_hidden_states=True)
        return Extended(logits, hidden)

    def _read(
        self, ids: Tensor, cache: _KeysAndValues, parents: Parents | None, **options: Any
    ) -> tuple[Tensor, Any]:
        lengths, new = cache.lengths, ids.shape[1]
        prefix = torch.tensor(lengths)
        mask: IntervalMask | TreeMask
        if parents is None:
            depth = torch.arange(new).expand(ids.shape)
            stop = prefix.unsqueeze(1) + depth + 1
            bounds = torch.stack([torch.zeros_like(stop), stop], -1).unsqueeze(1)
            mask = IntervalMask(bounds, cache.length + new)
        else:
            mask = TreeMask.from_parents(torch.as_tensor(parents, device="cpu"), list(lengths))
            depth = mask.depth.expand(ids.shape)
        positions = (prefix.unsqueeze(1) + depth).to(ids.device)
        token = _MASK.set(mask.to(ids.device))
        try:
            options |= {self._name: cache.bridge, "position_ids": positions, "use_cache": True}
            out = self.model(input_ids=ids, **options)
        finally:
            _MASK.reset(token)
        hidden = out.hidden_states[-1] if out.hidden_states else None
        return out.logits.float(), hidden


class _KeysAndValues:
    """A `TokenCache` that a model of transformers writes into; its layers appear with the first tokens."""

    def __init__(self, model: Any, batch: int, max_length: int) -> None:
        text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        weight = next(model.parameters())
        self.tokens = TokenCache(
            num_layers=text.num_hidden_layers,
            batch=batch,
            num_heads=heads,
            max_length=max_length,
            head_dim=dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.bridge = _bridge(self.tokens, text.num_hidden_layers)

    def __getattr__(self, name: str) -> Any:
        if name == "tokens":
            raise AttributeError(name)
        return getattr(self.tokens, name)

    def fork(self, rows: Any = None) -> _KeysAndValues:
        """See `TokenCache`."""
        other = object.__new__(_KeysAndValues)
        other.tokens = self.tokens.fork(rows)
        other.bridge = _bridge(other.tokens, len(self.bridge.layers))
        return other


def _bridge(tokens: TokenCache, num_layers: int) -> Any:
    """A cache of transformers whose layers stage what they get in ours."""
    library = require("transformers.cache_utils", extra="transformers")

    class Layer(library.CacheLayerMixin):  # type: ignore[misc, name-defined]
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer
            self.is_initialized = True

        def lazy_initialization(self, *args: Any) -> None: ...

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return tokens.stage(self.layer, keys, values)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return tokens.length + int(query_length), 0

        def get_seq_length(self, *args: Any) -> int:
            return tokens.length

        def get_max_length(self) -> int:
            return tokens.max_length

    return library.Cache(layers=[Layer(layer) for layer in range(num_layers)])


class _Stateful(TransformersModel):
    """Models with a state besides keys and values, or instead of them."""

    def make_cache(self, batch: int, max_length: int) -> _State:
        library = require("transformers.cache_utils", extra="transformers")
        return _State(library.DynamicCache(config=self.model.config), batch)

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: _State, mask: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {self._name: cache.inner, "use_cache": True}
        if mask is not None and not bool(mask.all()):
            if cache.length:
                raise ValueError("expected padding only in the first tokens that a cache receives")
            options["attention_mask"] = mask.long()
            cache.padding = mask
        out = self.model(input_ids=ids, **options)
        cache.inner = getattr(out, self._name, None) or cache.inner
        cache.length += ids.shape[1]
        logits: Tensor = out.logits[:, -1].float()
        return logits


class _State:
    """A cache of transformers behind the names of ours."""

    def __init__(self, inner: Any, batch: int) -> None:
        self.inner, self.batch, self.length = inner, batch, 0
        self.padding: Tensor | None = None

    def snapshot(self) -> Any:
        """A copy of everything."""
        return copy.deepcopy(self.inner), self.length

    def restore(self, snapshot: Any) -> None:
        """See `arcore.nn.Cache`."""
        inner, self.length = snapshot
        self.inner = copy.deepcopy(inner)

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """See `arcore.nn.Cache`."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        self.inner.reorder_cache(index)
        self.batch = len(index)


def _is_stateful(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    return bool(getattr(model, "_is_stateful", False) or kinds - attention)
