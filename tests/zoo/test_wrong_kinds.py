"""Wrong kinds of values for the public functions of systems: our errors, as tests/test_wrong_kinds.py has it.

Each call below is right. What an argument is not follows from its annotation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import LookupDrafter, Sampling
from tests.kinds import faults

Made = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Callable[[], Made]] = {}


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return arcore.create_model(name).eval()


def call(function: Callable[[], Made]) -> Callable[[], Made]:
    CALLS[function.__name__] = function
    return function


def pairs() -> Tensor:
    return torch.tensor([[-3.0, -4.0], [-2.0, -1.5]])


def tokens() -> Tensor:
    return torch.tensor([[1, 2, 3, 4]])


def every(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def game() -> Any:
    return np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.9], [0.8, 0.1, 0.5]])


@call
def inpo_loss() -> Made:
    from arcore.zoo.alignment.inpo import inpo_loss

    return inpo_loss, {
        "policy": pairs(), "reference": pairs(), "previous": pairs(), "preference": torch.ones(2),
        "tau": 0.1, "eta": 0.3, "weight": torch.ones(2),
    }  # fmt: skip


@call
def self_play() -> Made:
    from arcore.zoo.alignment.inpo import self_play

    third = np.full(3, 1 / 3)
    return self_play, {
        "preferences": game(),
        "reference": third,
        "tau": 0.1,
        "iterations": 2,
        "step": "plain",
    }


@call
def nft_loss() -> Made:
    from arcore.zoo.alignment.nft import nft_loss

    return nft_loss, {
        "logprobs": -torch.ones(4, 3), "old": -torch.ones(4, 3), "correct": torch.tensor([1, 0, 0, 1]),
        "groups": torch.tensor([0, 0, 1, 1]), "mask": every((4, 3)), "prompt_weight": "root", "floor": 1.0,
        "ratio": "token", "how": "token_mean",
    }  # fmt: skip


@call
def win_rate_rewards() -> Made:
    from arcore.zoo.alignment.spo import win_rate_rewards

    return win_rate_rewards, {"wins": torch.full((2, 2), 0.5)}


@call
def spo_loss() -> Made:
    from arcore.zoo.alignment.spo import spo_loss

    logprobs = -torch.ones(1, 2, 3)
    return spo_loss, {
        "logprobs": logprobs, "old": logprobs, "wins": torch.full((1, 2, 2), 0.5), "mask": every((1, 2, 3)),
        "clip_low": 0.2, "how": "sequence_mean",
    }  # fmt: skip


@call
def minimax_winner() -> Made:
    from arcore.zoo.alignment.spo import minimax_winner

    return minimax_winner, {"preferences": game()}


@call
def srpo_loss() -> Made:
    from arcore.zoo.alignment.srpo import srpo_loss

    reviser = torch.zeros(2, 2, 2)
    return srpo_loss, {
        "policy": pairs(), "reviser": reviser, "reference_policy": pairs(), "reference_reviser": reviser,
        "preference": torch.ones(2), "beta": 0.2, "alpha": 0.5, "weight": torch.ones(2),
    }  # fmt: skip


@call
def ddo_loss() -> Made:
    from arcore.zoo.alignment.ddo import ddo_loss

    return ddo_loss, {
        "logp": torch.zeros(3), "ref": torch.zeros(3), "own": torch.zeros(3), "own_ref": torch.zeros(3),
        "alpha": 1.0, "beta": 0.5,
    }  # fmt: skip


@call
def optimum() -> Made:
    from arcore.zoo.alignment.ddo import optimum

    return optimum, {"data": torch.tensor([0.6, 0.4]), "ref": torch.tensor([0.5, 0.5]), "beta": 1.0}


@call
def rain() -> Made:
    from arcore.zoo.alignment.rain import Rain, RainConfig

    return Rain, {
        "model": model("llama_tiny"), "prompt": [1, 2], "evaluator": lambda tokens: 0.0, "max_new_tokens": 2,
        "config": RainConfig(), "stop": [3], "seed": 0,
    }  # fmt: skip


@call
def sjd_decode_image() -> Made:
    from arcore.zoo.acceleration.sjd import decode_image

    images = model("llamagen_tiny")
    return decode_image, {"model": images, "prompt": images.prompt(torch.tensor([3])), "side": 2, "window": 4}


@call
def alignment_loss() -> Made:
    from arcore.zoo.raster.arra.model import alignment_loss

    return alignment_loss, {"adapted": torch.randn(2, 3, 4), "features": torch.randn(2, 4)}


@call
def controlled() -> Made:
    net = model("controlar_tiny")
    size = net.image_size
    return net.controlled, {"control": torch.ones(1, 1, size, size), "strength": 0.5}


@call
def dd2_generate() -> Made:
    return model("dd2_tiny").generate, {"labels": torch.tensor([3])}


@call
def dd2_nearest() -> Made:
    from arcore.zoo.raster.dd2.model import nearest

    return nearest, {"vectors": torch.randn(2, 3), "codebook": torch.randn(4, 3)}


@call
def iconshop_draw() -> Made:
    return model("iconshop_tiny").draw, {"prompts": [model("iconshop_tiny").prompt([])], "seed": 0}


@call
def erase_loss() -> Made:
    from arcore.zoo.raster.ear.erasing import erase_loss

    states = torch.randn(2, 3, 4)
    return erase_loss, {
        "hidden": states,
        "target": states,
        "positive": states,
        "neutral": states,
        "strength": 1.0,
    }


@call
def erase() -> Made:
    from arcore.zoo.raster.ear.erasing import Erasing, erase

    how = Erasing(updates=1, pairs=1)
    return erase, {"model": model("llamagen_tiny"), "erased": 3, "toward": 8, "how": how}


@call
def decode_together() -> Made:
    from arcore.zoo.next_scale.code import decode_together, small_pair

    drafter, refiner = small_pair()
    return decode_together, {
        "drafter": drafter, "refiner": refiner, "tokenizer": model("msvq_tiny"), "labels": torch.tensor([1]),
        "draft_scales": 2, "cfg_scale": 1.5, "top_k": 2,
    }  # fmt: skip


@call
def caption_loss() -> Made:
    from arcore.zoo.multimodal.ett.model import caption_loss

    net = model("ett_tiny")
    vectors = torch.randn(1, net.config.num_codes, net.config.code_channels)
    return caption_loss, {"model": net, "vectors": vectors, "captions": net.encode(["three"])}


@call
def xomni_draw() -> Made:
    return model("xomni_tiny").draw, {"captions": ["three"], "min_p": 0.03, "temperature": 1.0}


@call
def read_both_ways() -> Made:
    from arcore.zoo.language.bico.objective import read_both_ways

    return read_both_ways, {"model": model("llama_tiny"), "ids": tokens(), "hidden": ~every((1, 4))}


@call
def bico_loss() -> Made:
    from arcore.zoo.language.bico.objective import bico_loss

    return bico_loss, {
        "model": model("llama_tiny"),
        "ids": tokens(),
        "valid": every((1, 4)),
        "both": True,
        "rate": 0.5,
    }


@call
def masked_loss() -> Made:
    from arcore.zoo.language.bico.objective import masked_loss

    return masked_loss, {"logits": torch.randn(1, 4, 9), "ids": tokens(), "masked": every((1, 4))}


@call
def sequencematch_loss() -> Made:
    from arcore.zoo.language.sequencematch.loss import sequencematch_loss

    return sequencematch_loss, {
        "logits": torch.randn(1, 4, 5), "actions": torch.tensor([[1, 2, 3]]), "sampled": torch.randn(1, 3, 5),
        "mask": every((1, 3)), "sampled_mask": every((1, 2)), "alpha": 0.1, "gamma": 0.9,
    }  # fmt: skip


@call
def write_with_backspace() -> Made:
    from arcore.zoo.language.sequencematch.edits import with_backspace, write_with_backspace

    writer = with_backspace(model("llama_tiny"))
    return write_with_backspace, {
        "model": writer, "prompt": [1, 2], "backspace": writer.vocab_size - 1, "max_new_tokens": 2,
        "sampling": Sampling(), "seed": 0, "allowed": True,
    }  # fmt: skip


@call
def noisy() -> Made:
    from arcore.zoo.language.sequencematch.edits import noisy

    return noisy, {"ids": tokens(), "backspace": 9, "rate": 0.5}


@call
def linear_attention() -> Made:
    from arcore.zoo.learning_theory.icl_gradient_descent import LinearAttention

    return LinearAttention([0.1]).forward, {
        "x": torch.randn(1, 3, 2).double(),
        "y": torch.randn(1, 2).double(),
    }


@call
def gradient_descent() -> Made:
    from arcore.zoo.learning_theory.icl_gradient_descent import gradient_descent

    return gradient_descent, {"x": torch.randn(1, 3, 2), "y": torch.randn(1, 2), "eta": [0.1]}


@call
def categorical_entropy() -> Made:
    from arcore.zoo.learning_theory.markov_categories.geometry import categorical_entropy

    return categorical_entropy, {"logits": torch.randn(2, 5), "divergence": "kl", "alpha": 2.0}


@call
def head_metric() -> Made:
    from arcore.zoo.learning_theory.markov_categories.geometry import head_metric

    return head_metric, {"weight": torch.randn(5, 3), "probs": torch.full((2, 5), 0.2)}


@call
def draw_sequences() -> Made:
    from arcore.zoo.learning_theory.mesa_optimisation import draw_sequences

    return draw_sequences, {
        "count": 2, "dim": 2, "length": 5, "start": "ones", "scale": 1.0, "generator": torch.Generator()
    }  # fmt: skip


@call
def express() -> Made:
    from arcore.zoo.learning_theory.objective_formalisms import deterministic, express, two_states

    return express, {
        "environment": two_states(), "policies": deterministic(two_states()), "ranking": [[1, 2], [0, 3]],
        "formalism": "markov",
    }  # fmt: skip


@call
def play_game() -> Made:
    from arcore.zoo.learning_theory.optimistic_mirror_descent import play_game

    return play_game, {"payoff": game(), "optimism": True, "step": 0.1, "rounds": 3}


@call
def mirror_descent() -> Made:
    from arcore.zoo.learning_theory.optimistic_mirror_descent import MirrorDescent

    return MirrorDescent, {
        "start": [0.0, 0.0],
        "domain": "ball",
        "radius": 1.0,
        "optimism": True,
        "step": 0.1,
    }


@call
def compute_spectrum() -> Made:
    from arcore.zoo.biology.crossnovo.spectra import compute_spectrum

    return compute_spectrum, {"ids": [1, 2, 3], "generator": torch.Generator(), "dropout": 0.3, "noise": 0.2}


@call
def crossnovo_search() -> Made:
    from arcore.zoo.biology.crossnovo.spectra import batch_of, compute_spectrum

    batch = batch_of([compute_spectrum([1, 2, 3], torch.Generator())], model("crossnovo_tiny").config.peaks)
    return model("crossnovo_tiny").search, {"batch": batch, "row": 0, "beam": 1, "tolerance": 0.1}


@call
def design() -> Made:
    from arcore.zoo.biology.protein_mpnn.claim import helices

    return model("protein_mpnn_tiny").design, {
        "backbones": helices(1, 6), "letters": torch.zeros(1, 6, dtype=torch.int64), "free": every((1, 6)),
        "temperature": 0.5, "omit": "X",
    }  # fmt: skip


@call
def generate_paths() -> Made:
    from arcore.zoo.series.kronos.generating import generate_paths

    return generate_paths, {
        "model": model("kronos_tiny"), "tokenizer": model("kronos_tokenizer_tiny"), "values": torch.randn(1, 8, 6),
        "calendar": torch.ones(1, 10, 5, dtype=torch.int64), "horizon": 2, "paths": 1,
    }  # fmt: skip


@call
def next_state() -> Made:
    from arcore.zoo.dynamics.lifegpt.model import next_state

    return next_state, {"state": torch.zeros(1, 3, 3, dtype=torch.int64), "rule": "life"}


@call
def life_prompts() -> Made:
    from arcore.zoo.dynamics.lifegpt.model import prompts

    return prompts, {"states": torch.zeros(1, 3, 3, dtype=torch.int64)}


@call
def weighted_reward_loss() -> Made:
    from arcore.zoo.alignment.dynamic_reward_weighting import weighted_reward_loss

    return weighted_reward_loss, {
        "logprobs": -torch.ones(2, 3), "old": -torch.ones(2, 3), "rewards": torch.ones(2, 2),
        "weights": torch.ones(2), "groups": torch.tensor([0, 0]), "mask": every((2, 3)), "deviation": "none",
    }  # fmt: skip


@call
def hypervolume() -> Made:
    from arcore.zoo.alignment.dynamic_reward_weighting import hypervolume

    return hypervolume, {"points": [[0.5, 0.5]], "reference": [0.0, 0.0]}


@call
def gradient_weights() -> Made:
    from arcore.zoo.alignment.dynamic_reward_weighting import gradient_weights

    return gradient_weights, {"weights": torch.ones(2), "gradients": torch.ones(2, 5), "lr": 0.1, "mu": 1.0}


@call
def guided_by() -> Made:
    from arcore.zoo.alignment.genarm.loss import guided_by

    return guided_by, {"base": model("llama_tiny"), "rewards": [model("llama_tiny")], "alphas": [0.5]}


@call
def arm_loss() -> Made:
    from arcore.zoo.alignment.genarm.loss import arm_loss

    answer = (tokens(), every((1, 4)))
    return arm_loss, {"model": model("llama_tiny"), "preferred": answer, "rejected": answer, "beta": 0.1}


@call
def length_controlled() -> Made:
    from arcore.zoo.alignment.length_controlled import LengthControlled, synthetic

    rows = synthetic(1.5, rows=40)
    return LengthControlled().fit, {
        "preference": rows["preference"], "length": rows["length"], "baseline_length": rows["baseline_length"]
    }  # fmt: skip


@call
def scst_loss() -> Made:
    from arcore.zoo.alignment.generative_rl.methods import scst_loss

    return scst_loss, {"logprobs": -torch.ones(2, 3), "rewards": torch.ones(2), "greedy": torch.ones(2)}


@call
def skipping_model() -> Made:
    from arcore.zoo.acceleration.first.routing import SkippingModel

    return SkippingModel, {"model": model("llama_tiny"), "skip": [1]}


@call
def routers() -> Made:
    from arcore.zoo.acceleration.first.routing import Routers

    return Routers, {"dim": 8, "num_layers": 4, "keep_first": 1, "keep_last": 1, "threshold": 0.5}


@call
def routed_loss() -> Made:
    from arcore.zoo.acceleration.first.routing import Routers, routed_loss

    small = arcore.create_model("llama_tiny", num_layers=3)
    return routed_loss, {
        "model": small, "routers": Routers(small.config.dim, 3), "ids": tokens(), "price": 0.1
    }  # fmt: skip


@call
def lantern_decode_image() -> Made:
    from arcore.zoo.acceleration.lantern.relax import decode_image

    images = model("llamagen_tiny")
    return decode_image, {
        "model": images, "drafter": LookupDrafter(), "codebook": torch.randn(images.config.vocab_size, 3),
        "prompt": images.prompt(torch.tensor([3])), "side": 2, "delta": 0.1, "neighbours": 2, "multiplicative": False,
    }  # fmt: skip


@call
def hydra_loss() -> Made:
    from arcore.zoo.acceleration.hydra.heads import hydra_loss

    base = model("llama_tiny")
    heads = arcore.create_model("hydra_tiny", dim=base.config.dim, vocab_size=base.vocab_size)
    ids = torch.arange(12).unsqueeze(0)
    return hydra_loss, {"heads": heads, "model": base, "ids": ids, "lm": 1.0, "teacher": 0.0}


@call
def hydra_drafter() -> Made:
    from arcore.decoding import TreeShape
    from arcore.zoo.acceleration.hydra.drafter import HydraDrafter

    return HydraDrafter, {"heads": model("hydra_tiny"), "shape": TreeShape.full(2, 1)}


@call
def action_values() -> Made:
    from arcore.zoo.agents.arsq.values import ActionValues

    return ActionValues, {
        "state": 3, "dims": 1, "levels": 2, "bins": 3, "alpha": 0.1, "autoregressive": True, "width": 8
    }  # fmt: skip


@call
def to_tokens() -> Made:
    from arcore.zoo.agents.arsq.values import to_tokens

    return to_tokens, {"actions": torch.zeros(2, 1), "dims": 1, "levels": 2, "bins": 3}


@call
def to_actions() -> Made:
    from arcore.zoo.agents.arsq.values import to_actions

    return to_actions, {"tokens": torch.zeros(2, 2, dtype=torch.int64), "dims": 1, "levels": 2, "bins": 3}


@call
def clone() -> Made:
    from arcore.zoo.agents.vla_rl import Sums, table_policy
    from arcore.zoo.agents.vla_rl.training import clone

    observations, actions = Sums(8, seed=0).demonstrations(16, 0.5)
    return clone, {
        "policy": table_policy(seed=0), "observations": observations, "actions": actions, "steps": 1, "seed": 0,
        "batch": 4, "lr": 0.1,
    }  # fmt: skip


@call
def obfuscate() -> Made:
    from arcore.zoo.language.obfuscate.rename import obfuscate

    return obfuscate, {"text": "x = 1"}


@call
def translate() -> Made:
    from arcore.zoo.language.nar.registry import translate

    return translate, {"model": model("nar_tiny"), "rows": [[3, 4]], "iterations": 2}


@call
def make_pair() -> Made:
    from arcore.zoo.language.compare_objectives.model import make_pair

    return make_pair, {"objective": "PLM", "texts": tokens(), "generator": torch.Generator()}


@call
def thresholdout() -> Made:
    from arcore.zoo.statistics.reusable_holdout import Thresholdout

    return Thresholdout().fit, {"train": [0.0, 1.0], "holdout": [0.0, 1.0]}


@call
def infill() -> Made:
    net = model("xtrimopglm_tiny")
    return net.infill, {
        "ids": [1, net.vocabulary.specials.span_mask, 2], "max_new_tokens": 2, "sampling": Sampling(), "seed": 0,
        "least": 1,
    }  # fmt: skip


def forecasts(preset: str) -> Made:
    net = model(preset)
    config = net.config
    rows = config.context + config.horizon
    return net.forecast, {
        "values": torch.ones(1, config.context, getattr(config, "channels", 2)),
        "calendar": torch.ones(1, rows, 5, dtype=torch.int64), "horizon": config.horizon,
    }  # fmt: skip


for name in ("autoformer_tiny", "gpht_tiny", "st_ssdl_tiny", "dp_mobility_tiny"):
    CALLS[f"forecast of {name}"] = functools.partial(forecasts, name)


def pictures(preset: str, method: str) -> Made:
    net = model(preset)
    images = torch.zeros(1, net.config.in_channels, net.config.image_size, net.config.image_size)
    value = images if method == "encode" else net.encode(images)
    function = getattr(net, method)
    return function, {next(iter(inspect.signature(function).parameters)): value}


for name in ("kl_tiny", "titok_kl_tiny", "vq16_tiny", "msvq_tiny"):
    for method in ("encode", "decode"):
        CALLS[f"{method} of {name}"] = functools.partial(pictures, name, method)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_refused_in_our_words(name: str):
    function, right = CALLS[name]()
    assert faults(function, right) == []


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    function, right = CALLS[name]()
    function(**right)
