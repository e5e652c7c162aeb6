"""The engines against plain autograd, and the traps that a fast engine can fall into."""
