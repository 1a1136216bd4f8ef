"""What a run of `align` writes, and how it is read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore._files import atomic_folder, atomic_path
from arcore.nn import Rollout
from arcore.zoo.alignment.dynamic_reward_weighting import HypervolumeWeight

CHECKPOINT = "checkpoint"
# What a resumed run must have in common with the one that it resumes.
_SAME = ("objective", "model", "reward", "group", "prompts_per_step", "max_new_tokens", "lora_rank", "seed")


def keep(
    run: Any, name: str, rollout: Rollout, prompts: list[str], responses: list[str], failure: Exception
) -> Path:
    """Write responses that could not be judged to `failed/NAME.json` in the run's folder."""
    path = Path(run.options.out) / "failed" / f"{name}.json"
    content = {
        "name": name,
        "error": str(failure),
        "prompts": prompts,
        "responses": responses,
        "tokens": rollout.tokens.tolist(),
        "lengths": rollout.lengths.tolist(),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path


def save(run: Any) -> None:
    """Write the checkpoint that `load` goes on from, and metrics.csv."""
    out = Path(run.options.out)
    state = {
        "step": run.step,
        "options": {name: _plain(getattr(run.options, name)) for name in _SAME},
        "guard": run.guard.state(),
        "weights": None if run.scoring.weights is None else run.scoring.weights.tolist(),
        "factor": run.scoring.factor,
        "front": None if run.scoring.front is None else run.scoring.front.state(),
        "names": run.scoring.judge.names,
        "rows": run.rows,
        "evaluations": run.evaluations,
        "skipped": run.skipped,
        "unjudged": run.unjudged,
    }
    with atomic_folder(out / CHECKPOINT) as folder:
        torch.save(
            {name: p.detach().clone() for name, p in run.policy.trained.items()}, folder / "trained.pt"
        )
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(name for row in run.rows for name in row))
    with atomic_path(out / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(run.rows)


def load(run: Any) -> None:
    """Go on from the checkpoint in the run's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another run, or damaged.
    """
    folder = Path(run.options.out) / CHECKPOINT
    if not (folder / "state.json").is_file():
        option = "--evaluate" if run.options.evaluate else "--resume"
        raise FileNotFoundError(f"{option}: there is no checkpoint in {folder}; leave {option} out to begin")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        trained = torch.load(folder / "trained.pt", weights_only=True)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder} is damaged ({error}); begin anew in another --out") from error
    for name, value in state["options"].items():
        if value != _plain(getattr(run.options, name)):
            raise ValueError(
                f"--resume: the run in {folder} has --{name.replace('_', '-')} {value} but got "
                f"{getattr(run.options, name)}; give the same, or another --out"
            )
    with torch.no_grad():
        for name, p in run.policy.trained.items():
            p.copy_(trained[name])
    run.optimizer.load_state_dict(optimizer)
    for group in run.optimizer.param_groups:
        group["lr"] = run.options.lr
    run.step, run.rows, run.skipped = state["step"], state["rows"], state["skipped"]
    run.evaluations, run.unjudged = state["evaluations"], state.get("unjudged", [])
    run.scoring.judge.names.extend(state["names"])
    run.scoring.weights = None if state["weights"] is None else torch.tensor(state["weights"])
    run.scoring.factor = state.get("factor", 1.0)
    front = state.get("front")
    run.scoring.front = None if front is None else HypervolumeWeight.of_state(front)
    run.guard.load(state["guard"])


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The policy's weights with the adapters added in, under the names of the plain model."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # A layer with an adapter comes before the plain layer inside of it.
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[f"{name}.weight"] = (module.base_layer.weight + module.get_delta_weight("default")).detach()
        for key, value in module.named_parameters(recurse=False):
            plain = f"{name}.{key}".replace(".base_layer.", ".").lstrip(".")
            if "lora_" not in plain:
                found.setdefault(plain, value.detach().clone())
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
