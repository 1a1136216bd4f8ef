"""BabyAI missions of minigrid, acted by macro-actions of two tokens: where to turn, and how far to walk.

The agent sees what minigrid shows it, the 7 x 7 cells in front of it, and reads the mission in English. The expert,
which makes the demonstrations, sees the whole grid.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcore._optional import require

DIRECTIONS, DISTANCES = 4, 4  # ahead, right, back, left; 0 to 3 steps
BINS = 4
VIEW = 49
WORDS = (
    "<none>",
    "go",
    "to",
    "the",
    "a",
    "red",
    "green",
    "blue",
    "purple",
    "yellow",
    "grey",
    "ball",
    "box",
    "key",
)
LONGEST = 6
# Symbols: 11 kinds of object and 6 colours of each cell, then words.
KINDS, COLOURS = 11, 6
SYMBOLS = KINDS * COLOURS + len(WORDS)
LEFT, RIGHT, FORWARD = 0, 1, 2


class BabyAI:
    """Several BabyAI rooms that are acted in together.

    Args:
        name: of a GoTo level of minigrid, e.g. `BabyAI-GoToLocalS5N2-v0`.
        count: rooms.
        limit: macro-actions of an episode.
        seed: decides the levels.
        levels: a level is one of so many; the curriculum chooses among them. None for ever new ones.

    Raises:
        ImportError: minigrid is missing.
        ValueError: the level is unknown or its missions have other words.
    """

    def __init__(
        self, name: str, count: int, *, limit: int = 5, seed: int = 0, levels: int | None = None
    ) -> None:
        gymnasium = require("gymnasium", extra="agents")
        require("minigrid", extra="agents")
        try:
            self.rooms = [gymnasium.make(name).unwrapped for _ in range(count)]
        except gymnasium.error.Error as error:
            raise ValueError(f"--env {name}: minigrid has no such level ({error})") from None
        self.limit, self.seed, self.levels = limit, seed, levels
        self.random = np.random.default_rng(seed)
        self.success = np.full(levels or 0, 0.5)
        self.temperature = 0.25
        self.level = [0] * count
        self.taken = [0] * count
        self.seen: list[Any] = [None] * count
        for room in range(count):
            self._begin(room)

    def observe(self) -> Tensor:
        """int64 `[B, VIEW + LONGEST]`."""
        return torch.from_numpy(np.stack([self._symbols(room) for room in range(len(self.rooms))]))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Act `[B, 2]`; 1.0 where the mission is fulfilled, and where an episode ended and a new one began."""
        rewards, ended = torch.zeros(len(self.rooms)), torch.zeros(len(self.rooms), dtype=torch.bool)
        for room, (turn, distance) in enumerate(actions.tolist()):
            won = self._act(room, turn, distance)
            self.taken[room] += 1
            if won or self.taken[room] >= self.limit:
                rewards[room], ended[room] = float(won), True
                if self.levels is not None:
                    at = self.level[room]
                    self.success[at] += 0.3 * (float(won) - self.success[at])
                self._begin(room)
        return rewards, ended

    def expert(self) -> Tensor:
        """The first of a shortest plan of macro-actions for each room, `[B, 2]`; ties are broken at random."""
        return torch.tensor([self._plan(room) for room in range(len(self.rooms))])

    def _begin(self, room: int) -> None:
        if self.levels is None:
            level = int(self.random.integers(2**31))
        else:
            weights = np.exp((0.5 - self.success) / self.temperature)
            level = int(self.random.choice(self.levels, p=weights / weights.sum()))
        self.level[room], self.taken[room] = level, 0
        begun = (self.seed * 1_000_003 + level) % 2**31 if self.levels is not None else level
        self.seen[room], _ = self.rooms[room].reset(seed=begun)

    def _act(self, room: int, turn: int, distance: int) -> bool:
        world = self.rooms[room]
        # What is seen half-way is not needed, and costs most of a step.
        world.gen_obs = dict
        won = False
        for action in [*((), (RIGHT,), (RIGHT, RIGHT), (LEFT,))[turn], *[FORWARD] * distance]:
            _, reward, ended, _, _ = world.step(action)
            if ended:
                won = bool(reward > 0)
                break
        del world.gen_obs
        if not won:
            self.seen[room] = world.gen_obs()
        return won

    def _symbols(self, room: int) -> Any:
        image = self.seen[room]["image"].reshape(VIEW, 3)
        words = self.seen[room]["mission"].split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or len(words) > LONGEST:
            raise ValueError(
                f"expected a mission of at most {LONGEST} of the words {', '.join(WORDS[1:])} but got "
                f"{self.seen[room]['mission']!r}; choose a GoTo level"
            )
        said = [KINDS * COLOURS + WORDS.index(word) for word in words] + [KINDS * COLOURS] * (
            LONGEST - len(words)
        )
        return np.concatenate([image[:, 0].astype(np.int64) * COLOURS + image[:, 1], said])

    def _plan(self, room: int) -> tuple[int, int]:
        world = self.rooms[room]
        targets = {tuple(map(int, place)) for place in world.instrs.desc.obj_poss}
        start = (*map(int, world.agent_pos), int(world.agent_dir))

        def apply(state: tuple[int, ...], turn: int, distance: int) -> tuple[tuple[int, ...], bool]:
            x, y, facing = state
            moves = ((), (1,), (1, 1), (-1,))[turn]
            for by in moves:
                facing = (facing + by) % 4
                if (x + _STEPS[facing][0], y + _STEPS[facing][1]) in targets:
                    return (x, y, facing), True
            for _ in range(distance):
                ahead = (x + _STEPS[facing][0], y + _STEPS[facing][1])
                cell = world.grid.get(*ahead)
                if cell is None or cell.can_overlap():
                    x, y = ahead
                if (x + _STEPS[facing][0], y + _STEPS[facing][1]) in targets:
                    return (x, y, facing), True
            return (x, y, facing), False

        choices = [(turn, distance) for turn in range(DIRECTIONS) for distance in range(DISTANCES)]
        best: dict[tuple[int, int], int] = {}
        queue: deque[tuple[tuple[int, ...], tuple[int, int] | None, int]] = deque([(start, None, 0)])
        reached: dict[tuple[tuple[int, ...], tuple[int, int] | None], int] = {}
        while queue:
            state, first, depth = queue.popleft()
            if best and depth >= min(best.values()):
                break
            for choice in choices:
                after, won = apply(state, *choice)
                begun = choice if first is None else first
                if won:
                    best.setdefault(begun, depth + 1)
                elif (after, begun) not in reached and depth < 4:
                    reached[after, begun] = depth
                    queue.append((after, begun, depth + 1))
        if not best:
            return choices[int(self.random.integers(len(choices)))]
        least = min(best.values())
        ties = [choice for choice, depth in best.items() if depth == least]
        return ties[int(self.random.integers(len(ties)))]


_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # minigrid's directions
