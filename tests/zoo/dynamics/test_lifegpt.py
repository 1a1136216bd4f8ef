"""The automata against their definition, forgetful masks, and an automaton trained and run from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcore.cli import main
from arcore.masks import causal
from arcore.zoo.dynamics.lifegpt.model import (
    IGNORED,
    AbsolutePositions,
    LifeGPT,
    forgetful,
    learned,
    lessons,
    lifegpt_tiny,
    next_state,
    prompts,
    random_states,
)
from arcore.zoo.dynamics.lifegpt.recipe import LifeOptions, LifeSampling
from tests.zoo.protocol_language import Protocol as Protocol


def by_definition(state: list[list[int]], born: set[int], survives: set[int]) -> list[list[int]]:
    height, width = len(state), len(state[0])
    out = [[0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            around = sum(
                state[(i + di) % height][(j + dj) % width]
                for di in (-1, 0, 1)
                for dj in (-1, 0, 1)
                if di or dj
            )
            out[i][j] = int(around in (survives if state[i][j] else born))
    return out


@pytest.mark.parametrize(("rule", "born", "survives"), [("life", {3}, {2, 3}), ("B36/S23", {3, 6}, {2, 3})])
def test_rules_of_two_dimensions(rule: str, born: set[int], survives: set[int]):
    states = random_states(20, 5, 7, torch.Generator().manual_seed(0))
    expected = torch.tensor([by_definition(state, born, survives) for state in states.tolist()])
    assert torch.equal(next_state(states, rule), expected)


def test_elementary_rules():
    states = random_states(10, 1, 9, torch.Generator().manual_seed(0))
    for number in (0, 30, 110, 255):
        found = next_state(states, str(number))
        for row, new in zip(states[:, 0].tolist(), found[:, 0].tolist(), strict=True):
            for j in range(9):
                pattern = 4 * row[j - 1] + 2 * row[j] + row[(j + 1) % 9]
                assert new[j] == number >> pattern & 1


def test_texts():
    state = torch.tensor([[[0, 1, 1], [0, 0, 0], [1, 0, 1]]])
    ids, targets = lessons(state, "life")
    after = "".join(map(str, next_state(state, "life").flatten().tolist()))
    whole = f"@PredictNextState<011000101> [{after}]$"
    assert bytes(ids[0].tolist()).decode() == whole[:-1]
    start = prompts(state).shape[1]
    assert (targets[0, : start - 1] == IGNORED).all()
    assert bytes(targets[0, start - 1 :].tolist()).decode() == whole[start:]


def test_hidden_tokens_are_seen_by_themselves_alone():
    hidden = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.3
    allowed = forgetful(hidden).to_bool()[:, 0]
    own = torch.eye(11, dtype=torch.bool)
    expected = causal(11).to_bool()[0, 0] & (~hidden.unsqueeze(1) | own)
    assert torch.equal(allowed, expected)
    none = forgetful(torch.zeros(1, 11, dtype=torch.bool)).to_bool()
    assert torch.equal(none, causal(11).to_bool())


@torch.no_grad()
def test_absolute_positions_tell_places_apart_and_keep_no_cache():
    torch.manual_seed(0)
    model = AbsolutePositions(lifegpt_tiny())
    ids = torch.full((1, 6), 48)
    assert (model(ids)[0, 0] - model(ids)[0, 5]).abs().max() > 1e-5
    with pytest.raises(RuntimeError, match="absolute positions are for whole texts"):
        model.make_cache(1, 8)


def test_the_automaton_that_a_model_runs_has_the_shape_of_its_states():
    torch.manual_seed(0)
    model = LifeGPT(lifegpt_tiny()).eval()
    states = random_states(2, 3, 4, torch.Generator().manual_seed(0))
    frames, formed = model.roll_out(states, 3)
    assert frames.shape == (2, 4, 3, 4)
    assert torch.equal(frames[:, 0], states)
    assert formed[:, 0].all()
    assert not formed[:, 1:].any()


def test_bad_input():
    with pytest.raises(ValueError, match=r"--rule 256: expected life, a rule such as B36/S23"):
        LifeOptions(rule="256")
    with pytest.raises(ValueError, match="is of one dimension: give --height 1, not 4"):
        LifeOptions(rule="110", height=4)
    with pytest.raises(ValueError, match="needs --height and --width of at least 3"):
        LifeOptions(rule="life")
    with pytest.raises(ValueError, match="must be at least 1 but got 0"):
        LifeSampling(frames=0)
    with pytest.raises(ValueError, match="must end in one of"):
        LifeSampling(out=Path("life.mp3"))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "run")
    cells = ["--rule", "life", "--height", "3", "--width", "4", "--pairs", "50"]
    assert main(["train", "lifegpt_tiny", *cells, "--steps", "2", "--batch-size", "4", "--out", out]) == 0
    gif = tmp_path / "life.gif"
    assert main(["sample", out, "--state", "0100/0110/0000", "--frames", "2", "--out", str(gif)]) == 0
    assert "of 2 states follow rule life" in capsys.readouterr().out
    image = pytest.importorskip("PIL.Image").open(gif)
    assert image.format == "GIF"
    with image:
        assert 1 <= image.n_frames <= 3
    assert main(["sample", out, "--state", "0100/0110", "--out", str(gif)]) == 2
    assert "expected 3 rows of 4 cells" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_ring_is_learned():
    assert learned(LifeGPT, "110", 8, 250) > 0.9
