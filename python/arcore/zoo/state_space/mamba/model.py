"""Mamba: the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn import Extended, MambaMixer, RMSNorm, StateCache, linear
from arcore.nn.checks import check_ids, dtype_name
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import Parents
from arcore.ops import mamba_step
from arcore.ops._registration import untracked
from arcore.ops.mamba_step import DTYPES as STEP_DTYPES
from arcore.zoo.state_space._attention import CausalAttention, HybridCache
from arcore.zoo.state_space._common import no_more, original_config, original_layers, transformers_config
from arcore.zoo.state_space.mamba.config import MambaConfig, StateSpaceConfig

# Prompts are read in pieces of about so many tokens, all rows together: intermediate results then need the same memory
# for any length, and are small enough that the allocator keeps them instead of asking the system for fresh pages.
PREFILL_TOKENS = 512
# Widths of feed-forward networks are rounded up to a multiple of this.
MLP_MULTIPLE = 128
# Rows up to which one op per layer takes less time than torch's products of many rows, by the dtype of the weights.
STEP_ROWS = {torch.float32: 64, torch.bfloat16: 32}


class GatedMLP(nn.Module):
    """`fc2(a * silu(b))` with a and b from one linear layer, without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = -(-hidden // MLP_MULTIPLE) * MLP_MULTIPLE
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = linear(x, self.fc1.weight).chunk(2, dim=-1)
        out: Tensor = linear(values * F.silu(gates), self.fc2.weight)
        return out


class LayerNorm(nn.LayerNorm):
    """PyTorch's, computed in float32; the result has the dtype of the weight, as that of `arcore.nn.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def make_norm(config: StateSpaceConfig) -> nn.Module:
    """A norm of the width C, of the config's kind."""
    return (RMSNorm if config.rms_norm else LayerNorm)(config.d_model, eps=config.norm_eps)


class MambaLayer(nn.Module):
    """Norm and mixer of one layer, and norm and feed-forward network where there is one."""

    def __init__(self, config: StateSpaceConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = mixer
        self.norm2: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if config.d_intermediate:
            self.norm2 = make_norm(config)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate)

    def step_weights(self) -> dict[str, Any] | None:
        """What `arcore.ops.mamba_step` asks of norm and mixer; None where they are not what it computes."""
        norm, mixer = self.norm, self.mixer
        if (
            type(self) is not MambaLayer
            or type(norm) is not RMSNorm
            or norm._forward_hooks
            or norm._forward_pre_hooks
            or norm.weight.dtype not in STEP_DTYPES
            or not norm.weight.is_cpu
            or not isinstance(mixer, MambaMixer)
            or not mixer.fits_step()
        ):
            return None
        return {"norm": norm.weight.detach().float(), "eps": norm.eps, **mixer.step_weights()}

    def fed(self, x: Tensor) -> Tensor:
        """The residual stream after the feed-forward network."""
        if self.mlp is None or self.norm2 is None:
            return x
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


@check_kinds
class Mamba(nn.Module):
    """The language model. A `DraftableModel` (`arcore.nn.protocols`) for chains of drafts.

    Args:
        config: settings.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.vocab_size: int = config.vocab_size
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        self.embedding = nn.Embedding(rows, config.d_model, _weight=torch.empty(rows, config.d_model))
        self.layers: Any = nn.ModuleList(
            MambaLayer(
                config,
                CausalAttention(config.d_model, config) if i in config.attn_layer_idx else self.make_mixer(),
            )
            for i in range(config.n_layer)
        )
        self.norm_f = make_norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)
        self._init_weights()

    def make_mixer(self) -> nn.Module:
        """The mixer of one layer."""
        config: MambaConfig = self.config
        return MambaMixer(
            config.d_model,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
            bias=config.bias,
            conv_bias=config.conv_bias,
        )

    @torch.no_grad()
    def _init_weights(self) -> None:
        if self.embedding.weight.is_meta:
            return
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("in_proj.bias", "out_proj.bias")):
                parameter.zero_()
            elif name.endswith(("out_proj.weight", "fc2.weight")):
                # The variance of the residual stream stays the same for any depth.
                parameter.div_((self.config.n_layer * (2 if self.config.d_intermediate else 1)) ** 0.5)

    def shard_units(self) -> list[nn.Module]:
        """Parts whose weights are gathered one after the other where they are sharded over processes."""
        return [layer.mixer for layer in self.layers]

    @check_kinds
    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at each position.

        Args:
            ids: int64 `[B, L]`.
            mask: bool `[B, L]`, False at padding, which no token sees; what comes out there means nothing.
            seq_idx: int32 `[B, L]`, which of several sequences packed into a row each token belongs to; they do not
                see each other. Negative means padding.
            cu_seqlens: int32 or int64 `[S + 1]`, the same for a single row (B = 1): starts of S sequences, and L.

        Returns:
            float32 `[B, L, V]`, V rounded up as the config says.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong, an id out of range, or both `seq_idx` and `cu_seqlens` are given.
        """
        x = self._embed(ids, 2)
        packed = self._packing(ids, mask, seq_idx, cu_seqlens)
        for layer in self.layers:
            x = layer.fed(x + layer.mixer(layer.norm(x), seq_idx=packed))
        return self._logits(x)

    def branches(self, prompt: Tensor, continuations: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a prompt, read once, and of several continuations of it, as if each stood in a row of its own.

        Args:
            prompt: int64 `[P]`.
            continuations: int64 `[G, L]`, right-padded; what comes out at padding means nothing.

        Returns:
            float32 `[P, V]` and `[G, L, V]`.

        Raises:
            TypeError: the layers' mixers cannot go on from a state with gradients.
            ValueError: a shape is wrong or an id out of range.
        """
        x, y = self._embed(prompt[None], 2), self._embed(continuations, 2)
        for layer in self.layers:
            if not hasattr(layer.mixer, "branches"):
                raise TypeError(
                    f"expected mixers with branches but got {type(layer.mixer).__name__}; score rows one by one"
                )
            one, other = layer.mixer.branches(layer.norm(x), layer.norm(y))
            x, y = layer.fed(x + one), layer.fed(y + other)
        return self._logits(x)[0], self._logits(y)

    def make_cache(self, batch: int, max_length: int | None = None) -> StateCache:
        """An empty cache for `batch` rows; it has room for any length.

        Args:
            batch: rows.
            max_length: tokens for which attention layers make room at once; where there are more, they make more.
        """
        attention = [i for i in range(len(self.layers)) if i in self.config.attn_layer_idx]
        states = [i for i in range(len(self.layers)) if i not in attention]
        mixer: Any = self.layers[states[0]].mixer
        weight = self.embedding.weight
        of_states: dict[str, Any] = {
            "batch": batch,
            "conv_shape": mixer.conv_shape,
            "state_shape": mixer.state_shape,
            "dtype": weight.dtype,
            "device": weight.device,
        }
        if not attention:
            return StateCache(num_layers=len(states), **of_states)
        attending: Any = self.layers[attention[0]].mixer
        return HybridCache(
            state_layers=states,
            attention_layers=attention,
            num_heads=attending.num_kv_heads,
            head_dim=attending.head_dim,
            taps_shape=attending.taps_shape,
            room=max_length,
            **of_states,
        )

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: StateCache, mask: Tensor | None = None) -> Tensor:
        """Read several tokens per row; arguments, result and errors are those of `TokenModel` and `forward`."""
        x = self._embed(ids, 2)
        if x.shape[1] == 0:
            raise ValueError("expected at least one token per row but got none")
        packed = None
        if mask is not None and not mask.all():
            packed = self._packing(ids, mask, None, None)
            if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
                raise ValueError(
                    "expected padding only before the tokens of a row, not after or between them"
                )
            if cache.length:
                raise ValueError("expected padding only in the first tokens that a cache receives")
        size = max(64, PREFILL_TOKENS // max(len(ids), 1))
        for start in range(0, ids.shape[1], size):
            piece = slice(start, start + size)
            last = x[:, piece]
            ids_of = None if packed is None else packed[:, piece]
            for i, layer in enumerate(self.layers):
                last = layer.fed(last + layer.mixer(layer.norm(last), seq_idx=ids_of, cache=cache, layer=i))
            cache.advance(last.shape[1] if mask is None else mask[:, piece].sum(1))
        return self._logits(last[:, -1])

    @torch.no_grad()
    def step(self, ids: Tensor, cache: StateCache) -> Tensor:
        """Read one token per row; arguments and result are those of `TokenModel`."""
        x = self._embed(ids, 1)
        plans = self._plans(x, cache)
        if plans:
            x = x.clone()  # written in place, and whoever hooks the embedding may keep what it returned
        for i, layer in enumerate(self.layers):
            plan = plans.get(i)
            if plan is None:
                x = x + layer.mixer.step(layer.norm(x), cache, i)
            else:
                conv_state, state = cache.layer(i)
                mamba_step(x, **plan, conv_state=conv_state, state=state)
            x = layer.fed(x)
        cache.advance(1)
        return self._logits(x)

    def _plans(self, x: Tensor, cache: StateCache) -> dict[int, Any]:
        """By layer, what one op for the whole layer needs to read a token, which spares a CPU what is not products.

        Empty where the op does not fit, or where torch multiplies so many rows in less time.
        """
        most = STEP_ROWS.get(cache.conv.dtype, 0)
        if (
            not 0 < len(x) <= most
            or len(x) != cache.batch
            or x.dtype not in STEP_DTYPES
            or torch.is_autocast_enabled("cpu")
            or not untracked(x)
        ):
            return {}
        if not cache.plans:
            cache.plans = {i: layer.step_weights() for i, layer in enumerate(self.layers)}
        return cache.plans

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: StateCache, parents: Parents | None = None) -> Extended:
        """Read drafted tokens without counting them in; arguments and result are those of `DraftableModel`.

        Raises:
            ValueError: the drafts are no chain: a state has no branches.
        """
        x = self._embed(ids, 2)
        drafts = ids.shape[1]
        chain = list(range(-1, drafts - 1))
        given = [] if parents is None else torch.as_tensor(parents).reshape(-1, drafts).tolist()
        if drafts == 0 or any(row != chain for row in given):
            raise ValueError(
                f"expected a chain of drafts, each after the one before, but got {drafts} with parents={parents}; a "
                "state has no branches"
            )
        cache.stage(drafts)
        for i, layer in enumerate(self.layers):
            x = layer.fed(x + layer.mixer.step(layer.norm(x), cache, i))
        cache.rewind()
        hidden = self.norm_f(x)
        return Extended(self._logits(x), hidden)

    def _attention(self) -> Iterator[CausalAttention]:
        return (layer.mixer for layer in self.layers if isinstance(layer.mixer, CausalAttention))

    def _embed(self, ids: Tensor, axes: int) -> Tensor:
        if ids.dim() != axes:
            shape = "[B, L]" if axes == 2 else "[B]"
            raise ValueError(f"expected token ids of shape {shape} but got {tuple(ids.shape)}")
        check_ids("token ids", ids, self.embedding.num_embeddings)
        x: Tensor = self.embedding(ids)
        return x.float() if self.config.residual_in_fp32 else x

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return linear(self.norm_f(x), weight).float()

    @staticmethod
    def _packing(
        ids: Tensor, mask: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """The sequence of each token as int32, negative at padding; None when every row is one sequence."""
        if seq_idx is not None and cu_seqlens is not None:
            raise ValueError("expected seq_idx or cu_seqlens, not both")
        if cu_seqlens is not None:
            if len(ids) != 1 or cu_seqlens.dim() != 1:
                raise ValueError(
                    f"expected cu_seqlens of shape [S + 1] with one row of ids but got {tuple(cu_seqlens.shape)} with "
                    f"{len(ids)} rows; use seq_idx for several"
                )
            bounds = cu_seqlens.tolist()
            if not bounds or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, ids.shape[1]):
                raise ValueError(f"expected cu_seqlens to rise from 0 to {ids.shape[1]} but got {bounds}")
            places = torch.arange(ids.shape[1], device=ids.device)
            seq_idx = torch.bucketize(places, cu_seqlens[1:-1], right=True, out_int32=True).unsqueeze(0)
        for name, given in (("mask", mask), ("seq_idx", seq_idx)):
            if given is not None and given.shape != ids.shape:
                raise ValueError(f"expected {name} of shape {tuple(ids.shape)} but got {tuple(given.shape)}")
        if mask is None:
            return seq_idx
        if mask.dtype != torch.bool:
            raise TypeError(f"expected mask of dtype bool but got {dtype_name(mask.dtype)}")
        ones = torch.zeros_like(ids, dtype=torch.int32) if seq_idx is None else seq_idx
        return ones.masked_fill(~mask, -1)

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> Any:
        """The config of published weights, from the config.json beside them, of the authors' code or transformers.

        Raises:
            ValueError: it is of another kind of model, or asks for what this one cannot do.
        """
        if "d_model" in content:
            ssm = original_layers(content, "Mamba1")
            known = {"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}
            fields = original_config(content) | {name: ssm.pop(name) for name in known & ssm.keys()}
            if fields.get("dt_rank") == "auto":
                fields["dt_rank"] = None
            no_more(ssm)
        else:
            fields = transformers_config(content, "mamba")
            rank = content.get("time_step_rank", "auto")
            fields |= {"d_state": content.get("state_size", 16), "dt_rank": None if rank == "auto" else rank}
            inner = content.get("intermediate_size", fields["expand"] * fields["d_model"])
            if inner != fields["expand"] * fields["d_model"]:
                raise ValueError(f"intermediate_size={inner} is not expand * hidden_size")
        return MambaConfig(**fields)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names; a tied last layer is the embedding once more.

        Raises:
            ValueError: the config ties the two but they differ.
        """
        ours = {
            key.removeprefix("backbone.").replace("embeddings.weight", "embedding.weight"): value
            for key, value in state.items()
        }
        for name in [name for name in ours if name.endswith(".mixer.rotary_emb.inv_freq")]:
            rates, rotary = ours.pop(name), next((part.rotary for part in self._attention()), None)
            if rotary is None or not torch.allclose(rates.float(), rotary.rates, rtol=1e-2, atol=0):
                raise ValueError(f"{name} are not the rates of attn_rotary_base in the config")
        if self.lm_head is None and "embedding.weight" in ours:
            head = ours.pop("lm_head.weight", None)
            if head is not None and not torch.equal(head.float(), ours["embedding.weight"].float()):
                raise ValueError(
                    "lm_head.weight is not the embedding, but the config ties them; set tie_embeddings=False"
                )
        return ours
