"""A new system is two files: one of code and one test, dropped into a copy of the tree, are all that it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arcore as package

pytest.importorskip("pytorch_lightning")
pytest.importorskip("safetensors")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(package.__file__).parent
SYSTEM = '''"""Bigram: the next byte from the last one (Shannon, arXiv:4801.00001).

The smallest language model: a table of logits, one row per token. Nearest neighbour here: Mamba, which remembers more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, at_most
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="bigram",
    title="Shannon's Bigram",
    paper="arXiv:4801.00001",
    topic="language",
    kind="model",
    model="Bigram",
    recipe="language",
    summary="Next byte from the last one.",
    claim="Logits are the row of the table that the last token names.",
    checked_on="closed form",
)


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """Settings of `Bigram`.

    Attributes:
        vocab_size: tokens V.
    """

    vocab_size: int = 256


class Bigram(nn.Module):
    """A table of logits. A `TokenModel` without a memory."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    @check_kinds
    def forward(self, ids: Tensor) -> Tensor:
        """int64 `[B, L]` to `[B, L, V]`."""
        return self.table(ids)

    def make_cache(self, batch: int, max_length: int) -> None:
        return None

    def prefill(self, ids: Tensor, cache: None, mask: Tensor | None = None) -> Tensor:
        return self.table(ids[:, -1])

    def step(self, ids: Tensor, cache: None) -> Tensor:
        return self.table(ids)


@preset
def bigram_tiny() -> BigramConfig:
    """Bytes, trains in a moment."""
    return BigramConfig()


def claim(*, quick: bool) -> Claim:
    """Every row of the table."""
    model = Bigram(bigram_tiny())
    ids = torch.arange(256)[None]
    return Claim((at_most("difference", (model(ids)[0] - model.table.weight).abs().max(), 0.0),))
'''
TEST = """from arcore.models import Bigram, get_config


def test_table_is_square() -> None:
    assert Bigram(get_config("bigram_tiny")).table.weight.shape == (256, 256)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the two files, and nothing else changed."""
    copy = tmp_path_factory.mktemp("copy") / "arcore"
    skipped = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for folder in ("python", "tests", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skipped)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy / file)
    # Where a wheel is tested, the checkout has no compiled extension.
    for library in PACKAGE.glob("*.so"):
        if not (copy / "python/arcore" / library.name).exists():
            shutil.copy(library, copy / "python/arcore" / library.name)
    before = {path for path in copy.rglob("*") if path.is_file()}
    (copy / "python/arcore/zoo/language/bigram.py").write_text(SYSTEM)
    (copy / "tests/zoo/language/test_bigram.py").write_text(TEST)
    assert len({path for path in copy.rglob("*") if path.is_file()} - before) == 2
    (copy / "book.txt").write_text("In the beginning was the word, and then another one.\n" * 60)
    return copy


def run(tree: Path, *command: str) -> str:
    surroundings = {**os.environ, "PYTHONPATH": f"{tree / 'python'}{os.pathsep}{tree / 'tools'}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, env=surroundings, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def arcore(tree: Path, *commands: tuple[str, ...]) -> list[str]:
    """What commands of arcore print, all in one process: to start one takes longer than most of them."""
    code = (
        "import contextlib, io, json, sys\n"
        "from arcore.cli import main\n"
        "said = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert main(words) == 0, out.getvalue()\n"
        "    said.append(out.getvalue())\n"
        "print(json.dumps(said))\n"
    )
    said: list[str] = json.loads(run(tree, "-c", code, json.dumps(commands)).splitlines()[-1])
    return said


def test_it_is_declared_listed_and_found(tree: Path) -> None:
    assert "0 problems" in run(tree, "tools/check_zoo.py")
    # Beside its neighbours: the whole zoo is compared in `make lint`.
    assert "0 near copies" in run(tree, "tools/check_dup.py", "python/arcore/zoo/language")
    words = ("bigram", "4801.00001", "shannon's bigram")
    every, *found, table = arcore(
        tree, ("zoo",), *[("zoo", word) for word in words], ("zoo", "bigram", "--json")
    )
    assert "bigram_tiny" in every
    assert all("zoo/language/bigram.py:" in one for one in found)
    assert [entry["name"] for entry in json.loads(table)] == ["bigram"]


def test_it_is_trained_sampled_and_its_claim_checked(tree: Path) -> None:
    train = ("train", "bigram_tiny", "--data", "book.txt", "--steps", "2", "--context", "32", "--out", "out")
    sample = ("sample", "out", "--prompt", "In the", "--max-new-tokens", "5", "--seed", "1")
    trained, text, checked = arcore(tree, train, sample, ("check", "bigram", "--json", "claims.json"))
    assert "step 2" in trained
    assert text.startswith("In the")
    assert "1 claim checked; all hold" in checked
    assert json.loads((tree / "claims.json").read_text())["bigram"]["holds"] is True


def test_it_is_documented(tree: Path) -> None:
    code = (
        "import zoo_table; pages = zoo_table.pages(); page = pages['zoo/bigram.md']\n"
        "assert 'Next byte from the last one.' in page and 'bigram_tiny' in page\n"
        "assert '(bigram.md)' in pages['zoo/index.md']\n"
    )
    run(tree, "-c", code)


def test_it_is_held_to_the_contracts(tree: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "bigram")
    # What holds for every network, and the system's own; the rest is only slow to collect.
    files = ("contract_model.py", "test_claims.py", "test_systems.py", "language/test_bigram.py")
    out = run(tree, "-m", "pytest", *options, *(f"tests/zoo/{name}" for name in files))
    assert " failed" not in out
    # The contract of models, the claim, what holds for every system, and the system's own test.
    assert int(out.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1]) >= 12
