"""A finished probe under other losses: what follows from its stored scores, and what would need the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entangle.analysis.predictions import may_have_reference, predict_losses
from entangle.analysis.summary import summarise
from entangle.commands.probe.prepared import Prepared, judgeable
from entangle.diagnostics import columns_of, summarise_diagnostics
from entangle.errors import RunError
from entangle.measure.set_content import SET_DETAILS, content_under
from entangle.runs.folder import RunFolder
from entangle.runs.session import Session

JUDGING = ("losses", "loss_batch_size")
"""Options that no score depends on."""

FREE_OF_LOSSES = ("resolution", "modules")
"""Parts of a probe's summary that no loss has a say in."""

FURTHER = ("tokens.parquet", "across.json", "whatif")
"""What other commands write into a probe's folder about its losses."""


def check_rejudging(run: RunFolder, prepared: Prepared) -> None:
    """Refuse where other losses need more than what the folder holds.

    Args:
        run: a finished probe, of the same options but for `JUDGING`.
        prepared: what is asked for now.

    Raises:
        RunError: real steps were taken under its losses, or the set's sums weren't kept.
        ConfigError: a named loss can't be judged on its rows.
    """
    advice = "Choose another --output_dir, or give --overwrite to measure all of it again."
    if prepared.options.verify:
        raise RunError(
            f"{run.path} holds these pairs under other losses, checked by real steps (verify "
            f"{prepared.options.verify}), which would have to be taken under the losses asked for too. {advice} To see "
            f"other losses without real steps: entangle whatif {run.path}"
        )
    if "set" in run.read_json("summary.json") and "sums" not in (_set_of(run) or {}):
        raise RunError(
            f"{run.path} lacks the sums of its set (in set.json), so the set can't be judged under other losses. "
            f"{advice}"
        )
    judgeable(prepared.losses, prepared.are_named, has_reference=may_have_reference(run.pairs()))


def rejudge(session: Session, prepared: Prepared) -> None:
    """Judge other losses on the stored scores, and rewrite what depends on them: predictions, set, summary, options.

    The options are written last: broken off before, the same command judges once more.

    Args:
        session: the probe at work on a finished folder that `check_rejudging` lets pass.
        prepared: what is asked for now.

    Raises:
        RunError: a file of the folder is damaged, or can't be written.
    """
    run, options = session.run, prepared.options
    rows, before = run.pairs(), run.read_json("summary.json")
    usable, left_out = judgeable(prepared.losses, prepared.are_named, has_reference=may_have_reference(rows))
    resolution = float(run.read_json("provenance.json")["resolution"])
    predictions = predict_losses(rows, usable, resolution=resolution, batch_size=options.loss_batch_size)
    summary = summarise(rows, predictions, options.group_by)
    summary |= {name: before[name] for name in FREE_OF_LOSSES if name in before}
    whole = _set_of(run)
    if whole is not None:
        whole = content_under(whole, predictions)
        summary["set"] = {name: value for name, value in whole.items() if name not in SET_DETAILS}
        run.write_json("set.json", whole)
    if options.diagnostics:
        summary["diagnostics"] = summarise_diagnostics(rows, predictions, columns_of(options.diagnostics))
    run.write_table("predictions.parquet", predictions)
    run.write_json("summary.json", summary)
    run.record(options)
    for sentence in left_out:
        session.note(sentence)
    session.console.print(
        f"{run.path}: its stored scores are judged under {', '.join(loss.label for loss in usable)} now; nothing was "
        f"measured again.{_of_before(run)}",
        markup=False,
    )


def _set_of(run: RunFolder) -> Mapping[str, Any] | None:
    return run.read_json("set.json") if (run.path / "set.json").is_file() else None


def _of_before(run: RunFolder) -> str:
    """What else in the folder is still about the losses that were judged before."""
    there = [name for name in FURTHER if (run.path / name).exists()]
    return f" Still about the losses before: {', '.join(there)}." if there else ""
