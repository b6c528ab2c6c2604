"""Reinforcement learning from rewards: PPO (gae.py, ppo.py) and GRPO and RLOO (grpo.py), by one loop (loop.py).

The math is functions on tensors, each equal to its oracle in reference/. Values by token are flat, (tokens,), one
completion after another, with `lengths` (N,) saying where each ends: nothing is computed for padding.
"""
