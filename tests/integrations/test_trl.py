"""TRL's GRPO trainer with our scorer and our losses: beside its own numbers, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        transformers = pytest.importorskip("transformers")
        from arcore.integrations.trl import causal_lm_stats, grpo, nft, rft, trainer_class

WORDS = 40


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(WORDS - 2)} | {"<pad>": WORDS - 2, "<eos>": WORDS - 1}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=WORDS - 2,
        eos_token_id=WORDS - 1,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def verifier(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split())) % 2) for text in completions]


def make(folder: Path, loss: Any = None, own: bool = False, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "model_init_kwargs": {"dtype": "float32"},
         "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
        "max_completion_length": 6, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "beta": 0.05, "steps_per_generation": 1, "disable_dropout": True, "bf16": False,
        "gradient_checkpointing": False, "loss_type": "grpo", "disable_tqdm": True, "temperature": 0.9,
        "epsilon": 0.2, "use_bias_correction_kl": False, "epsilon_high": 0.2,
    }  # fmt: skip
    data = datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]})
    kind = trl.GRPOTrainer if own else trainer_class(loss)
    llama().save_pretrained(folder / "model")  # TRL reads the reference from where the model came from
    return kind(
        model=str(folder / "model"),
        reward_funcs=verifier,
        args=trl.GRPOConfig(**settings | changes),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def inputs(masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, WORDS - 2, (2, 3), generator=generator).repeat_interleave(4, 0)
    lengths = torch.tensor([5, 2, 5, 1, 3, 5, 4, 5])
    old = -3 - torch.rand(8, 5, generator=generator)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones(8, 3, dtype=torch.int64),
        "completion_ids": torch.randint(0, WORDS - 2, (8, 5), generator=generator),
        "completion_mask": (torch.arange(5) < lengths[:, None]).long(),
        "advantages": torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.1,
        "num_items_in_batch": torch.tensor(30),
    }


def test_log_probabilities_and_entropies_are_the_models(tmp_path: Path) -> None:
    model, given = llama(), inputs()
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    law = (model(ids, attention_mask=mask).logits[:, 2:-1] / 0.9).log_softmax(-1)
    known = law.gather(-1, ids[:, 3:, None])[..., 0]
    found = causal_lm_stats(model, ids, mask, 5, temperature=0.9)
    real = given["completion_mask"].bool()
    torch.testing.assert_close(found.logp[real], known[real], rtol=1e-5, atol=1e-5)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy[real], -(law.exp() * law).sum(-1)[real], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected 1 <= keep < 8 but got 8"):
        causal_lm_stats(model, ids, mask, 8)
    with pytest.raises(TypeError, match="expected a causal language model of transformers but got Linear"):
        causal_lm_stats(torch.nn.Linear(2, 2), ids, mask, 5)


def test_grpo_is_trls_own_loss(tmp_path: Path) -> None:
    given = inputs()
    found = []
    for own in (True, False):
        trainer = make(tmp_path, grpo(), own=own)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, given)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=1e-3, atol=1e-5 * float(found[0][1].abs().max())
    )


@pytest.mark.parametrize("loss", [nft, rft])
def test_trains_with_another_loss(loss: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, loss, scale_rewards="none")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in after)
    assert any("entropy" in row for row in trainer.state.log_history)


def test_what_nft_cannot_use_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, nft, scale_rewards="none")
    trainer.current_gradient_accumulation_steps = 1
    given = inputs()
    with pytest.raises(ValueError, match='set scale_rewards="none" and a verifier'):
        trainer._compute_loss(trainer.model, given | {"advantages": given["advantages"] * 1.3})
    half = {name: value[:6] if value.dim() else value for name, value in given.items()}
    with pytest.raises(ValueError, match="expected whole groups of 4 completions in a batch"):
        trainer._compute_loss(trainer.model, half)


def test_another_trainer_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"as in TRL 1.16, but object has no _get_per_token"):
        trainer_class(nft, base=object)
