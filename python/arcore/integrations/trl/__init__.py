"""Our objectives and our log-prob op inside of TRL's trainers.

    from arcore.integrations.trl import inpo, nft, pair_trainer_class, trainer_class

    trainer = trainer_class(nft)(model=model, reward_funcs=verifier, args=config, train_dataset=data)
    trainer = pair_trainer_class(inpo(tau=0.01, eta=0.03))(model=model, args=config, train_dataset=pairs)

TRL computes its losses inside of its trainers, from log-probabilities that its models return; there is no argument for
another loss. So both functions make a subclass that replaces what scores and what is optimised and nothing else:
generation, rewards, data, logging and checkpoints stay TRL's. `trainer_class` derives from `GRPOTrainer`,
`pair_trainer_class` from `DPOTrainer`. Written for TRL 1.16; another version whose methods have other names is refused.
"""

from __future__ import annotations

from arcore.integrations.trl._groups import GrpoBatch, Loss, grpo, nft, rft, spo, trainer_class, win_rates
from arcore.integrations.trl._pairs import (
    PairBatch,
    PairLoss,
    dpo,
    hinge,
    inpo,
    ipo,
    kto,
    pair_trainer_class,
    srpo,
)
from arcore.integrations.trl._scoring import causal_lm_stats, completion_logprobs

__all__ = [
    "GrpoBatch",
    "Loss",
    "PairBatch",
    "PairLoss",
    "causal_lm_stats",
    "completion_logprobs",
    "dpo",
    "grpo",
    "hinge",
    "inpo",
    "ipo",
    "kto",
    "nft",
    "pair_trainer_class",
    "rft",
    "spo",
    "srpo",
    "trainer_class",
    "win_rates",
]
