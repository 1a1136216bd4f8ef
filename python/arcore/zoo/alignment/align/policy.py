"""The policy of `arcore run align`: what it writes, what is trained of it, and the reference that it is held to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arcore._optional import require
from arcore.decoding import Sampling, draw_rollout
from arcore.nn import Rollout
from arcore.objectives import score, sequence_logprob
from arcore.recipes.language import language_model

REVISE = "\nA better answer:\n"


class Policy:
    """A language model in training, beside its frozen reference.

    Args:
        options: see `arcore.zoo.alignment.align.Options`.
        critic: give it a head that values texts.
        model: the policy and its tokenizer, instead of those that the options name.

    Attributes:
        model: the policy.
        tokenizer: of its texts.
        reference: the frozen model; the policy itself where adapters alone are trained.
        critic: linear head on the policy's trunk, or None.
        trained: parameters that the optimiser moves, by name.
    """

    def __init__(self, options: Any, *, critic: bool, model: tuple[Any, Any] | None = None) -> None:
        self.options = options
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = language_model(options.model) if model is None else model
        torch.manual_seed(options.seed)
        self.adapters: list[Any] = []
        self.reference: Any = self.model
        if options.lora_rank:
            self._add_lora()
        else:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if options.reference is not None:
            self.reference = self._other_reference(options.reference)
        self.critic = nn.Linear(self.model.head_weight.shape[1], 1) if critic else None
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.critic is not None:
            nn.init.zeros_(self.critic.weight)
            self.trained |= {f"critic.{name}": p for name, p in self.critic.named_parameters()}

    def _add_lora(self) -> None:
        peft = require("peft", extra="align")
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
        config = peft.LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=2 * self.options.lora_rank,
            target_modules=names,
            lora_dropout=0.0,
            bias="none",
        )
        self.model.requires_grad_(False)
        peft.inject_adapter_in_model(config, self.model)
        self.adapters = [m for m in self.model.modules() if hasattr(m, "lora_A")]

    def _other_reference(self, source: str) -> Any:
        reference, tokenizer = language_model(source)
        ours, theirs = self.model.vocab_size, reference.vocab_size
        sample = "The quick brown fox: 0123, naïve?"
        if ours != theirs or tokenizer.encode(sample) != self.tokenizer.encode(sample):
            raise ValueError(
                f"--reference {source}: expected a model with the policy's vocabulary of {ours} tokens but this one's "
                f"{theirs} are others; its log-probabilities could not be compared (another architecture may differ in "
                "everything else)"
            )
        return reference.requires_grad_(False)

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """The reference model, without gradients: the policy without its adapters, or a model of its own."""
        if self.reference is not self.model:
            with torch.no_grad():
                yield self.reference
            return
        for adapter in self.adapters:
            adapter.enable_adapters(False)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            for adapter in self.adapters:
                adapter.enable_adapters(True)
            self.model.requires_grad_(False)
            for p in self.trained.values():
                p.requires_grad_(True)

    def respond(
        self, prompts: list[str], count: int, *, seed: int, step: int, writer: Any = None
    ) -> tuple[Rollout, list[str], list[str]]:
        """Draw responses.

        Args:
            prompts: texts, without the template.
            count: responses to each.
            seed: of the draws.
            step: after how many steps, for the message.
            writer: the model that writes. Default: the policy.

        Returns:
            The rollout, and the prompt and the response of each row.

        Raises:
            RuntimeError: the policy's logits are no numbers any more.
        """
        o = self.options
        texts = [o.template.replace("{prompt}", prompt) for prompt in prompts]
        rows = [self.tokenizer.encode(text) for text in texts]
        writer = self.model if writer is None else writer
        try:
            rollout = draw_rollout(
                writer,
                rows,
                count,
                max_new_tokens=o.max_new_tokens,
                sampling=Sampling(temperature=o.temperature, top_p=o.top_p, min_p=o.min_p, top_k=o.top_k),
                seed=seed,
            )
        except (ValueError, RuntimeError) as error:
            if self._gives_numbers(rows[0][:16]):
                raise
            raise RuntimeError(
                f"after step {step} the policy gives no numbers any more: lower --lr or --max-grad-norm and begin "
                "anew, or go on from a copy of an earlier checkpoint"
            ) from error
        ends = set(getattr(writer, "eos_ids", ()))
        responses = [
            self.tokenizer.decode([i for i in row[mask].tolist() if i not in ends])
            for row, mask in zip(rollout.tokens, rollout.mask, strict=True)
        ]
        return rollout, [prompt for prompt in prompts for _ in range(count)], responses

    @torch.no_grad()
    def _gives_numbers(self, ids: list[int]) -> bool:
        return bool(self.model(torch.tensor([ids])).isfinite().all())

    def values(self, rollout: Rollout) -> Tensor:
        """The critic's value of the text before each response token, `[B, T]`; the trunk is the frozen policy's."""
        assert self.critic is not None
        with torch.no_grad():
            hidden = self.model.hidden(rollout.tokens)
        values: Tensor = self.critic(hidden)[..., 0]
        return torch.where(
            rollout.mask, torch.cat([values.new_zeros(len(values), 1), values[:, :-1]], 1), 0.0
        )

    def revisions(self, model: Any, rollout: Rollout, pairs: Tensor) -> Tensor:
        """Log-probability of response b with response a in the prompt.

        Args:
            model: whose.
            rollout: the responses.
            pairs: int64 `[P, 2]` rows of the rollout.

        Returns:
            `[P, 2, 2]`, by a and b.
        """
        between = self.tokenizer.encode(REVISE)
        rows, starts = [], []
        for pair in pairs.tolist():
            for a in pair:
                for b in pair:
                    start = int(rollout.mask[a].long().argmax())
                    context = rollout.tokens[a, : start + int(rollout.lengths[a])].tolist() + between
                    starts.append(len(context))
                    rows.append(context + rollout.tokens[b][rollout.mask[b]].tolist())
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        places = torch.arange(width)
        ends = torch.tensor([len(row) for row in rows])[:, None]
        mask = (places >= torch.tensor(starts)[:, None]) & (places < ends)
        logp = score(model, tokens, mask, temperature=rollout.temperature).logp
        return sequence_logprob(logp, mask).view(-1, 2, 2)
