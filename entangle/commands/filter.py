"""A data set without its harmful pairs, or with weights: a finished probe's verdicts written back to the data.

    FILE                    the data set in its own format: same columns, same order, and entangle_* columns of scores
    FILE.provenance.json    run, rules, counts, hashes, and every row that went, with the reason

The data must be the one that the run has seen: it is loaded again from the run's options, and its fingerprint compared.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset
from rapidfuzz.distance import Levenshtein
from rich.console import Console, RenderableType

from entangle.analysis.predictions import is_scored
from entangle.analysis.regimes import REGIMES
from entangle.analysis.summary import derived, regime_shares
from entangle.commands.output import Output
from entangle.commands.probe import ProbeResult
from entangle.config import (
    Condition,
    DataOptions,
    FilterConfig,
    Rule,
    build_losses,
    parse_rule,
    parse_weight,
)
from entangle.config.hashing import hash_file
from entangle.config.places import DATA_SUFFIXES, is_local
from entangle.data import PreferencePair, hash_pairs
from entangle.data.sources import read_rows
from entangle.errors import ConfigError, DataError, RunError
from entangle.measure.inputs import load_pairs_of
from entangle.runs.atomic import replacing
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown
from entangle.tables.filter import filter_tables
from entangle.version import __version__

SCORES = ("cosine", "norm_ratio", "regime", "change_chosen", "change_rejected", "slack")
"""Columns that are always written, as entangle_<name>."""

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class FilterResult(Shown):
    """What was decided, row by row of the data set.

    Args:
        out: where the data went, or would go.
        decisions: one row per row of the data set, in its order: index, keep, weight, reasons and the scores.
        summary: counts by rule, and what the kept pairs look like beside all of them.
    """

    out: Path
    decisions: pd.DataFrame
    summary: dict[str, Any]

    def renderable(self) -> RenderableType:
        """The summary as rich tables."""
        return filter_tables(self.summary)


def run_filter(config: FilterConfig) -> FilterResult:
    """Decide on every row of the run's data set, and write the data set back unless it is a dry run.

    Raises:
        UserError: the run isn't a finished probe, its data is gone or has changed, a rule names what isn't there, or
            the file can't be written.
    """
    if not config.drop and not config.weight:
        raise ConfigError("Expected at least one rule, for instance --drop 'regime==both_down'; got none.")
    probe = ProbeResult.load(config.run)
    options = data_options_of(probe)
    source = source_of(options)
    out = _checked_out(config, source)
    pairs = load_pairs_of(options)
    found, recorded = hash_pairs(pairs), probe.folder.read_json("identity.json").get("data")
    if found != recorded:
        raise RunError(
            f"{options.dataset_name} isn't the data that {probe.folder.path} was made from (fingerprint {recorded!r} "
            f"there, {found!r} now). Restore it, or probe again into another folder."
        )
    data = StoredData.read(source, options)
    loss = _label(probe, config.loss)
    table = pair_table(probe, pairs, loss)
    drops = [parse_rule(text) for text in config.drop]
    weights = [parse_weight(text) for text in config.weight]
    decisions = decide(table, len(data), drops, weights, keeps_unprobed=config.unprobed == "keep")
    if not (config.dry_run or decisions["keep"].any()):
        raise ConfigError(
            "The rules drop every row, so nothing would be left to write. --dry_run says which does."
        )
    summary = _summary(probe, table, decisions, [*drops, *(rule for _, rule in weights)], loss)
    if config.dry_run:
        return FilterResult(out, decisions, summary)
    scores = [*SCORES, *_columns_of_rules(drops, weights), *_diagnostics_of(probe)]
    added = added_columns(decisions, scores, config if weights else None, data.columns)
    formulas = data.write(out, added, quotes_formulas=config.formulas == "quote")
    result = FilterResult(out, decisions, summary | {"formulas": formulas, "formulas_are": config.formulas})
    _write_provenance(result, config, options, source, found)
    return result


def command(config: FilterConfig, console: Console | None = None) -> Output:
    """`entangle filter`."""
    result = run_filter(config)
    place = "Dry run: nothing is written." if config.dry_run else f"Data: {result.out}"
    return Output(result.renderable(), place)


# --- what is known of every pair ------------------------------------------------------------------------------


def pair_table(probe: ProbeResult, pairs: Sequence[PreferencePair], loss: str) -> pd.DataFrame:
    """Everything a rule can ask about, one row per probed pair, by its index in the data set.

    The run's columns, the derived ones (norm_ratio, ratio_chosen, ratio_rejected, length_ratio), the predictions under
    `loss`, `text_distance`, and the flags duplicate_prompt and duplicate_pair (the same stood earlier in the data).
    """
    rows = probe.pairs.set_index("index")
    rows = rows.assign(**{k: v for k, v in derived(rows).items() if k not in rows})
    predictions = probe.predictions[probe.predictions["loss"] == loss].set_index("index").drop(columns="loss")
    texts = pd.DataFrame(
        {
            "index": [pair.index for pair in pairs],
            "text_distance": [
                Levenshtein.normalized_distance(*map(_plain, (p.chosen, p.rejected))) for p in pairs
            ],
            "_prompt": [_plain(pair.prompt) for pair in pairs],
            "_pair": ["\0".join(map(_plain, (p.prompt, p.chosen, p.rejected))) for p in pairs],
        }
    ).set_index("index")
    texts["duplicate_prompt"] = texts["_prompt"].duplicated()
    texts["duplicate_pair"] = texts["_pair"].duplicated()
    texts = texts.drop(columns=["_prompt", "_pair"])
    return rows.join([frame[[c for c in frame if c not in rows]] for frame in (predictions, texts)])


def _plain(text: Any) -> str:
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)


def _label(probe: ProbeResult, wanted: Any) -> str:
    known = list(dict.fromkeys(probe.predictions["loss"]))
    if not known:
        raise RunError(f"No pair of {probe.folder.path} could be scored, so there is nothing to filter by.")
    label = known[0] if wanted is None else build_losses([wanted])[0].label
    if label not in known:
        raise ConfigError(f"{label} isn't among the losses of {probe.folder.path}: {', '.join(known)}.")
    return label


def _diagnostics_of(probe: ProbeResult) -> list[str]:
    return list(probe.summary.get("diagnostics", {}).get("columns", []))


def _columns_of_rules(drops: Sequence[Rule], weights: Sequence[tuple[float, Rule]]) -> list[str]:
    rules = [*drops, *(rule for _, rule in weights)]
    return [part.column for rule in rules for part in rule.conditions if part.operator != "is"]


# --- decisions ------------------------------------------------------------------------------------------------


def decide(
    table: pd.DataFrame,
    rows: int,
    drops: Sequence[Rule],
    weights: Sequence[tuple[float, Rule]],
    *,
    keeps_unprobed: bool = True,
) -> pd.DataFrame:
    """Keep or drop every row of a data set, and its weight.

    Args:
        table: what is known of the probed pairs, by their row in the data set.
        rows: rows of the data set.
        drops: rules; a match of any drops the pair.
        weights: rules with their weights; matches multiply.
        keeps_unprobed: whether rows that aren't in the table stay.

    Returns:
        `table` on every row of the data set, with the columns keep, weight and reasons before it.
    """
    keep = pd.Series(True, index=table.index)
    weight = pd.Series(1.0, index=table.index)
    reasons = pd.Series("", index=table.index)
    for factor, rule in [(None, rule) for rule in drops] + list(weights):
        matched = matches(rule, table)
        keep &= ~matched if factor is None else True
        weight = weight.where(~matched, weight * (1.0 if factor is None else factor))
        said = rule.text if factor is None else f"{rule.text} (weight {factor:g})"
        reasons = reasons.where(~matched, reasons.where(reasons == "", reasons + "; ") + said)
    decided = pd.DataFrame({"keep": keep, "weight": weight, "reasons": reasons})
    whole = decided.join(table[[c for c in table if c not in decided]]).reindex(pd.RangeIndex(rows))
    unprobed = whole["reasons"].isna()
    whole["keep"] = whole["keep"].where(~unprobed, keeps_unprobed).astype(bool)
    whole["weight"] = whole["weight"].fillna(1.0)
    whole["reasons"] = whole["reasons"].where(~unprobed, "unprobed")
    return whole.rename_axis("index").reset_index()


def matches(rule: Rule, table: pd.DataFrame) -> pd.Series:
    """Which pairs a rule matches.

    Raises:
        ConfigError: it names a column that isn't there, or compares what can't be compared.
    """
    matched = pd.Series(True, index=table.index)
    for condition in rule.conditions:
        matched &= _holds(condition, table, rule.text)
    return matched


def _holds(condition: Condition, table: pd.DataFrame, text: str) -> pd.Series:
    name, value = condition.column, condition.value
    if name not in table:
        raise ConfigError(
            f"The rule {text!r} asks for {name}, which the run doesn't have. It has: "
            f"{', '.join(sorted(map(str, table.columns)))}. Diagnostics come with entangle probe --diagnostics {name}."
        )
    column = table[name]
    is_flag, is_number = pd.api.types.is_bool_dtype(column), pd.api.types.is_numeric_dtype(column)
    if condition.operator == "is":
        if not is_flag:
            raise ConfigError(f"{name} in the rule {text!r} isn't a flag: compare it, for instance {name}>0.")
        return column
    if is_flag or is_number == isinstance(value, str):
        kind = "a flag" if is_flag else "a number" if is_number else "text"
        raise ConfigError(f"{name} in the rule {text!r} is {kind}, and can't be compared with {value!r}.")
    if name == "regime" and value not in list(map(str, REGIMES)):
        raise ConfigError(f"{value!r} in the rule {text!r} isn't a regime: {', '.join(map(str, REGIMES))}.")
    if condition.operator in _COMPARE:
        return _COMPARE[condition.operator](column, value) & column.notna()
    count = int(column.notna().sum() * float(value) / 100)
    order = column.rank(method="first", ascending=condition.operator == "lowest")
    return order <= count


def _summary(
    probe: ProbeResult, table: pd.DataFrame, decisions: pd.DataFrame, rules: Sequence[Rule], loss: str
) -> dict[str, Any]:
    matched = {rule.text: matches(rule, table) for rule in rules}
    times = pd.DataFrame(matched).sum(axis=1)
    kept = decisions.loc[decisions["keep"], "index"]

    def look(index: pd.Series) -> dict[str, Any]:
        rows = probe.pairs[probe.pairs["index"].isin(index)]
        judged = probe.predictions[probe.predictions["loss"] == loss]
        judged = judged[judged["index"].isin(index)]
        return {
            "scored": int(is_scored(rows).sum()),
            "median_cosine": float(rows["cosine"].median()),
            "regimes": regime_shares(judged).get(loss, {}),
        }

    return {
        "rows": len(decisions),
        "kept": len(kept),
        "dropped": len(decisions) - len(kept),
        "reweighted": int((decisions["keep"] & (decisions["weight"] != 1)).sum()),
        "unprobed": int((decisions["reasons"] == "unprobed").sum()),
        "total_weight": float(decisions.loc[decisions["keep"], "weight"].sum()),
        "loss": loss,
        "rules": {
            text: {"matched": int(rows.sum()), "alone": int((rows & (times == 1)).sum())}
            for text, rows in matched.items()
        },
        "before": look(decisions["index"]),
        "after": look(kept),
    }


# --- the data set, there and back -----------------------------------------------------------------------------


def data_options_of(probe: ProbeResult) -> DataOptions:
    """Which data the run read."""
    recorded = probe.folder.config
    values: dict[str, Any] = {f.name: recorded[f.name] for f in fields(DataOptions) if f.name in recorded}
    return DataOptions(**values)


def source_of(options: DataOptions) -> Path | None:
    """The file that the data is in; None for a folder or the hub."""
    name = options.dataset_place
    path = Path(name).expanduser()
    return path if is_local(name, DATA_SUFFIXES) and not path.is_dir() else None


def _checked_out(config: FilterConfig, source: Path | None) -> Path:
    allowed = (".jsonl", ".parquet") if source is None else (source.suffix.lower(),)
    out = Path(config.out).expanduser()
    if not config.out and config.dry_run:
        return out
    if not config.out or out.suffix.lower() not in allowed:
        raise ConfigError(
            f"Expected --out with the suffix {' or '.join(allowed)}, the data's own format; got {config.out!r}."
        )
    if source is not None and out.resolve() == source.resolve():
        raise ConfigError(f"--out {out} is the data set itself. Choose another file.")
    if out.exists() and not config.overwrite and not config.dry_run:
        raise ConfigError(f"{out} exists. Choose another --out, or give --overwrite to replace it.")
    return out


@dataclass(frozen=True)
class StoredData:
    """The data set as it is stored: a table of parquet, or rows with every value as it was read."""

    content: pa.Table | list[dict[str, Any]]

    @classmethod
    def read(cls, source: Path | None, options: DataOptions) -> StoredData:
        """The whole data set, whatever the run's limit was."""
        if source is not None and source.suffix.lower() == ".parquet":
            return cls(parquet.read_table(source))
        if source is not None and source.suffix.lower() == ".csv":
            frame = pd.read_csv(source, dtype=str, keep_default_na=False)  # every cell as it is written
            return cls([{str(k): v for k, v in row.items()} for row in frame.to_dict("records")])
        rows = read_rows(source or options.dataset_name, options.dataset_train_split, options.dataset_config)
        if isinstance(rows, Dataset):
            return cls(rows.with_format("arrow")[:])
        return cls([dict(row) for row in rows])

    def __len__(self) -> int:
        return len(self.content)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if isinstance(self.content, pa.Table):
            return list(self.content.schema.names)  # pyright: ignore[reportAttributeAccessIssue]
        return list(dict.fromkeys(name for row in self.content for name in row))

    def write(self, out: Path, added: pd.DataFrame, *, quotes_formulas: bool = False) -> int:
        """Write the rows of `added` (by its index) with its columns, in the format of the name; whole or not at all.

        Returns:
            Texts of a .csv file that a spreadsheet would take for formulas.

        Raises:
            DataError: the file can't be written.
        """
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as temporary:
                return self._write(temporary, out.suffix.lower(), added, quotes_formulas)
        except OSError as error:
            raise DataError(f"Can't write {out}: {error.strerror or error}.") from error

    def _write(self, path: Path, suffix: str, added: pd.DataFrame, quotes_formulas: bool) -> int:
        if suffix == ".parquet" or isinstance(self.content, pa.Table):
            table = self._table().take(pa.array(added.index))
            for name, column in added.items():
                if name in table.column_names:
                    table = table.drop_columns([str(name)])
                table = table.append_column(str(name), pa.array(column, from_pandas=True))
            if suffix == ".parquet":
                parquet.write_table(table, path)
                return 0
            rows = table.to_pylist()
        else:
            extra = added.astype(object).where(added.notna(), None).to_dict("records")
            rows = [self.content[i] | new for i, new in zip(added.index, extra, strict=True)]
        if suffix == ".csv":
            names = dict.fromkeys([*self.columns, *map(str, added.columns)])
            cells = pd.DataFrame(rows, columns=pd.Index(list(names)))
            formulas = cells.map(is_formula)
            cells = cells.mask(formulas, "'" + cells.astype(str)) if quotes_formulas else cells
            cells.to_csv(path, index=False)
            return int(formulas.to_numpy().sum())
        if suffix == ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        else:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
        return 0

    def _table(self) -> pa.Table:
        return self.content if isinstance(self.content, pa.Table) else pa.Table.from_pylist(self.content)


def is_formula(cell: Any) -> bool:
    """Whether a spreadsheet would run a cell: a text, not a number, beginning with = + - @, tab or carriage return."""
    if not isinstance(cell, str) or cell[:1] not in tuple("=+-@\t\r"):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def added_columns(
    decisions: pd.DataFrame, scores: Sequence[str], weighted: FilterConfig | None, existing: Sequence[str]
) -> pd.DataFrame:
    """What is written beside the data's own columns, of the kept rows, by their row in the data set.

    Raises:
        ConfigError: the data has a column with the weights' name.
    """
    kept = decisions[decisions["keep"]].set_index("index")
    added = pd.DataFrame({f"entangle_{name}": kept[name] for name in dict.fromkeys(scores) if name in kept})
    added["entangle_reasons"] = kept["reasons"]
    if weighted is not None:
        if weighted.weight_column in existing:
            raise ConfigError(
                f"The data has a column {weighted.weight_column!r} already. Choose another --weight_column."
            )
        added[weighted.weight_column] = kept["weight"]
    return added


def _write_provenance(
    result: FilterResult, config: FilterConfig, options: DataOptions, source: Path | None, data: str
) -> None:
    gone = result.decisions[~result.decisions["keep"]]
    content = {
        "entangle": __version__,
        "run": config.run,
        "identity": RunFolder(config.run).read_json("identity.json"),
        "source": {
            "dataset_name": options.dataset_name,
            "dataset_config": options.dataset_config,
            "dataset_train_split": options.dataset_train_split,
            "fingerprint": data,
            "sha256": None if source is None else hash_file(source),
        },
        "out": {"file": result.out.name, "sha256": hash_file(result.out)},
        "drop": list(config.drop),
        "weight": list(config.weight),
        "summary": result.summary,
        "dropped": dict(zip(map(str, gone["index"]), gone["reasons"], strict=True)),
    }
    file = result.out.with_name(f"{result.out.name}.provenance.json")
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
