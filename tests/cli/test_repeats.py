"""Options that stand several times on a command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from arcore.cli._parse import Group, PlainParser, parse_groups
from arcore.cli._repeats import Flag, joined

FLAGS = {
    "--out": Flag("--out"),
    "--batch-size": Flag("--batch-size"),
    "--num": Flag("--num"),
    "-n": Flag("--num"),
    "--betas": Flag("--betas", count=2),
    "--set": Flag("--set", count=None, adds=True),
    "--cfg": Flag("--cfg", count=None),
    "--logger": Flag("--logger", names=True),
    "--ema": Flag("--ema", count=0),
}


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("p --set a=1 b=2 --out x --set c=3", "p --set a=1 b=2 c=3 --out x"),
        ("p --set=a=1 --out x --set c=3 d=4", "p --set a=1 c=3 d=4 --out x"),
        ("--logger csv p --logger=wandb --logger tensorboard", "--logger csv,wandb,tensorboard p"),
        ("--logger=a,b --logger c", "--logger a,b,c"),
        # Nothing is repeated: the words stay as they are.
        ("--out=-x p --betas 0 .9 q --set a -n 3", "--out=-x p --betas 0 .9 q --set a -n 3"),
        ("--ema --ema p", "--ema --ema p"),
        ("--unknown 1 --unknown 2", "--unknown 1 --unknown 2"),
        ("--out x --out x p", "--out x p"),
        ("--out x -- --out y", "--out x -- --out y"),
        ("--set --set", "--set"),
        ("--out", "--out"),
    ],
)
def test_repeated_options_become_one(given, becomes):
    assert joined(given.split(), FLAGS) == becomes.split()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("p --out a --out b", "--out was given as 'a' and as 'b': give it once"),
        ("--out=a p --out b", "--out was given as 'a' and as 'b'"),
        ("--batch-size 3 --batch_size 4", "--batch-size was given as '3' and as '4'"),
        ("--num 3 -n 4", "--num was given as '3' and as '4'"),
        ("--betas 0 .9 --betas 0 .8", "--betas was given as '0 .9' and as '0 .8'"),
        ("--cfg 1 2 --cfg 3", "--cfg was given as '1 2' and as '3'"),
        ("--out a --out", "--out was given as 'a' and as ''"),
    ],
)
def test_a_value_that_would_replace_another_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        joined(given.split(), FLAGS)


def test_options_of_dataclasses_and_of_plain_commands():
    pytest.importorskip("tyro")

    @dataclass(frozen=True)
    class Options:
        """Some.

        Attributes:
            data: a path.
            label: a name.
            columns: names.
            quantiles: numbers.
            logger: names.
            keep: a switch.
        """

        data: Path | None = None
        label: str | None = field(default=None, metadata={"flag": "class", "aliases": ("-c",)})
        columns: tuple[str, ...] | None = None
        quantiles: tuple[float, ...] = ()
        logger: str = field(default="csv", metadata={"names": True})
        keep: bool = False

    def read(text: str) -> dict:
        return parse_groups("test", "A test.", {"some": Group(Options)}, text.split())["some"]

    assert read("--columns a b --keep --columns c --logger x --logger y --keep") == {
        "columns": ("a", "b", "c"),
        "logger": "x,y",
        "keep": True,
    }
    with pytest.raises(ValueError, match="--data was given as 'a' and as 'b'"):
        read("--data a --data b")
    with pytest.raises(ValueError, match=r"--quantiles was given as '\.1 \.9' and as '\.5'"):
        read("--quantiles .1 .9 --quantiles .5")
    with pytest.raises(ValueError, match="--class was given as '1' and as '2'"):
        read("--class 1 -c 2")
    parser = PlainParser("test", "A test.")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--files", nargs="+")
    parser.add_argument("--row", action="append")
    parser.add_argument("-j", "--json")
    parser.add_argument("--all", action="store_true")
    words = "--files a b --row a --batch 3 --files c --row b --all --all"
    found = parser.parse_args(words.split())
    assert (found.files, found.row, found.batch) == (["a", "b", "c"], ["a", "b"], [3])
    with pytest.raises(ValueError, match="--batch was given as '1 2' and as '3'"):
        parser.parse_args(["--batch", "1", "2", "--batch", "3"])
    with pytest.raises(ValueError, match="--json was given as 'x' and as 'y'"):
        parser.parse_args(["--json", "x", "-j", "y"])


def test_the_command_line_loses_none(arcore, fails, tmp_path: Path):
    pytest.importorskip("tyro")
    pytest.importorskip("pytorch_lightning")
    begin = ("train", "dit_tiny", "--steps", 1, "--batch-size", 2, "--accelerator", "cpu", "--data", "digits")
    assert "--data was given as 'digits' and as 'mnist': give it once" in fails(*begin, "--data", "mnist")
    assert "logger must be one of csv, tensorboard, wandb, or several separated by commas" in fails(
        *begin, "--logger", "csv", "--logger", "mlflow", "--out", tmp_path / "run"
    )
    arcore(
        *begin,
        *("--logger", "csv", "--set", "depth=1", "--out", tmp_path / "run", "--set", "embed_dim=48"),
        *("--logger", "csv"),
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model_settings"] == {"depth": 1, "embed_dim": 48}
    assert record["training"]["logger"] == "csv"
