"""TRL's trainers of groups and of pairs with our scorer and our losses: beside their own numbers, and training."""

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
        from arcore.integrations.trl import (
            causal_lm_stats,
            completion_logprobs,
            dpo,
            grpo,
            hinge,
            inpo,
            ipo,
            kto,
            nft,
            pair_trainer_class,
            rft,
            spo,
            srpo,
            trainer_class,
            win_rates,
        )

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


def pairs(folder: Path, loss: Any, *, own: bool = False, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "model_init_kwargs": {"dtype": "float32"}, "per_device_train_batch_size": 4,
        "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "beta": 0.3, "disable_dropout": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True,
    }  # fmt: skip
    texts = ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]
    data = datasets.Dataset.from_dict(
        {
            "prompt": [f"{text} " for text in texts],
            "chosen": ["w9", "w10 w11 w12", "w13 w14", "w15"],
            "rejected": ["w16 w17", "w18", "w19 w20 w21", "w22 w23"],
        }
    )
    llama().save_pretrained(folder / "model")
    kind = trl.DPOTrainer if own else pair_trainer_class(loss)
    return kind(
        model=str(folder / "model"),
        args=trl.DPOConfig(**settings | changes),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def first_batch(trainer: Any) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def moved_a_little(trainer: Any) -> None:
    """Without a step policy and reference are the same, and a sign or a scale would not show."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize(("name", "loss"), [("sigmoid", dpo), ("hinge", hinge)])
def test_losses_of_pairs_are_trls_own(name: str, loss: Any, tmp_path: Path) -> None:
    found = []
    for own in (True, False):
        trainer = pairs(tmp_path, loss, own=own, loss_type=[name])
        moved_a_little(trainer)
        trainer.model.train()
        value = trainer.compute_loss(trainer.model, first_batch(trainer))
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        figures = {key: kept[-1] for key, kept in trainer._metrics["train"].items()}
        found.append((value.detach(), gradient, figures))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    scale = float(found[0][1].abs().max())
    assert scale > 0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5 * scale)
    for key in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
    ):
        assert found[1][2][key] == pytest.approx(found[0][2][key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "loss", [ipo, kto, inpo(tau=0.1, eta=0.3), srpo(between=[30, 31])], ids=["ipo", "kto", "inpo", "srpo"]
)
def test_pairs_train_with_another_loss(loss: Any, tmp_path: Path) -> None:
    trainer = pairs(tmp_path, loss)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in after)
    assert any("rewards/margins" in row for row in trainer.state.log_history)


def test_inpo_knows_the_iteration_before_and_srpo_its_revisions(tmp_path: Path) -> None:
    seen: list[Any] = []

    def kept(batch: Any) -> Tensor:
        seen.append(batch)
        return dpo(batch)

    trainer = pairs(tmp_path, kept)
    moved_a_little(trainer)
    trainer.compute_loss(trainer.model, inputs := first_batch(trainer))
    [batch] = seen
    ratio = (batch.policy - batch.reference).detach()
    gap = (ratio[:, 0] - ratio[:, 1]) - 1 / 0.6
    # With the reference as the iteration before, INPO is IPO with beta 1 / (2 gap).
    first = inpo(tau=0.3, eta=0.3)(batch)
    assert float(inpo(tau=0.3, eta=0.3, previous=trainer.ref_model)(batch)) == pytest.approx(
        float(first), rel=1e-5
    )
    assert float(first) == pytest.approx(float(gap.square().mean()), rel=1e-4)
    assert float(inpo(tau=0.1, eta=0.3, previous=llama(7))(batch)) != pytest.approx(float(first), rel=1e-3)
    between = [30, 31]
    whole = batch.revise(trainer.model, between).detach()
    ids, completion = inputs["input_ids"], inputs["completion_mask"].bool()
    pair, a, b = 1, 1, 0
    one, other = (pair + 4 * side for side in (a, b))
    row = ids[one][inputs["attention_mask"][one].bool()].tolist() + between
    answer = ids[other][completion[other]].tolist()
    law = trainer.model(torch.tensor([row + answer])).logits.log_softmax(-1)[0]
    known = sum(law[len(row) + t - 1, token] for t, token in enumerate(answer))
    assert float(whole[pair, a, b]) == pytest.approx(float(known), rel=1e-4)


def test_adapters_have_the_plain_model_as_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    seen: list[Any] = []

    def kept(batch: Any) -> Tensor:
        seen.append(batch)
        return dpo(batch)

    llama().save_pretrained(tmp_path / "model")
    plain = pairs(tmp_path, kept)
    trainer = type(plain)(
        model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        args=plain.args,
        train_dataset=plain.train_dataset,
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    trainer.compute_loss(trainer.model, batch := first_batch(trainer))
    assert not torch.allclose(seen[0].policy, seen[0].reference)
    logp = completion_logprobs(llama(), batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    torch.testing.assert_close(torch.stack(logp.sum(1).chunk(2), 1), seen[0].reference, rtol=1e-4, atol=1e-4)


def test_win_rates_are_rewards_for_trl(tmp_path: Path) -> None:
    rewards = win_rates(lambda prompt, one, other: float(len(one) >= len(other)), 3)
    assert rewards(["p"] * 3 + ["q"] * 3, ["a", "bbb", "cc", "x", "yy", "zzz"]) == [0, 1, 0.5, 0, 0.5, 1]
    for prompts, told in (
        (["p"] * 4, "whole groups of 3 completions but got 4"),
        (["p", "q", "p"], "behind each"),
    ):
        with pytest.raises(ValueError, match=told):
            rewards(prompts, ["a"] * len(prompts))
    with pytest.raises(ValueError, match="group_size of at least 2"):
        win_rates(lambda *_: 1.0, 1)
    trainer = make(tmp_path, spo, scale_rewards="none")
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer._compute_loss(trainer.model, inputs()))


def test_what_pairs_cannot_be_is_refused(tmp_path: Path) -> None:
    for changes, told in (({"ld_alpha": 0.5}, "expected ld_alpha=None but got 0.5"),
                          ({"use_weighting": True}, "expected use_weighting=False but got True")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            pairs(tmp_path, dpo, **changes)
    with pytest.raises(ValueError, match=r"expected 0 < tau <= eta but got tau=0\.4 and eta=0\.3"):
        inpo(tau=0.4, eta=0.3)
    with pytest.raises(ValueError, match="expected tokens between an answer and its revision"):
        srpo(between=[])
    with pytest.raises(RuntimeError, match="expected a trainer with _compute_loss"):
        pair_trainer_class(dpo, base=object)
    ones = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no completion to begin with the first token"):
        completion_logprobs(llama(), ones, ones, ones)
