"""Rewards of sampled answers: reward functions, statistics, gradients, rollouts."""
