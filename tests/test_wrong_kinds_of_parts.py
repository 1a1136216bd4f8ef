"""Wrong kinds of values for the parts that people build with: blocks, schedules, objectives, masks. Our errors.

Each call below is right. What an argument is not follows from its annotation (tests/kinds.py). Every public name of
these rooms has a call here, so a new one is asked for one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore import masks, nn, objectives, schedules
from tests.kinds import faults

Call = tuple[Callable[..., Any], dict[str, Any]]


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return arcore.create_model(name).eval()


def x(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def every(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def answers(*shape: int) -> Tensor:
    """Which tokens are a response's: all but the first."""
    return torch.arange(shape[-1]).expand(shape) > 0


def of_method(method: str, make: Callable[[], Any], **right: Any) -> Callable[[], Call]:
    """A method of something made anew for each call, since a call that goes through may change it."""
    known = getattr(make(), method)

    @functools.wraps(known)
    def call(**given: Any) -> Any:
        return getattr(make(), method)(**given)

    call.__annotations__ = inspect.unwrap(known.__func__).__annotations__
    call.__wrapped__ = inspect.unwrap(known.__func__)  # type: ignore[attr-defined]
    return lambda: (call, right)


def block(made: Callable[..., Any], right: dict[str, Any], **given: Any) -> dict[str, Callable[[], Call]]:
    """A module: how it is made, and what it is given."""
    name = made.__name__
    calls: dict[str, Callable[[], Call]] = {name: lambda: (made, right)}
    if given:
        calls[f"{name}.forward"] = lambda: (made(**right).forward, given)
    return calls


def mask() -> masks.IntervalMask:
    return masks.causal(3)


def kv_cache() -> nn.KVCache:
    return nn.KVCache(num_layers=1, batch=1, num_heads=2, max_length=4, head_dim=2)


def token_cache() -> nn.TokenCache:
    return nn.TokenCache(num_layers=1, batch=1, num_heads=2, max_length=4, head_dim=2)


def ring_cache() -> nn.RingCache:
    return nn.RingCache(num_layers=1, batch=1, num_heads=2, window=4, head_dim=2)


def state_cache() -> nn.StateCache:
    return nn.StateCache(num_layers=1, batch=1, conv_shape=(4, 4), state_shape=(4, 8))


def rotary() -> nn.RotaryTable:
    return nn.RotaryTable(4)


def angles() -> nn.Angles:
    return rotary().span(0, 3, torch.device("cpu"))


def rope() -> nn.Rope:
    return nn.rope_table(ids(1, 3), 4, split=(2,), bases=(100.0,))


def vp() -> schedules.VPSchedule:
    return schedules.VPSchedule(num_steps=10)


def staged() -> nn.TokenCache:
    """A cache in which three tokens wait."""
    cache = token_cache()
    cache.stage(0, x(1, 2, 3, 2), x(1, 2, 3, 2))
    return cache


def mamba() -> Any:
    return nn.MambaMixer(4, d_state=4)


CONVOLUTIONS = {
    "in_channels": 1, "channels": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 2, "norm_groups": 2
}  # fmt: skip
PARTS: dict[str, Callable[[], Call]] = {
    **block(nn.MLP, {"dim": 4, "hidden_dim": 8, "approximate": "tanh"}, x=x(1, 3, 4)),
    **block(nn.SwiGLU, {"dim": 4, "hidden_dim": 8}, x=x(1, 3, 4)),
    **block(nn.GatedMLP, {"dim": 4, "hidden_dim": 8, "bias": True}, x=x(1, 3, 4)),
    **block(nn.RMSNorm, {"dim": 4, "eps": 1e-5}, x=x(1, 3, 4)),
    **block(nn.GatedRMSNorm, {"dim": 4, "groups": 2, "eps": 1e-5}, x=x(1, 3, 4), gate=x(1, 3, 4)),
    "Linear": lambda: (nn.Linear(4, 2).forward, {"input": x(1, 3, 4)}),
    **block(nn.DropPath, {"rate": 0.5}, x=x(1, 3, 4)),
    **block(
        nn.AdaLNBlock,
        {
            "dim": 4, "cond_dim": 6, "attn": nn.SelfAttention(4, 2), "ffn": nn.MLP(4, 8), "drop_path": 0.1,
            "shared": False,
        },
        x=x(1, 3, 4), cond=x(1, 6), mask=mask(), layer=0,
    ),
    **block(nn.AdaLNHead, {"dim": 4, "cond_dim": 6, "out_dim": 2}, x=x(1, 3, 4), cond=x(1, 6)),
    **block(nn.Modulation, {"cond_dim": 6, "dim": 4, "parts": 2}, cond=x(1, 6)),
    **block(nn.SharedModulation, {"cond_dim": 6, "dim": 4, "parts": 2}, cond=x(1, 6)),
    **block(nn.ModulationTable, {"dim": 4, "parts": 2}, shared=x(1, 1, 2, 4)),
    **block(
        nn.SelfAttention, {"dim": 4, "num_heads": 2, "l2_norm": True, "scale": 1.0},
        x=x(1, 3, 4), mask=mask(), cache=None, layer=0,
    ),
    **block(
        nn.CrossAttention, {"dim": 4, "num_heads": 2}, x=x(1, 3, 4), context=x(1, 5, 4), mask=masks.full(3, 5)
    ),
    **block(nn.CausalConv1d, {"channels": 4, "taps": 3, "bias": True, "activation": "silu"}, x=x(1, 4, 3)),
    **block(nn.ClassEmbedding, {"num_classes": 3, "dim": 4, "drop": 0.1}, labels=ids(2)),
    **block(
        nn.ContextEmbedding, {"num_classes": 3, "tokens": 2, "dim": 4, "null": "learned", "drop": 0.1}, labels=ids(2)
    ),
    **block(nn.LevelEmbedding, {"sizes": (1, 4), "dim": 4}),
    **block(nn.TimestepEmbedding, {"dim": 4, "frequencies": 8, "max_period": 100.0}, t=x(2)),
    **block(
        nn.ConvEncoder,
        CONVOLUTIONS,
        x=x(1, 1, 8, 8),
    ),
    **block(
        nn.ConvDecoder,
        CONVOLUTIONS,
        z=x(1, 2, 4, 4),
    ),
    **block(
        nn.DecoderLayer,
        {
            "dim": 4, "attention": nn.GroupedAttention(4, num_heads=2, num_kv_heads=1, head_dim=2),
            "mlp": nn.GatedMLP(4, 8), "norm_eps": 1e-5,
        },
    ),
    **block(
        nn.GroupedAttention,
        {"dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "qkv_bias": False, "out_bias": True},
        x=x(1, 3, 8), angles=angles(), mask=mask(), layer=0,
    ),
    **block(
        nn.DiTAttention, {"dim": 8, "num_heads": 2, "qk_norm": True}, x=x(1, 3, 8), mask=mask(), rope=rope(), layer=0
    ),
    **block(
        nn.DiTBlock, {"dim": 8, "num_heads": 2, "hidden_dim": 8, "norm": "rms", "qk_norm": True},
        x=x(1, 3, 8), cond=x(1, 1, 8), mask=mask(), passive=0, layer=0,
    ),
    **block(nn.DiTHead, {"dim": 8, "out_dim": 2, "norm": "layer"}, x=x(1, 3, 8), cond=x(1, 8)),
    **block(
        nn.DiffusionHead,
        {"channels": 2, "cond_dim": 4, "width": 8, "depth": 1, "schedule": vp(), "prediction": "eps"},
        x=x(3, 2), t=ids(3), z=x(3, 4),
    ),
    **block(nn.PatchEmbed, {"in_channels": 1, "dim": 4, "patch_size": 2}, images=x(1, 1, 4, 4)),
    **block(nn.PreNormBlock, {"dim": 4, "mixer": nn.MLP(4, 8), "mlp": nn.MLP(4, 8), "drop_path": 0.1}, x=x(1, 3, 4)),
    **block(nn.PostNormBlock, {"dim": 4, "mixer": nn.MLP(4, 8), "mlp": nn.MLP(4, 8)}, x=x(1, 3, 4)),
    **block(nn.MambaMixer, {"dim": 4, "expand": 2, "dt_rank": 1, "bias": True}, x=x(1, 3, 4)),
    **block(
        nn.Mamba2Mixer,
        {"dim": 8, "d_state": 4, "d_conv": 4, "expand": 2, "head_dim": 8, "num_groups": 1, "dt_limit": (0.0, 1.0)},
        x=x(1, 3, 8), layer=0,
    ),
    **block(nn.SelectiveSSM, {"inner": 4, "dt_rank": 1, "d_state": 4, "d_conv": 4, "dt_min": 0.001}),
    **block(
        nn.RotaryTable,
        {"head_dim": 4, "theta": 100.0, "kind": "default", "factor": 1.0, "original_length": 16},
    ),
    "RotaryTable.at": lambda: (rotary().at, {"positions": ids(3)}),
    "RotaryTable.span": lambda: (rotary().span, {"start": 0, "stop": 3, "device": torch.device("cpu")}),
    "Angles": lambda: (angles().turn, {"x": x(1, 3, 2, 4)}),
    "Rope": lambda: (rope().apply, {"x": x(1, 2, 3, 4)}),
    "KVCache": lambda: (
        nn.KVCache,
        {"num_layers": 1, "batch": 1, "num_heads": 2, "max_length": 4, "head_dim": 2, "dtype": torch.float32},
    ),
    "KVCache.append": of_method("append", kv_cache, layer=0, keys=x(1, 2, 3, 2), values=x(1, 2, 3, 2)),
    "KVCache.truncate": of_method("truncate", kv_cache, length=0),
    "KVCache.select": of_method("select", kv_cache, rows=[0]),
    "KVSnapshot": lambda: (nn.KVSnapshot, {"owner": kv_cache(), "lengths": (0,), "cuts": 0}),
    "TokenCache": lambda: (
        nn.TokenCache,
        {"num_layers": 1, "batch": 1, "num_heads": 2, "max_length": 4, "head_dim": 2, "dtype": torch.float32},
    ),
    "TokenCache.stage": of_method("stage", token_cache, layer=0, keys=x(1, 2, 3, 2), values=x(1, 2, 3, 2)),
    "TokenCache.commit": of_method("commit", staged, counts=1),
    "TokenCache.truncate": of_method("truncate", token_cache, length=0),
    "TokenCache.select": of_method("select", token_cache, rows=[0]),
    "TokenSnapshot": lambda: (nn.TokenSnapshot, {"owner": token_cache(), "lengths": (0,), "cuts": 0}),
    "RingCache": lambda: (
        nn.RingCache, {"num_layers": 1, "batch": 1, "num_heads": 2, "window": 4, "head_dim": 2, "room": 1, "sinks": 0}
    ),
    "RingCache.stage": of_method("stage", ring_cache, layer=0, keys=x(1, 2, 1, 2), values=x(1, 2, 1, 2)),
    "RingCache.mask": of_method("mask", ring_cache, new=1, within="causal"),
    "StateCache": lambda: (
        nn.StateCache,
        {"num_layers": 1, "batch": 1, "conv_shape": (4, 4), "state_shape": (4, 8), "dtype": torch.float32},
    ),
    "StateCache.layer": of_method("layer", state_cache, layer=0),
    "StateCache.advance": of_method("advance", state_cache, counts=1),
    "StateCache.select": of_method("select", state_cache, rows=[0]),
    "StateSnapshot": lambda: (nn.StateSnapshot, {"conv": x(1, 1, 4, 4), "ssm": x(1, 1, 4, 8), "lengths": (0,)}),
    "PreferenceBatch": lambda: (
        nn.PreferenceBatch, {"tokens": ids(2, 3), "mask": answers(2, 3), "preference": torch.ones(1)}
    ),
    "Rollout": lambda: (
        nn.Rollout, {"tokens": ids(2, 3), "mask": answers(2, 3), "groups": ids(2), "temperature": 1.0, "meta": {}}
    ),
    "attend": lambda: (nn.attend, {"q": x(1, 2, 3, 4), "k": x(1, 2, 3, 4), "v": x(1, 2, 3, 4), "mask": mask()}),
    "axis_base": lambda: (nn.axis_base, {"length": 4}),
    "branch_hidden": lambda: (
        nn.branch_hidden,
        {
            "model": model("llama_tiny"),
            "packed": nn.pack_branches(ids(2, 3), torch.tensor([3, 3]), torch.tensor([1, 1]), ids(2)),
        },
    ),
    "init_dit": lambda: (nn.init_dit, {"module": nn.MLP(4, 8)}),
    "init_mamba_encoder": lambda: (
        nn.init_mamba_encoder,
        {
            "patch_embed": nn.PatchEmbed(1, 4, 2),
            "layers": [nn.PreNormBlock(4, mixer=mamba(), mlp=nn.SwiGLU(4, 8))],
        },
    ),
    "BlockWeight": lambda: (
        nn.BlockWeight, {"blocks": torch.zeros(2, 1, 34, dtype=torch.uint8), "dtype": torch.float32}
    ),
    "quantise": lambda: (nn.quantise, {"module": nn.Linear(32, 2), "kind": "q8_0"}),
    "linear": lambda: (nn.linear, {"x": x(1, 3, 4), "weight": x(2, 4), "bias": x(2), "rows": 3}),
    "modulate": lambda: (nn.modulate, {"x": x(1, 3, 4), "shift": x(1, 1, 4), "scale": x(1, 1, 4), "skip": 0}),
    "modulated_norm": lambda: (nn.modulated_norm, {"x": x(1, 3, 4), "scale": x(1, 1, 4), "shift": x(1, 1, 4)}),
    "pack_branches": lambda: (
        nn.pack_branches,
        {"tokens": ids(2, 3), "lengths": torch.tensor([3, 3]), "prompts": torch.tensor([1, 1]), "groups": ids(2)},
    ),
    "pairs_to_halves": lambda: (nn.pairs_to_halves, {"weight": x(4, 4), "num_heads": 1}),
    "rope_table": lambda: (
        nn.rope_table, {"positions": ids(1, 3), "head_dim": 4, "split": (2,), "bases": (100.0,), "layout": "blockdiag"}
    ),
    "signed_angles": lambda: (nn.signed_angles, {"angles": x(3, 2)}),
    "sincos_positions": lambda: (nn.sincos_positions, {"side": 2, "dim": 4, "base": 100.0}),
    "sincos_sequence": lambda: (nn.sincos_sequence, {"length": 2, "dim": 4, "base": 100.0}),
}  # fmt: skip


def step(solver: Any, **more: Any) -> Callable[[], Call]:
    return lambda: (
        solver.step, {"output": x(2, 3), "x": x(2, 3), "t_from": torch.tensor([3, 3]), "t_to": ids(2), **more}
    )  # fmt: skip


def predicted(function: Callable[..., Any], *names: str) -> Callable[[], Call]:
    values = dict.fromkeys(names, x(2, 3))
    return lambda: (function, {"kind": "v", **values, "t": ids(2), "schedule": vp()})


LEVELS = schedules.pyramid_levels(3, 4, 1.0)
SCHEDULES: dict[str, Callable[[], Call]] = {
    "VPSchedule": lambda: (
        schedules.VPSchedule, {"kind": "linear", "num_steps": 10, "beta_start": 1e-4, "beta_end": 0.01}
    ),
    "VPSchedule.grid": lambda: (vp().grid, {"steps": 5, "spacing": "leading"}),
    "VPSchedule.alpha_sigma": lambda: (vp().alpha_sigma, {"t": ids(2)}),
    "VPSchedule.check_times": lambda: (vp().check_times, {"name": "t", "t": ids(2)}),
    "FlowSchedule": lambda: (
        schedules.FlowSchedule, {"shift": 1.0, "density": "uniform", "mean": 0.0, "std": 1.0}
    ),
    "FlowSchedule.grid": lambda: (schedules.FlowSchedule().grid, {"steps": 5}),
    "FlowSchedule.alpha_sigma": lambda: (schedules.FlowSchedule().alpha_sigma, {"t": x(2)}),
    "Solver": lambda: (schedules.Solver, {"schedule": vp(), "prediction": "eps", "clip": 1.0}),
    "DDIM": lambda: (schedules.DDIM, {"schedule": vp(), "prediction": "eps", "clip": 1.0, "eta": 0.0}),
    "DDIM.step": step(schedules.DDIM(vp())),
    "DDPM": lambda: (
        schedules.DDPM,
        {"schedule": vp(), "prediction": "eps", "clip": 1.0, "variance": "posterior", "temperature": 1.0},
    ),
    "DDPM.step": step(schedules.DDPM(vp()), noise=x(2, 3)),
    "DPMSolver2M": lambda: (schedules.DPMSolver2M, {"schedule": vp(), "prediction": "eps", "clip": 1.0}),
    "DPMSolver2M.step": step(schedules.DPMSolver2M(vp()), history=None),
    "adaptive_levels": lambda: (schedules.adaptive_levels, {"frames": 3, "steps": 4, "lag": 1}),
    "fopp_marginals": lambda: (schedules.fopp_marginals, {"frames": 3, "num_steps": 4}),
    "fopp_times": lambda: (
        schedules.fopp_times, {"batch": 2, "frames": 3, "num_steps": 4, "generator": torch.Generator()}
    ),
    "grouped_levels": lambda: (schedules.grouped_levels, {"levels": LEVELS, "frames": 2}),
    "pyramid_levels": lambda: (schedules.pyramid_levels, {"frames": 3, "steps": 4, "uncertainty": 1.0}),
    "trapezoid_levels": lambda: (schedules.trapezoid_levels, {"frames": 4, "steps": 4, "uncertainty": 1.0}),
    "sliding_windows": lambda: (schedules.sliding_windows, {"levels": LEVELS, "size": 3}),
    "table_times": lambda: (schedules.table_times, {"levels": LEVELS, "grid": vp().grid(4)}),
    "add_noise": lambda: (schedules.add_noise, {"schedule": vp(), "x": x(2, 3), "eps": x(2, 3), "t": ids(2)}),
    "broadcast_time": lambda: (schedules.broadcast_time, {"t": x(2), "x": x(2, 3)}),
    "target": predicted(schedules.target, "x0", "eps"),
    "to_x0": predicted(schedules.to_x0, "output", "x"),
    "to_eps": predicted(schedules.to_eps, "output", "x"),
}  # fmt: skip


def of_policy(function: Callable[..., Any], **more: Any) -> Callable[[], Call]:
    logprobs = -torch.ones(2, 3)
    return lambda: (
        function,
        {"logprobs": logprobs, "old": logprobs, "advantages": torch.ones(2), "mask": every(2, 3)} | more,
    )


def head() -> nn.DiffusionHead:
    return nn.DiffusionHead(2, 4, 8, 1, schedule=vp(), prediction="eps")


def of_times(function: Callable[..., Any], **more: Any) -> Callable[[], Call]:
    return lambda: (
        function, {"t": ids(2, 3), "schedule": vp(), "prediction": "x0", "snr_clip": 5.0, **more}
    )  # fmt: skip


OBJECTIVES: dict[str, Callable[[], Call]] = {
    "diffusion_head_loss": lambda: (
        objectives.diffusion_head_loss,
        {"head": head(), "tokens": x(3, 2), "z": x(3, 4), "repeats": 2, "generator": torch.Generator()},
    ),
    "diffusion_loss": lambda: (
        objectives.diffusion_loss,
        {
            "output": x(2, 3), "clean": x(2, 3), "eps": x(2, 3), "t": ids(2), "schedule": vp(), "prediction": "eps",
            "weight": x(2),
        },
    ),
    "variance_bound": lambda: (
        objectives.variance_bound,
        {
            "output": x(2, 3), "variance": x(2, 3), "clean": x(2, 3), "noisy": x(2, 3), "t": ids(2), "schedule": vp(),
            "cdf": "exact",
        },
    ),
    "discounted_returns": lambda: (
        objectives.discounted_returns,
        {"rewards": x(2, 3), "discount": 0.9, "done": ~every(2, 3), "mask": every(2, 3), "last": x(2)},
    ),
    "gae": lambda: (
        objectives.gae,
        {
            "rewards": x(2, 3), "values": x(2, 3), "discount": 0.9, "smoothing": 0.9, "done": ~every(2, 3),
            "mask": every(2, 3), "last": x(2),
        },
    ),
    "draw_visible": lambda: (
        objectives.draw_visible,
        {"batch": 2, "tokens": 4, "least": 0.7, "mean": 1.0, "std": 0.2, "generator": torch.Generator()},
    ),
    "min_snr_weights": of_times(objectives.min_snr_weights),
    "fused_snr_weights": of_times(objectives.fused_snr_weights, decay=0.9),
    "group_statistics": lambda: (
        objectives.group_statistics, {"rewards": x(4), "groups": ids(4), "deviation": "population"}
    ),
    "group_advantages": lambda: (
        objectives.group_advantages, {"rewards": x(4), "groups": ids(4), "deviation": "none", "epsilon": 0.0}
    ),
    "grpo_loss": of_policy(
        objectives.grpo_loss, clip_low=0.2, clip_high=0.2, clip_negative=3.0, ratio="token", how="sequence_mean",
        length=None, reference=x(2, 3), kl_weight=0.1, entropy=x(2, 3), entropy_share=0.5,
    ),
    "ppo_loss": of_policy(objectives.ppo_loss, clip=0.2, how="token_mean", length=None, advantages=x(2, 3)),
    "value_loss": lambda: (
        objectives.value_loss,
        {"values": x(2, 3), "returns": x(2, 3), "mask": every(2, 3), "old": x(2, 3), "clip": 0.2},
    ),
    "turn_logprobs": lambda: (
        objectives.turn_logprobs, {"logprobs": -torch.ones(2, 3), "turns": ids(2, 3), "count": 1}
    ),
    "kto_loss": lambda: (
        objectives.kto_loss,
        {"policy": x(2), "reference": x(2), "desirable": every(2), "beta": 0.1, "weights": (1.0, 1.0)},
    ),
    "preference_loss": lambda: (
        objectives.preference_loss,
        {"policy": x(2, 2), "reference": x(2, 2), "preference": torch.ones(2), "beta": 0.1, "kind": "dpo"},
    ),
    "log_ratio": lambda: (
        objectives.log_ratio, {"logprobs": x(2, 3), "old": x(2, 3), "mask": every(2, 3), "ratio": "token"}
    ),
    "sequence_logprob": lambda: (objectives.sequence_logprob, {"logprobs": x(2, 3), "mask": every(2, 3)}),
    "reduce": lambda: (
        objectives.reduce, {"values": x(2, 3), "mask": every(2, 3), "how": "token_mean", "length": None}
    ),
    "next_cluster_targets": lambda: (
        objectives.next_cluster_targets, {"images": torch.rand(1, 3, 16, 16), "patch_size": 2, "cluster": 4}
    ),
    "next_cluster_loss": lambda: (
        objectives.next_cluster_loss,
        {
            "predictions": x(1, 48, 12), "images": torch.rand(1, 3, 16, 16), "patch_size": 2, "cluster": 4,
            "block": 4, "block_weight": 0.1, "official_quirks": False,
        },
    ),
    "next_scale_loss": lambda: (
        objectives.next_scale_loss,
        {"logits": x(1, 5, 7), "indices": [ids(1, 1), ids(1, 4)], "label_smoothing": 0.1, "scale_weights": (1.0, 1.0)},
    ),
    "score": lambda: (
        objectives.score,
        {
            "model": model("llama_tiny"), "tokens": ids(1, 4), "mask": answers(1, 4),
            "temperature": 1.0, "entropy": True,
        },
    ),
    "score_rollout": lambda: (
        objectives.score_rollout,
        {
            "model": model("llama_tiny"),
            "rollout": nn.Rollout(tokens=ids(1, 4), mask=answers(1, 4), groups=ids(1)),
            "entropy": True, "packed": False,
        },
    ),
}  # fmt: skip
BOUNDS = torch.tensor([[[[0, 1], [0, 2]]]], dtype=torch.int32)
MASKS: dict[str, Callable[[], Call]] = {
    "IntervalMask": lambda: (masks.IntervalMask, {"bounds": BOUNDS, "nk": 2}),
    "IntervalMask.with_padding": lambda: (mask().with_padding, {"lengths": [2], "side": "right"}),
    "IntervalMask.rows": lambda: (mask().rows, {"start": 0, "stop": 2, "nk": 3}),
    "IntervalMask.plan": lambda: (mask().plan, {"tile_q": 16, "tile_k": 16}),
    "IntervalMask.to_cudnn": lambda: (mask().to_cudnn, {"batch": 1}),
    "from_bool": lambda: (masks.from_bool, {"mask": every(2, 2)}),
    "TreeMask": lambda: (
        masks.TreeMask, {"words": masks.tree([-1, 0], 3).words, "prefix": 3}
    ),
    "block_causal": lambda: (masks.block_causal, {"sizes": [1, 2]}),
    "causal": lambda: (masks.causal, {"n": 3, "offset": 1}),
    "documents": lambda: (masks.documents, {"lengths": [1, 2], "causal": True}),
    "full": lambda: (masks.full, {"nq": 2, "nk": 3}),
    "next_scale": lambda: (masks.next_scale, {"scales": [1, 2]}),
    "next_scale_markov": lambda: (masks.next_scale_markov, {"scales": [1, 2]}),
    "prefix_lm": lambda: (masks.prefix_lm, {"n": 3, "prefix": 1}),
    "reference_tile_plan": lambda: (masks.reference_tile_plan, {"mask": mask(), "tile_q": 16, "tile_k": 16}),
    "skip_causal": lambda: (
        masks.skip_causal, {"num_blocks": 2, "block_size": 2, "order": "clean_first", "drop_last_clean": False}
    ),
    "skip_causal_step": lambda: (masks.skip_causal_step, {"block": 1, "block_size": 2}),
    "sliding_window": lambda: (masks.sliding_window, {"n": 4, "window": 2, "sinks": 1}),
    "tree": lambda: (masks.tree, {"parents": [-1, 0], "prefix": 3}),
}  # fmt: skip
ROOMS: dict[ModuleType, dict[str, Callable[[], Call]]] = {
    nn: PARTS,
    schedules: SCHEDULES,
    objectives: OBJECTIVES,
    masks: MASKS,
}
CALLS = {
    f"{room.__name__.split('.')[-1]}.{name}": call
    for room, calls in ROOMS.items()
    for name, call in calls.items()
}
# Results, which nobody makes by hand, and constructors whose argument is an object of torch.
RESULTS = {"from_block_mask", "TilePlan", "Labels", "Segment", "Extended", "PackedBranches", "TokenStats"} | {
    "Advantages", "GroupStatistics", "NextClusterLoss", "History", "Windows"
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_refused_in_our_words(name: str):
    function, right = CALLS[name]()
    # Of sizes that do not fit a weight torch says itself which they are.
    assert faults(function, right, values=name != "nn.linear") == []


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name: str):
    function, right = CALLS[name]()
    function(**right)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_public_name_has_a_call(room: ModuleType):
    called = {name.split(".")[0] for name in ROOMS[room]} | RESULTS
    protocols = {name for name in room.__all__ if getattr(getattr(room, name), "_is_protocol", False)}
    values = {
        name
        for name in room.__all__
        if not inspect.isclass(getattr(room, name)) and not inspect.isroutine(getattr(room, name))
    }
    assert set(room.__all__) - called - protocols - values == set()
