"""What ships with the package: a tiny real policy with its LoRA adapter, and a pair set written for the project."""

from pathlib import Path

POLICY = Path(__file__).parent / "policy"
ADAPTER = Path(__file__).parent / "adapter"
PAIRS = Path(__file__).parent / "pairs.jsonl"
