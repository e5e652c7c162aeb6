"""Preference pairs from any source, tokenised and collated exactly as TRL's DPOTrainer does it.

    source (hub id, file, folder, rows) -> PreferencePair -> TokenizedPair -> RowBatch

Law: for the same rows, tokenizer and `max_length`, `collate(tokenize_pair(...))` equals what TRL 1.16 feeds
to its model, token for token and mask for mask. The one difference is deliberate: a pair that TRL drops
without a word, because its prompt alone fills `max_length`, is returned here with `dropped` set.

Texts are untrusted: they are only ever compared, hashed and tokenised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from entangle.errors import UserError
from entangle.rows import RowBatch

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Text = str | list[Message]
Rows = Dataset | Sequence[Mapping[str, Any]]
Ids = list[int]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "tools",
    "chat_template_kwargs",
)
"""The columns that have a meaning, under TRL's names; every other scalar column is kept as `extra`."""

_FOREIGN_SUFFIXES = (
    ".txt",
    ".tsv",
    ".gz",
    ".bz2",
    ".xz",
    ".zip",
    ".zst",
    ".arrow",
    ".pkl",
    ".pickle",
    ".yaml",
)
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class DataError(UserError):
    """The data can't be used: the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a chosen and a rejected response, as the source has them.

    Args:
        index: row in the data set (in the named split), whatever subset was taken.
        prompt: a string, or a list of `{"role", "content"}` messages.
        chosen: the preferred response, of the same kind as the prompt.
        rejected: the other response.
        ref_chosen_logps: log pi_ref(chosen | prompt), summed, nats; None unless the data carries it.
        ref_rejected_logps: the same for the rejected response.
        extra: further scalar columns by name.
        template_options: what TRL hands to the chat template besides the messages (`tools` and the like).
    """

    index: int
    prompt: Text
    chosen: Text
    rejected: Text
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are lists of messages."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_hash(self) -> str:
        """First 16 hex digits of the sha256 of the prompt: equal prompts have equal hashes, in every run."""
        return hashlib.sha256(_canonical(self.prompt).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids: the rows are `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

    Args:
        index: row in the data set.
        prompt_ids: tokens that both rows begin with and that aren't scored.
        chosen_ids: the scored tokens of the chosen row, after truncation.
        rejected_ids: the same for the rejected row; each row is truncated on its own.
        prompt_hash: see `PreferencePair.prompt_hash`.
        truncated: a row was longer than `max_length`.
        identical: both rows hold the same tokens, so their scores are equal and no loss can tell them apart.
        empty: a row has no scored token (a token without a token before it can't be scored).
        dropped: the prompt alone fills `max_length`, so TRL doesn't train on the pair. Implies `truncated`
            three.
        ref_chosen_logps: see `PreferencePair`.
        ref_rejected_logps: see `PreferencePair`.
        extra: see `PreferencePair`.
    """

    index: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_hash: str = ""
    truncated: bool = False
    identical: bool = False
    empty: bool = False
    dropped: bool = False
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


# --- from a source to pairs ---------------------------------------------------------------------------------


def load_pairs(
    dataset_name: str | Path | Dataset | DatasetDict | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    skip_invalid: bool = False,
) -> list[PreferencePair]:
    """The pairs of a data set, in its order and with its row numbers.

    Args:
        dataset_name: a hub id; a .json, .jsonl, .csv or .parquet file; a folder of such files; a folder
            written by `save_to_disk`; a `datasets.Dataset` (or dict of them); or a list of dicts.
        split: which split of the hub data set, folder or dict; a single file or table has no splits.
        config: configuration of a hub data set.
        columns: our column names to theirs, e.g. `{"chosen": "better"}`. Without a `prompt` column the prompt
            is what chosen and rejected begin with in common (TRL's `extract_prompt`).
        limit: at most this many pairs.
        seed: which ones: a random subset that depends on nothing but the seed, the limit and the number of
            rows. Without it, the first ones.
        skip_invalid: leave out rows that can't be used, and log how many, instead of refusing the data.

    Raises:
        DataError: the source isn't there, can't be read, has no rows, lacks a column, or a row can't be used.

    Example:
        >>> rows = [{"question": "2 + 2 =", "chosen": " 4", "rejected": " 5", "kind": "sum"}]
        >>> load_pairs(rows, columns={"prompt": "question"})[0].extra
        {'kind': 'sum'}
    """
    source = dataset_name if isinstance(dataset_name, str | Path) else "the given data"
    rows = _read(dataset_name, split, config)
    if not len(rows):
        raise DataError(f"Expected at least one pair in {source}; it has no rows.")
    names = _column_names(rows, columns or {}, str(source))
    pairs: list[PreferencePair] = []
    invalid: dict[int, DataError] = {}
    for index in _subset(len(rows), limit, seed):
        try:
            pairs.append(_pair(index, rows[index], names, str(source)))
        except DataError as error:
            invalid[index] = error
    if invalid:
        _report(invalid, str(source), skip_invalid and bool(pairs))
    return pairs


def fingerprint(pairs: Sequence[PreferencePair]) -> str:
    """sha256 of all that a probe reads of the pairs: equal iff it would see the same data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(
            _canonical(
                [
                    pair.index,
                    pair.prompt,
                    pair.chosen,
                    pair.rejected,
                    pair.ref_chosen_logps,
                    pair.ref_rejected_logps,
                    dict(pair.template_options),
                ]
            ).encode()
        )
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _subset(count: int, limit: int | None, seed: int | None) -> Sequence[int]:
    if limit is None:
        return range(count)
    if limit < 1:
        raise DataError(f"Expected a limit of at least 1 pair; got {limit}. Leave it out to take every pair.")
    if seed is None or limit >= count:
        return range(min(limit, count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _report(invalid: Mapping[int, DataError], source: str, skip: bool) -> None:
    first, error = next(iter(invalid.items()))
    others = list(invalid)[1:]
    more = ""
    if others:
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        more = f" So can't {len(others)} more row{'s' * (len(others) > 1)}: {shown}."
    if skip:
        logger.warning("Left out %d of the rows of %s. The first: %s%s", len(invalid), source, error, more)
        return
    raise DataError(f"{error}{more} Mend or remove what is listed, or skip it (skip_invalid).") from invalid[
        first
    ]


# --- from a row to a pair -----------------------------------------------------------------------------------


def _column_names(rows: Rows, renamed: Mapping[str, str], source: str) -> dict[str, str]:
    """Our names -> theirs, of the columns that are there."""
    unknown = sorted(set(renamed) - set(COLUMNS))
    if unknown:
        raise DataError(f"columns has the unknown name {unknown[0]!r}; it can map: {', '.join(COLUMNS)}.")
    there = (
        rows.column_names
        if isinstance(rows, Dataset)
        else list(dict.fromkeys(k for row in rows for k in row))
    )
    for ours in dict.fromkeys(["chosen", "rejected", *renamed]):
        theirs = renamed.get(ours, ours)
        if theirs not in there:
            raise DataError(
                f"Expected a column {theirs!r} in {source}; its columns are: {', '.join(map(str, there))}. "
                f"Say which one it is with columns, e.g. "
                f"{{{ours!r}: {str(next(iter(there), 'its_name'))!r}}}."
            )
    names = {ours: renamed.get(ours, ours) for ours in COLUMNS}
    return {ours: theirs for ours, theirs in names.items() if theirs in there}


def _pair(index: int, row: Mapping[str, Any], names: Mapping[str, str], source: str) -> PreferencePair:
    where = f"Row {index} of {source}"
    texts = {
        ours: _text(row.get(names[ours]), names[ours], where)
        for ours in ("prompt", "chosen", "rejected")
        if ours in names
    }
    chosen, rejected = texts["chosen"], texts["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: {names['chosen']!r} and {names['rejected']!r} should both be strings or both be lists "
            f"of messages; got {type(chosen).__name__} and {type(rejected).__name__}."
        )
    # TRL's convention: a plain prompt beside whole conversations is a copy of what these begin with
    if "prompt" in texts and isinstance(texts["prompt"], str) == isinstance(chosen, str):
        prompt = texts["prompt"]
    else:
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    if not prompt:
        what = (
            f"{names['prompt']!r} is empty" if "prompt" in texts else "chosen and rejected begin differently"
        )
        raise DataError(f"{where} has no prompt: {what}.")
    ref_chosen, ref_rejected = _reference(row, names, where)
    return PreferencePair(
        index=index,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        extra={k: v for k, v in row.items() if k not in names.values() and isinstance(v, str | int | float)},
        template_options=_template_options(row, names, where),
    )


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) from two texts that begin alike: characters of strings, messages of lists.

    The prompt is the longest common prefix, and as in TRL (`extract_prompt`) a space before the difference
    stays with the responses, and a text that begins the other one keeps its last character or message as
    response.

    Example:
        >>> split_prompt("The sky is blue", "The sky is green")
        ('The sky is', ' blue', ' green')
    """
    shortest = min(len(chosen), len(rejected))
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if cut is None:
        cut = max(shortest - 1, 0)
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _text(value: Any, column: str, where: str) -> Text:
    if isinstance(value, str):
        if not value and column:
            raise DataError(f"{where}: {column!r} is empty.")
        return value
    if isinstance(value, list) and value:
        for message in value:
            _check_message(message, column, where)
        return value
    came = "an empty list" if isinstance(value, list) else f"{type(value).__name__} ({_shortened(value)})"
    raise DataError(f"{where}: {column!r} should be a string or a list of role/content messages; got {came}.")


def _check_message(message: Any, column: str, where: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: the messages in {column!r} should be objects with 'role' and 'content'; "
            f"got {_shortened(message)}."
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(
            f"{where}: the 'content' of a message in {column!r} should be a string (images and other parts "
            f"aren't supported); got {type(content).__name__} ({_shortened(content)})."
        )


def _reference(
    row: Mapping[str, Any], names: Mapping[str, str], where: str
) -> tuple[float | None, float | None]:
    values: list[float | None] = []
    for ours in ("ref_chosen_logps", "ref_rejected_logps"):
        value = row.get(names[ours]) if ours in names else None
        try:
            values.append(None if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: {names[ours]!r} should be a number; got {_shortened(value)}."
            ) from None
    if (values[0] is None) != (values[1] is None):
        raise DataError(
            f"{where} has only one of the reference log-probs ref_chosen_logps and ref_rejected_logps; give "
            "both."
        )
    return values[0], values[1]


def _template_options(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "tools" in names and (tools := row.get(names["tools"])):
        try:
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: {names['tools']!r} should be a list or its JSON; {error}.") from None
    if "chat_template_kwargs" in names:
        options |= row.get(names["chat_template_kwargs"]) or {}
    if "chat_template" in options:
        raise DataError(
            f"{where} brings a chat template, which is a program; it has to come from the tokenizer."
        )
    return options


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- from a source to rows ----------------------------------------------------------------------------------


def is_local(name: str | Path, suffixes: Sequence[str] = ()) -> bool:
    """Whether `name` means a path, there or not, and not a hub id (`name` or `owner/name`)."""
    text = str(name)
    return (
        isinstance(name, Path)
        or Path(text).exists()
        or text.startswith((".", "/", "~", "\\"))
        or text.count("/") > 1
        or "\\" in text
        or text.lower().endswith(tuple(suffixes))
    )


def _read(data: Any, split: str, config: str | None) -> Rows:
    if isinstance(data, DatasetDict):
        return _of_dict(data, split, "the given data")
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str | Path):
        if not is_local(data, (*SUFFIXES, *_FOREIGN_SUFFIXES)):
            return _read_hub(str(data), split, config)
        path = Path(data).expanduser()
        if not path.exists():
            raise DataError(
                f"Expected a file or folder at {path}; there is none (working folder: {Path.cwd()})."
            )
        return _read_folder(path, split) if path.is_dir() else _read_file(path)
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return data
    raise DataError(
        "Expected a hub id, a path, a datasets.Dataset or a list of dicts; got "
        f"{type(data).__name__}. (Take what you need of a stream with list(itertools.islice(stream, n)).)"
    )


def _of_dict(data: DatasetDict, split: str, source: str) -> Dataset:
    if split not in data:
        raise DataError(
            f"Expected a split {split!r} in {source}; its splits are: {', '.join(map(str, data))}."
        )
    return data[split]


def _read_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"Can't load the data set {name!r} (split {split!r}, config {config!r}) from the hub: "
            f"{type(error).__name__}: {error} There is no local file or folder {name!r} either. Check the "
            "name; offline, only data sets that were loaded before can be used."
        ) from error
    assert isinstance(data, Dataset)  # what a single split of a data set is, unless it streams
    return data


def _read_folder(folder: Path, split: str) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            data = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} looks like a save_to_disk folder but can't be read: {error}."
            ) from error
        return _of_dict(data, split, str(folder)) if isinstance(data, DatasetDict) else data
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    # dataset_infos.json and the like describe a data set; they aren't part of it
    files = [file for file in files if not file.name.startswith((".", "dataset_info"))]
    chosen = [file for file in files if _split_of(file, folder) == _split_name(split)]
    if not chosen and split == "train":
        chosen = [file for file in files if _split_of(file, folder) is None]
    if not chosen:
        there = ", ".join(str(file.relative_to(folder)) for file in files[:10]) or "none"
        raise DataError(
            f"Expected {', '.join(SUFFIXES)} files of the split {split!r} (with that word in their name) or "
            f"a save_to_disk data set in {folder}; files there: {there}."
        )
    return [row for file in chosen for row in _iterate(_read_file(file))]


def _split_name(word: str) -> str:
    return next((split for split, words in _SPLIT_WORDS.items() if word in words), word)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name, or a folder on the way to it, has as a word: `train-00000-of-00002`."""
    name = str(file.relative_to(folder).with_suffix("")).lower()
    words = set("".join(c if c.isalnum() else " " for c in name).split())
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), None)


def _iterate(rows: Rows) -> Iterator[Mapping[str, Any]]:
    return (rows[i] for i in range(len(rows)))


def _read_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return _json_lines(path, path.read_text(encoding="utf-8-sig"))
        if suffix == ".json":
            return _json(path)
        if suffix == ".csv":
            # texts are texts: "NA" is an answer, not a missing value
            text: Any = dict.fromkeys(("prompt", "chosen", "rejected"), str)
            frame = pd.read_csv(path, dtype=text, keep_default_na=False)
            return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
        if suffix == ".parquet":
            return Dataset(parquet.read_table(path))
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException) as error:
        raise DataError(f"{path} isn't a readable {suffix} file: {error}.") from error
    except OSError as error:
        raise DataError(f"Can't read {path}: {error.strerror or error}.") from error
    raise DataError(f"Expected a {', '.join(SUFFIXES)} file; got {path}.")


def _json(path: Path) -> list[Mapping[str, Any]]:
    """A list of objects, or JSON lines under the other name, as `datasets` accepts it too."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines(path, text)
    rows = _parse(text, path, 1)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} should be a list of objects; its entry {number} is {_shortened(row)}.")
    return rows


def _json_lines(path: Path, text: str) -> list[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # splitlines would cut at U+2028 inside a string
        if not line.strip():
            continue
        row = _parse(line, path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object; got {_shortened(row)}.")
        rows.append(row)
    return rows


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg}). Expected one object "
            "per line (.jsonl), or a list of objects (.json)."
        ) from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: the JSON is nested too deep to be a pair.") from None


# --- from pairs to rows of tokens ---------------------------------------------------------------------------


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int | None = 1024
) -> TokenizedPair:
    """A pair as token ids, as TRL 1.16's DPOTrainer makes them.

    1. Plain text: the end-of-sequence token is appended to a response that doesn't end with its text already
       (a tokenizer that appends one itself gives two, as in TRL). Conversations: the chat template closes the
       turn.
    2. Prompt, prompt + chosen and prompt + rejected are each tokenised whole, with the tokenizer's own
       special tokens.
    3. The scored part begins where prompt and prompt + response first differ, at the earlier of the two
       responses' places: a token that merges over the boundary is scored in both rows.
    4. Rows are cut on the right to `max_length` tokens, each on its own. `max_length=None` cuts nothing.

    Raises:
        DataError: a conversation meets a tokenizer without a chat template, or one that refuses its messages.
    """
    prompt_ids, chosen_row, rejected_row = _tokenize(tokenizer, pair)
    shared = min(_common_prefix(prompt_ids, chosen_row), _common_prefix(prompt_ids, rejected_row))
    chosen_kept, rejected_kept = chosen_row[:max_length], rejected_row[:max_length]
    chosen_ids, rejected_ids = chosen_kept[shared:], rejected_kept[shared:]
    unscored = 0 if shared else 1  # nothing stands before the first token of a row, so nothing predicts it
    return TokenizedPair(
        index=pair.index,
        prompt_ids=prompt_ids[:shared][:max_length],
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        prompt_hash=pair.prompt_hash,
        truncated=len(chosen_kept) < len(chosen_row) or len(rejected_kept) < len(rejected_row),
        identical=bool(chosen_ids) and chosen_ids == rejected_ids,
        empty=min(len(chosen_ids), len(rejected_ids)) <= unscored,
        dropped=max_length is not None and shared >= max_length,
        ref_chosen_logps=pair.ref_chosen_logps,
        ref_rejected_logps=pair.ref_rejected_logps,
        extra=pair.extra,
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> tuple[Ids, Ids, Ids]:
    """Tokens of prompt, prompt + chosen and prompt + rejected."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return (
            _tokenize_text(tokenizer, prompt),
            _tokenize_text(tokenizer, prompt + _ended(chosen, tokenizer)),
            _tokenize_text(tokenizer, prompt + _ended(rejected, tokenizer)),
        )
    assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
    return (
        _tokenize_chat(tokenizer, prompt, pair, add_generation_prompt=True),
        _tokenize_chat(tokenizer, prompt + chosen, pair),
        _tokenize_chat(tokenizer, prompt + rejected, pair),
    )


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    # verbose would warn of texts longer than the model, before they are cut
    encoded: Any = tokenizer(text=text, verbose=False)
    return list(encoded["input_ids"])


def _ended(response: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos: Any = tokenizer.eos_token
    return response if eos is None or response.endswith(eos) else response + eos


def _tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    pair: PreferencePair,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"Row {pair.index} is a conversation, but the tokenizer of "
            f"{tokenizer.name_or_path or 'the model'} has no chat template. Use the instruction-tuned "
            "model's tokenizer, or data with plain strings."
        )
    options = {"tools": None, **pair.template_options}
    if add_generation_prompt:
        options["add_generation_prompt"] = True
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=True, return_dict=True, **options
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(
            f"Row {pair.index}: the tokenizer's chat template refuses the conversation "
            f"(roles: {', '.join(m['role'] for m in messages)}): {error}"
        ) from error
    return list(encoded["input_ids"])


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    shortest = min(len(ids), len(others))
    return next((i for i in range(shortest) if ids[i] != others[i]), shortest)


def collate(pairs: Sequence[TokenizedPair], pad_id: int, padding_side: str = "right") -> RowBatch:
    """Pairs as one padded batch of `2 * len(pairs)` rows: every chosen one, then every rejected one.

    Masks say what is a token and what is scored; `pad_id` is only a filler and may be any token's id.

    Raises:
        DataError: no pairs, an unknown padding side, or a pair that TRL drops (it has nothing to score).
    """
    if padding_side not in ("left", "right"):
        raise DataError(f"padding_side should be 'left' or 'right'; got {padding_side!r}.")
    dropped = [pair.index for pair in pairs if pair.dropped]
    if dropped or not pairs:
        raise DataError(
            f"Expected pairs that have something to score; got "
            f"{f'dropped rows {dropped}' if dropped else 'none'}. Leave out the pairs whose `dropped` is "
            "set, or raise max_length."
        )
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prompts = [pair.prompt_ids for pair in pairs] * 2
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(responses), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response)
        start = 0 if padding_side == "right" else width - length
        input_ids[row, start : start + length] = torch.tensor(prompt + response)
        attention_mask[row, start : start + length] = 1
        completion_mask[row, start + len(prompt) : start + length] = 1
    return RowBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        prompt_length=torch.tensor([len(pair.prompt_ids) for pair in pairs]),
    )
