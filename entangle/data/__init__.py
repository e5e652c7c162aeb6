"""Preference pairs from any source, tokenised and collated exactly as TRL's DPOTrainer does it.

    source (hub id, file, folder, rows) -> PreferencePair -> TokenizedPair -> RowBatch

Law: for the same rows, tokenizer and `max_length`, `collate(tokenize_pair(...))` equals what TRL 1.16 feeds
to its model, token for token and mask for mask. The one difference is deliberate: a pair that TRL drops
without a word, because its prompt alone fills `max_length`, is returned here with `dropped` set.

Texts are untrusted: they are only ever compared, hashed and tokenised.
"""

from entangle.data.formats import FORMATS
from entangle.data.given import Pairs, load_pairs, pairs_of
from entangle.data.pairs import (
    COLUMNS,
    PairSet,
    PreferencePair,
    hash_pairs,
    read_pairs,
    split_prompt,
)
from entangle.data.tokens import TokenizedPair, TokenizedPairs, collate, tokenize_pair, tokenize_pairs
from entangle.errors import DataError

__all__ = [
    "COLUMNS",
    "DataError",
    "FORMATS",
    "PairSet",
    "Pairs",
    "PreferencePair",
    "TokenizedPair",
    "TokenizedPairs",
    "collate",
    "hash_pairs",
    "load_pairs",
    "pairs_of",
    "read_pairs",
    "split_prompt",
    "tokenize_pair",
    "tokenize_pairs",
]
