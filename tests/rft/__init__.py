"""Tests of the reinforcement fine-tuning diagnostics."""
