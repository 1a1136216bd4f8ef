"""A policy that writes an action as two tokens: cloned from demonstrations, then
improved by PPO on a small table.
"""

from arcore.zoo.agents.vla_rl import Sums, table_policy
from arcore.zoo.agents.vla_rl.training import PPO, Trainer, clone, success

policy, table = table_policy(seed=0), Sums(64, seed=0)
clone(policy, *table.demonstrations(512, 0.5), steps=100, seed=0)
before = success(policy, Sums(64, seed=1), episodes=256, seed=0)
trainer = Trainer(policy, table, PPO(), seed=0)
for _ in range(12):
    trainer.advance()
after = success(policy, Sums(64, seed=1), episodes=256, seed=0)
print(f"right actions: {before:.2f} after cloning, {after:.2f} after PPO")
