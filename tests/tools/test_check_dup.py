from __future__ import annotations

from pathlib import Path

import check_dup
import pytest

ALPHA = '''
"""Alpha."""
import torch
from torch import nn


class AlphaConfig:
    width: int = 64
    depth: int = 2


class Alpha(nn.Module):
    """A model."""

    def __init__(self, config: AlphaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(100, config.width)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 100)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def alpha_tiny() -> AlphaConfig:
    return AlphaConfig(width=8)
'''
OTHER = """
from torch import nn


class ScanConfig:
    state: int = 16
    channels: int = 32
    kernel: int = 4


class Scan(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.into = nn.Linear(config.channels, 2 * config.channels)
        self.conv = nn.Conv1d(config.channels, config.channels, config.kernel, groups=config.channels)
        self.rate = nn.Parameter(config.rates())

    def forward(self, x, state):
        gate, x = self.into(x).chunk(2, dim=-1)
        x = self.conv(x.mT).mT
        y, state = self.recurrence(x, state)
        return y * gate.sigmoid(), state

    def recurrence(self, x, state):
        outputs = []
        for t in range(x.shape[1]):
            state = state * self.rate + x[:, t]
            outputs.append(state)
        return outputs, state
"""


def write(folder: Path, **sources: str) -> list[Path]:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return sorted(folder.glob("*.py"))


def test_planted_copy_with_other_names_is_found(tmp_path: Path) -> None:
    copy = (
        ALPHA.replace("Alpha", "Beta")
        .replace("alpha", "beta")
        .replace('"""A model."""', '"""Something else."""')
    )
    files = write(tmp_path, alpha=ALPHA, beta=copy)
    ((fraction, first, second),) = check_dup.near_copies(files)
    assert (fraction, first.name, second.name) == (1.0, "alpha.py", "beta.py")
    assert check_dup.main([str(tmp_path)]) == 1


def test_copy_inside_a_longer_file_is_found(tmp_path: Path) -> None:
    files = write(
        tmp_path, alpha=ALPHA, long=OTHER + ALPHA.replace("Alpha", "Gamma").replace("alpha", "gamma")
    )
    assert [pair[1].name for pair in check_dup.near_copies(files)] == ["alpha.py"]


def test_different_models_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path, alpha=ALPHA, scan=OTHER)
    lines = [check_dup.significant_lines(path.read_text()) for path in files]
    assert min(map(len, lines)) >= check_dup.MINIMUM_LINES
    assert check_dup.shared(*lines) < check_dup.LIMIT
    assert check_dup.main([str(tmp_path)]) == 0
    assert "2 files, 0 near copies" in capsys.readouterr().out


def test_limit_is_a_fraction_of_the_shorter_file() -> None:
    first = [f"a{i}" for i in range(20)]
    assert check_dup.shared(first, [*first[:11], *(f"b{i}" for i in range(100))]) == 11 / 20
    assert check_dup.shared(first, first[:14]) == 0.0


def test_layout_comments_docstrings_and_imports_do_not_count() -> None:
    dressed = ALPHA.replace("import torch\n", "import torch\nimport math\n").replace(
        "        x = self.embed(tokens)\n",
        "        # Look the tokens up.\n\n        x = self.embed(\n            tokens\n        )\n",
    )
    assert check_dup.significant_lines(dressed) == check_dup.significant_lines(ALPHA)


def test_shared_files_and_folders_count(tmp_path: Path) -> None:
    (tmp_path / "topic").mkdir()
    write(tmp_path / "topic", alpha=ALPHA, _common=OTHER)
    assert check_dup.main([str(tmp_path)]) == 0
    write(tmp_path, _common=ALPHA)
    assert check_dup.main([str(tmp_path)]) == 1


def test_missing_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_dup.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
