"""What a run folder holds from the first second."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
import time
from typing import Any

import pytest
import pytorch_lightning.loggers
import torch
from pytorch_lightning.loggers.logger import DummyLogger

from arcore import matmul
from arcore.data import load_digits
from arcore.training import Task, TrainConfig, engine, fit
from arcore.training.run_folder import LOCK, RECORD, read_record, run_folder

SETTINGS = {"steps": 20, "batch_size": 8, "checkpoint_every": 10, "accelerator": "cpu"}


def test_the_record_and_growing_figures_are_there_before_the_first_checkpoint(toy_task, tmp_path):
    seen = {}

    class Spy(toy_task):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            names = sorted(path.name for path in tmp_path.iterdir())
            with open(tmp_path / "metrics.csv") as file:
                seen[self.step] = (names, list(csv.DictReader(file)))

    fit(
        Spy(TrainConfig(**SETTINGS | {"checkpoint_every": 0})),
        load_digits("train"),
        tmp_path,
        show_progress=False,
    )
    names, rows = seen[0]
    assert names == [LOCK, "metrics.csv", RECORD]
    assert rows == []
    names, rows = seen[10]
    assert names == [LOCK, "metrics.csv", RECORD]
    assert [row["step"] for row in rows] == ["10"]
    assert float(rows[0]["lr"]) == pytest.approx(1e-3 * 10 / 51)
    assert float(rows[0]["grad_norm"]) > 0
    assert float(rows[0]["samples_per_second"]) > 0
    assert not (tmp_path / LOCK).exists()
    record = read_record(tmp_path)
    assert set(record["versions"]) == {"arcore", "commit", "torch", "lightning", "python"}
    assert record["training"]["steps"] == 20
    assert shlex.split(record["command"])


def test_a_second_run_into_the_same_folder_is_refused(toy_task, tmp_path):
    code = (
        "import sys, pathlib\n"
        "from arcore.training.run_folder import run_folder\n"
        "with run_folder(pathlib.Path(sys.argv[1]), {}):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match="another run is writing into"):
            fit(toy_task(TrainConfig(**SETTINGS)), load_digits("train"), tmp_path, show_progress=False)
        from arcore.training import train

        with pytest.raises(ValueError, match="another run is writing into"):
            train("msvq_tiny", out=tmp_path, settings=SETTINGS, show_progress=False)
    finally:
        other.kill()
        other.communicate()
    # A killed process leaves its lock file, which holds nobody back.
    assert (tmp_path / LOCK).exists()
    fit(toy_task(TrainConfig(**SETTINGS)), load_digits("train"), tmp_path, show_progress=False)


def test_a_folder_with_nothing_in_it_goes_when_the_run_could_not_begin(tmp_path):
    with pytest.raises(ValueError, match="no"), run_folder(tmp_path / "new", {}):
        raise ValueError("no")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="no"), run_folder(tmp_path / "old", {}):
        raise ValueError("no")
    assert list((tmp_path / "old").iterdir()) == []
    with pytest.raises(ValueError, match="no"), run_folder(tmp_path / "old", {}):
        (tmp_path / "old" / "metrics.csv").write_text("")
        raise ValueError("no")
    assert json.loads((tmp_path / "old" / RECORD).read_text())["command"]


def test_a_lost_folder_is_one_sentence(toy_task, tmp_path):
    import shutil

    class Losing(toy_task):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            if self.step == 5:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(OSError, match=r"cannot write .*metrics\.csv") as caught:
        fit(Losing(TrainConfig(**SETTINGS)), load_digits("train"), tmp_path / "run", show_progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("units", ["none", "dot"])
def test_bfloat16_without_units_is_said_aloud(toy_task, tmp_path, capsys, monkeypatch, units):
    seen = []

    class Seeing(toy_task):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            seen.append(matmul._choice.widened)

    monkeypatch.setattr(matmul, "slow_halves", lambda: (torch.float16,))
    monkeypatch.setattr(torch.ops.arcore, "cpu_bf16", lambda: units)
    config = TrainConfig(**SETTINGS | {"steps": 1, "precision": "bf16-mixed"})
    fit(Seeing(config), load_digits("train"), tmp_path / "half")
    said = (
        "this processor has no units for bfloat16: its products are computed in float32"
        in capsys.readouterr().err
    )
    assert said == (units == "none")
    assert seen == [{torch.float16}] and matmul._choice == matmul._Choice()
    fit(Seeing(TrainConfig(**SETTINGS | {"steps": 1})), load_digits("train"), tmp_path / "single")
    assert seen[1:] == [frozenset()]


def test_a_precision_that_the_device_does_not_have_is_said_aloud(toy_task, tmp_path, capsys):
    config = TrainConfig(**SETTINGS | {"steps": 1, "precision": "16-mixed"})
    fit(toy_task(config), load_digits("train"), tmp_path / "half")
    assert (
        "precision 16-mixed is not to be had on this device: bf16-mixed is used instead"
        in capsys.readouterr().err
    )
    fit(
        toy_task(TrainConfig(**SETTINGS | {"steps": 1, "precision": "32"})),
        load_digits("train"),
        tmp_path / "full",
    )
    assert "not to be had" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "precision"), [("mamba_tiny", "64-true"), ("mar_tiny", "bf16-true"), ("llama_tiny", "64")]
)
def test_a_precision_that_a_model_does_not_take_names_one_that_it_takes(tmp_path, preset, precision):
    """The advice is that of the command line, not to change a layer by hand."""
    from arcore.recipes import train

    settings = {"steps": 1, "batch_size": 2, "precision": precision, "accelerator": "cpu"}
    with pytest.raises(ValueError, match="train with precision bf16-mixed or 32-true") as caught:
        train(preset, out=tmp_path / "run", settings=settings, show_progress=False)
    assert str(caught.value).startswith(f"precision {precision} ")


@pytest.mark.parametrize("name", ["devices", "workers"])
def test_more_processes_than_cores_are_refused(toy_task, tmp_path, name):
    config = TrainConfig(**SETTINGS | {name: 9999})
    with pytest.raises(
        ValueError, match=rf"{name}=9999 would start 9999 processes on the \d+ cores? of this CPU"
    ):
        fit(toy_task(config), load_digits("train"), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_figures_go_to_a_logger_of_lightning(toy_task, tmp_path):
    config = TrainConfig(**SETTINGS | {"logger": "tensorboard"})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="tensorboard"):
            fit(toy_task(config), load_digits("train"), tmp_path / "run", show_progress=False)
        return
    fit(toy_task(config), load_digits("train"), tmp_path / "run", show_progress=False)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_figures_go_to_several_loggers(toy_task, tmp_path, monkeypatch):
    """With doubles, for neither package is needed to say which loggers a run has."""
    made = []

    def logger(name: str) -> Any:
        class Kept(DummyLogger):
            def __init__(self, **options: Any) -> None:
                super().__init__()
                self.figures: dict[str, Any] = {}
                made.append((name, options, self))

            def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
                self.figures[step] = metrics

        return Kept

    monkeypatch.setattr(engine, "require", lambda module, extra: None)
    monkeypatch.setattr(pytorch_lightning.loggers, "TensorBoardLogger", logger("tensorboard"))
    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", logger("wandb"))
    config = TrainConfig(**SETTINGS | {"logger": "wandb, csv,tensorboard,wandb"})
    assert config.logger == "wandb,csv,tensorboard"
    fit(toy_task(config), load_digits("train"), tmp_path / "run", show_progress=False)
    assert [name for name, *_ in made] == ["wandb", "tensorboard"]
    for _, options, kept in made:
        assert options["save_dir"] == tmp_path / "run"
        assert kept.figures[config.steps]["train/loss"] > 0
    assert (tmp_path / "run" / "metrics.csv").read_text().startswith("step,split,loss")


def test_no_logger_makes_a_file_where_one_is_missing(toy_task, tmp_path, monkeypatch):
    def require(module: str, extra: str) -> None:
        if module == "wandb":
            raise ImportError(f"this needs the package {module!r}", name=module)

    monkeypatch.setattr(engine, "require", require)
    config = TrainConfig(**SETTINGS | {"logger": "tensorboard,wandb"})
    with pytest.raises(ImportError, match="this needs the package 'wandb'"):
        fit(toy_task(config), load_digits("train"), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # of wandb itself
@pytest.mark.parametrize("logger", ["wandb", "tensorboard,wandb"])
def test_figures_go_to_wandb(toy_task, tmp_path, monkeypatch, logger):
    for name in logger.split(","):
        pytest.importorskip(name)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    config = TrainConfig(**SETTINGS | {"logger": logger})
    for name in ("one", "two"):  # each run of a process has a log of its own
        fit(toy_task(config), load_digits("train"), tmp_path / name, show_progress=False)
        assert bool(list(tmp_path.glob(f"{name}/tensorboard/events*"))) == ("tensorboard" in logger)
        (log,) = (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")
        # wandb's own process writes the file.
        deadline = time.monotonic() + 60
        while b"train/loss" not in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert b"train/loss" in log.read_bytes()


def test_what_is_no_task_and_no_data(toy_task, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"task must be an arcore\.training\.Task but got NoneType"):
        fit(None, None, tmp_path / "run")
    task = toy_task(TrainConfig(**SETTINGS))
    with pytest.raises(TypeError, match="train must be a dataset with a length and items but got NoneType"):
        fit(task, None, tmp_path / "run")
    with pytest.raises(TypeError, match="test must be a dataset"):
        fit(task, load_digits("train"), tmp_path / "run", test=iter([]))
    with pytest.raises(TypeError, match="out must be the path of a folder but got int"):
        fit(task, load_digits("train"), 3)
    for strategy, says in (
        ("ddp_spawn", "'ddp_spawn' would start processes"),
        ("ddp_notebook", "'ddp_notebook' would start processes"),
        ("ddp_fork_find_unused_parameters_false", "would start processes"),
        (
            "deepspeed_stage_3_offload",
            "keeps weights in a form that checkpoints do not hold: use 'ddp' or 'fsdp'",
        ),
        ("fsdp_cpu_offload", "keeps weights in a form"),
        ("xla_fsdp", "keeps weights in a form"),
        ("single_tpu", "is for devices"),
        ("fsdp", "fsdp shards weights over processes, and there is one"),
        ("foo", "refuses these settings: You selected an invalid strategy name"),
    ):
        with pytest.raises(ValueError, match=says):
            fit(
                toy_task(TrainConfig(strategy=strategy, accelerator="cpu")),
                load_digits("train"),
                tmp_path / "run",
            )
    for name in ("MASTER_ADDR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="num_nodes=3 needs to know the other machines"):
        fit(toy_task(TrainConfig(num_nodes=3, accelerator="cpu")), load_digits("train"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tasks_that_lack_something_are_named(toy_task, tmp_path):
    class Nameless(toy_task):
        saved = None

    class Silent(toy_task):
        meta = Task.meta

    class Plain(toy_task):
        def loss(self, images, labels):
            return super().loss(images, labels)[0]

    for kind, says in (
        (Nameless, r"Nameless\.saved must name the attributes that are networks"),
        (Silent, "Silent must have a method meta"),
        (Plain, r"Plain\.loss must return the loss and a table of figures, .* but returned a Tensor"),
    ):
        with pytest.raises(TypeError, match=says):
            fit(
                kind(TrainConfig(**SETTINGS)),
                load_digits("train"),
                tmp_path / kind.__name__,
                show_progress=False,
            )
