"""What ProteinMPNN is given and gives: structures, folders of them to learn from, and designed sequences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from arcore.catalog import create_model
from arcore.data.proteins import Chain, read_pdb, write_fasta
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import PACKAGE, Recipe, Start, Work, ZooTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.biology.protein_mpnn.layers import Backbones
from arcore.zoo.biology.protein_mpnn.model import ALPHABET, UNKNOWN, packaged, random_order, score

NAME = "protein_mpnn"


class Protein(NamedTuple):
    """A protein of chains, as a batch of one.

    Attributes:
        backbones: of one row.
        letters: int64 `[1, L]`.
        free: bool `[1, L]`, residues to design.
        ends: chain names and where they end.
    """

    backbones: Backbones
    letters: Tensor
    free: Tensor
    ends: tuple[tuple[str, int], ...]


def protein(
    chains: list[Chain], design: list[str] | None = None, fixed: frozenset[tuple[str, str]] = frozenset()
) -> Protein:
    """Chains as the model reads them: those to design first, both groups by name.

    Args:
        chains: from `read_pdb`.
        design: names of chains to design; None for all.
        fixed: chain and residue number of residues to keep in them.

    Raises:
        ValueError: a chain or residue does not exist, or nothing is left to design.
    """
    names = [chain.name for chain in chains]
    wanted = names if design is None else design
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"there is no chain {', '.join(unknown)}: the file has {', '.join(names)}")
    if missing := sorted(fixed - {(chain.name, number) for chain in chains for number in chain.numbers}):
        raise ValueError(f"--fix {missing[0][0]}{missing[0][1]}: there is no such residue")
    chains = sorted(chains, key=lambda chain: (chain.name not in wanted, chain.name))
    coordinates = torch.cat([chain.coordinates for chain in chains])
    lengths = torch.tensor([len(chain.sequence) for chain in chains])
    number = torch.arange(len(chains)).repeat_interleave(lengths)
    known = torch.isfinite(coordinates).flatten(1).all(1)
    free = torch.tensor(
        [chain.name in wanted and (chain.name, one) not in fixed for chain in chains for one in chain.numbers]
    )
    if not bool((free & known).any()):
        raise ValueError("no residue is left to design: --chains and --fix keep all, or none has coordinates")
    letters = torch.tensor([ALPHABET.index(letter) for chain in chains for letter in chain.sequence])
    backbones = Backbones(
        coordinates.nan_to_num(0.0).float()[None],
        known[None],
        (torch.arange(len(known)) + 100 * number)[None],
        number[None],
    )
    ends = tuple(zip([chain.name for chain in chains], lengths.cumsum(0).tolist(), strict=True))
    return Protein(backbones, letters[None], (free & known)[None], ends)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ProteinOptions:
    """Structures to learn from.

    Attributes:
        data: folder of PDB files.
        residues: a longer protein is cut to so many residues.
    """

    data: Path | None = None
    residues: int = 256

    def __post_init__(self) -> None:
        if self.residues < 4:
            raise ValueError(f"--residues must be at least 4 but got {self.residues}")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ProteinSampling:
    """Sequences for a backbone.

    Attributes:
        pdb: the structure, a PDB file.
        chains: names of the chains to design, with commas between them; the others are read. Default: all.
        fix: residues to keep, with commas between them, e.g. A12,A20-25.
        omit: letters that are not drawn.
        num: how many sequences.
        out: FASTA file.
        seed: decides all random draws, the order of decoding too.
        temperature: above 0.1 draws more varied sequences; 0 takes the likeliest letters.
    """

    pdb: Path | None = None
    chains: str | None = None
    fix: str | None = None
    omit: str = "X"
    num: int = field(default=4, metadata={"aliases": ("-n",)})
    out: Path = Path("designs.fasta")
    seed: int = 0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"-n must be at least 1 but got {self.num}")
        if set(self.omit) - set(ALPHABET) or set(ALPHABET) <= set(self.omit):
            raise ValueError(f"--omit {self.omit}: expected some letters of {ALPHABET}, not all")
        self.fixed()

    def fixed(self) -> frozenset[tuple[str, str]]:
        """Chain and number of the residues to keep."""
        found = set()
        for part in filter(None, (self.fix or "").split(",")):
            match = re.fullmatch(r"(\S)(-?\d+[A-Z]?)(?:-(\d+))?", part)
            if match is None:
                raise ValueError(f"--fix {part}: expected chain and number, e.g. A12 or A20-25")
            chain, first, last = match.groups()
            numbers = [first] if last is None else map(str, range(int(first), int(last) + 1))
            found |= {(chain, number) for number in numbers}
        return frozenset(found)


@dataclass(frozen=True)
class Designs:
    """Sequences for FASTA."""

    entries: list[tuple[str, str]]

    def save(self, path: Path) -> list[str]:
        write_fasta(path, self.entries)
        return [f"{path}: {len(self.entries)} sequences, the file's own first"]


class Structures(Dataset[tuple[Tensor, Tensor]]):
    """Proteins of a folder, padded to one length: `[L, 15]` (coordinates, known, place, chain) and letters."""

    def __init__(self, paths: list[Path], residues: int) -> None:
        self.items = []
        for path in paths:
            one = protein(read_pdb(path))
            count = min(residues, one.letters.shape[1])
            coordinates, known, places, chains = (part[0, :count] for part in one.backbones)
            parts = [
                coordinates.flatten(1),
                known[:, None].float(),
                places[:, None].float(),
                chains[:, None].float(),
            ]
            padding = (0, 0, 0, residues - count)
            letters = F.pad(one.letters[0, :count], (0, residues - count), value=UNKNOWN)
            self.items.append((F.pad(torch.cat(parts, 1), padding), letters))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


class ProteinTask(ZooTask):
    """Minus log-probability of letters, given those before them in a random order."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        known, places, chains = (images[..., i] for i in (12, 13, 14))
        backbones = Backbones(images[..., :12].unflatten(-1, (4, 3)), known > 0, places.long(), chains.long())
        which = backbones.known & (labels != UNKNOWN)
        order = (torch.rand(labels.shape, device=labels.device) + which).argsort(1)
        logprobs = self.model(backbones, labels, order)
        chosen = logprobs.gather(2, labels.unsqueeze(2)).squeeze(2)
        right = ((logprobs.argmax(-1) == labels) & which).sum() / which.sum().clamp(min=1)
        return -(chosen * which).sum() / which.sum().clamp(min=1), {"recovery": right}


class ProteinRecipe(Recipe):
    """Sequences of backbones."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=4, lr=1e-3, clip=1.0)
    options: ClassVar[type] = ProteinOptions
    sampling: ClassVar[type | None] = ProteinSampling

    def prepare(self, start: Start, options: Any) -> Work:
        if options.data is None or not options.data.is_dir():
            raise ValueError(f"give a folder of PDB files with --data but got {options.data}")
        paths = sorted(path for path in options.data.iterdir() if path.suffix.lower() in (".pdb", ".ent"))
        if not paths:
            raise ValueError(f"{options.data} holds no *.pdb or *.ent file")
        model: Any = start.networks["model"] if start.networks else start.fresh()
        held_out = len(paths) // 10
        train, test = paths[: len(paths) - held_out], paths[len(paths) - held_out :]
        task = ProteinTask(start.config, {"model": model}, {"preset": start.preset})
        return Work(
            task, Structures(train, options.residues), Structures(test, options.residues) if test else None
        )

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"design sequences: arcore sample {out} --pdb FILE"]

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        name = f"{NAME}_020" if preset == NAME else preset
        path = packaged(name) if str(weights) == PACKAGE else weights
        return {"model": create_model(name, weights=path)}, {}

    def check_sampling(self, options: Any) -> None:
        if options.pdb is None:
            raise ValueError("say which backbone to design a sequence for with --pdb FILE")

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Designs:
        model = networks["model"]
        chains = options.chains.split(",") if options.chains else None
        one = protein(read_pdb(options.pdb), chains, options.fixed())
        device = next(model.parameters()).device
        backbones = Backbones(*(part.to(device) for part in one.backbones))
        letters, free = one.letters.to(device), one.free.to(device)
        named = free & (letters != UNKNOWN)
        with torch.no_grad():
            order = random_order(free[0], derive_seed(options.seed, "order") >> 1).unsqueeze(0)
            own = float(score(model(backbones, letters, order), letters, named))
        entries = [
            (f"{options.pdb.stem}, score={own:.4f}, designed={int(free.sum())}", _text(letters[0], one.ends))
        ]
        for turn in range(options.num):
            found, scores = model.design(
                backbones,
                letters,
                free,
                temperature=options.temperature,
                omit=options.omit,
                seed=[derive_seed(options.seed, turn) >> 1],
            )
            same = float(((found == letters) & named).sum() / named.sum().clamp(min=1))
            entry = f"design {turn + 1}, score={float(scores):.4f}, recovery={same:.4f}"
            entries.append((entry, _text(found[0], one.ends)))
            show(f">{entry}\n{entries[-1][1]}\n")
        return Designs(entries)


def _text(letters: Tensor, ends: tuple[tuple[str, int], ...]) -> str:
    """Letters with a / between chains, chains in the order of their names."""
    text, parts, start = "".join(ALPHABET[i] for i in letters.tolist()), {}, 0
    for name, end in ends:
        parts[name], start = text[start:end], end
    return "/".join(parts[name] for name in sorted(parts))


RECIPE = ProteinRecipe()
