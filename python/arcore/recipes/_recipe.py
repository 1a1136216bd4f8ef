"""What a recipe is, and how that of a preset is found."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from arcore.catalog import Entry, create_model, describe, find, load_weights
from arcore.catalog.discovery import OWN
from arcore.training import checkpoint
from arcore.training.config import TrainConfig
from arcore.training.ranks import is_first
from arcore.training.stream import derive_seed
from arcore.training.task import Task

# What --weights names instead of a file where an installed package ships the weights.
PACKAGE = "package"


class ZooTask(Task):
    """A task whose networks come from the zoo.

    Args:
        config: settings of the run.
        networks: the networks by name.
        facts: further entries of config.json, for example the class names.
    """

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config)
        self.facts = dict(facts)
        self.saved = tuple(networks)
        self._described: dict[str, Any] = {}
        for name, network in networks.items():
            self.add_module(name, network)

    def meta(self) -> dict[str, Any]:
        if not self._described:
            # Once, before the training engine wraps the networks.
            self._described = {name: describe(network) for name, network in self.modules_to_save().items()}
        return {
            "modules": self._described,
            **self.facts,
            "training": dataclasses.asdict(self.config),
        }


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with.

    Attributes:
        preset: what is trained.
        config: settings of the run.
        out: run folder.
        changes: fields of the model's config that differ from the preset's.
        networks: those of the checkpoint from which the run goes on; empty for a new run.
        facts: what config.json of that checkpoint says; empty for a new run.
        source: folder of that checkpoint.
        init_from: run folder, checkpoint or published weights that a new network starts from.
        show_progress: False keeps the terminal quiet.
    """

    preset: str
    config: TrainConfig
    out: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None
    init_from: Path | None = None
    show_progress: bool = True

    def fresh(self, **overrides: Any) -> nn.Module:
        """The preset's network with the initial weights that the run's seed gives; a system's smallest preset where the
        system was named."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "weights", self.preset))
            network = create_model(_smallest(self.preset), **{**overrides, **self.changes})
        if self.init_from is not None:
            is_run = self.init_from.is_dir() and checkpoint.newest(self.init_from) is not None
            load_weights(network, checkpoint.find(self.init_from) if is_run else self.init_from)
        return network

    def say(self, sentence: str) -> None:
        """Print a sentence for people, once per run."""
        if self.show_progress:
            say(sentence)

    def tell(self, source: Any, *data: Any) -> None:
        """Say what of the data in `source` was not used, as their `notes` have it, once for several parts of them."""
        for note in dict.fromkeys(note for part in data for note in getattr(part, "notes", ())):
            self.say(f"{source}: {note}")


@dataclass(frozen=True)
class Work:
    """A run that is ready to go.

    Attributes:
        task: networks and loss.
        train: training data.
        test: held-out data, or None.
    """

    task: Task
    train: Dataset
    test: Dataset | None


class Recipe(ABC):
    """How the systems of a protocol are trained, sampled and shown.

    Attributes:
        defaults: settings of a run unless told otherwise.
        options: frozen dataclass of what `train` takes beside the settings: data and what is this protocol's own. The
            docstring's `Attributes:` are the help texts of the command line.
        sampling: frozen dataclass of what `sample` takes, or None where there is nothing to sample.
        trained: name of the network that is trained in a checkpoint.
        movable: options that a resumed run may change, because the checkpoint tells whether they mean the same.
        casts_weights: bfloat16 sampling turns the weights into bfloat16 once; otherwise autocast does at each call. For
            models that read all of their weights for a token or two.
        many_files: what `sample` calls `out` is a folder.
        keeps_blocks: what is drawn can come from weights in 8- or 4-bit blocks; `published` then takes `stored=True`
            for those of a GGUF file.
        halved: what is drawn bears bfloat16 arithmetic, so that sampling takes it by itself where it is faster.
    """

    defaults: ClassVar[TrainConfig] = TrainConfig()
    options: ClassVar[type]
    sampling: ClassVar[type | None] = None
    trained: ClassVar[str] = "model"
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out")
    halved: ClassVar[bool] = False
    casts_weights: ClassVar[bool] = False
    keeps_blocks: ClassVar[bool] = False
    many_files: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, start: Start, options: Any) -> Work:
        """Networks, loss and data of a run, from nothing or from a checkpoint.

        Args:
            start: what the run begins with.
            options: of the type `options`.

        Raises:
            ValueError: unusable data, or data that are not those of the checkpoint.
        """

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        """What is written after a run.

        Args:
            checkpoint: the last one.
            out: run folder.

        Returns:
            Lines for people: what was written, and what to do next.
        """
        return []

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Networks with published weights, and what a checkpoint's config.json would say of them.

        Args:
            preset: which model the weights are of.
            weights: file or folder, or `PACKAGE`.
            options: of the type `sampling`.

        Raises:
            ValueError: no package is known to ship weights of this preset.
        """
        if str(weights) == PACKAGE:
            raise ValueError(f"no package is known to ship weights of {preset!r}; give --weights FILE")
        return {self.trained: create_model(preset, weights=weights)}, {}

    def beside(self, preset: str | None, folder: Path | None, options: Any) -> dict[str, Any]:
        """Further networks that sampling needs, read and checked before the model's own weights are.

        Args:
            preset: of published weights, or None.
            folder: checkpoint, or None.
            options: of the type `sampling`.

        Raises:
            ValueError, OSError: they do not fit the model, or cannot be read.
        """
        return {}

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Any:
        """Draw from trained networks.

        Args:
            networks: by name, on the device, in evaluation mode.
            facts: what config.json of their checkpoint says; may be empty.
            options: of the type `sampling`.
            show: receives text while it grows.

        Returns:
            An object with `save(path) -> list[str]`: writes what was drawn and says what was written.
        """
        raise NotImplementedError

    def check_sampling(self, options: Any) -> None:  # noqa: B027
        """Refuse options before a model is read.

        Raises:
            ValueError: an option is missing or makes no sense.
        """


def _smallest(name: str) -> str:
    """The preset of that name, or the smallest one of the system of that name."""
    entry, named = find(name)
    tiny = f"{name}_tiny"
    return tiny if named is None and tiny in entry.presets else name


def recipe_for(name: str) -> Recipe:
    """The recipe of a system or preset.

    Raises:
        ValueError: unknown name, or the system has no recipe.
    """
    entry = find(name).entry
    where = recipe_module(entry)
    try:
        home: Any = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name != where:
            raise
        home = None
    found = getattr(home, "RECIPE", None)
    if not isinstance(found, Recipe):
        raise ValueError(f"{name} can be neither trained nor sampled here: {where} has no recipe")
    return found


def recipe_module(entry: Entry) -> str:
    """The module in which a system's recipe stands.

    Raises:
        ValueError: the system says that it has none.
    """
    system = entry.system
    if system.recipe is None:
        raise ValueError(f"{system.name} can be neither trained nor sampled here: it has no recipe")
    return entry.place.module if system.recipe == OWN else f"arcore.recipes.{system.recipe}"


def say(sentence: str) -> None:
    """Print a sentence on stderr, in one process of a run."""
    if is_first():
        print(sentence, file=sys.stderr)
