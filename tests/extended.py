"""The package with one toy of every kind added to it, each in one place, in a copy that shares its files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ADDED = {
    "entangle/diagnostics/zebra.py": """
from entangle.diagnostics.base import diagnostic


@diagnostic("stripes", description="Stripes of both responses.", formula="n_w + n_l", cost="tokens")
def stripes(reading):
    return {"stripes": sum(reading.lengths)}
""",
    "entangle/data/formats/zebra.py": """
from entangle.data.formats.base import Format, register, rest


@register
class Zebra(Format):
    name = "zebra"
    columns = ("black", "white")
    reads = "`black` is chosen, `white` is rejected"

    def matches(self, sample):
        return {"black", "white"} <= set(sample)

    def convert(self, row, where):
        return rest(row, "black", "white") | {"chosen": row["black"], "rejected": row["white"]}
""",
    "losses/margin.py": '''

@register
class Zebra(PreferenceLoss):
    """Zebra: -ln s(beta (w - l) / 2)."""

    name: ClassVar = "zebra"
    ratio: ClassVar = "1"
    needs_reference: ClassVar = False
    beta: float = 0.1

    def per_pair(self, logps):
        return -torch.nn.functional.logsigmoid(self.beta * logps.policy_margin / 2)
''',
    "entangle/rewards/functions.py": """

@dataclass(frozen=True)
class Zebra(RewardFunction):
    name: ClassVar[str] = "zebra"

    def __call__(self, answers):
        return np.array([float(len(text)) for text in answers.completions])
""",
    "entangle/analysis/mitigations.py": '''

@dataclass(frozen=True)
class Zebra(Rescaling):
    """Half of every incentive."""

    name: ClassVar = "zebra"
    source: ClassVar = "a toy"

    def factors(self, incentives, norm_chosen, norm_rejected, state, total=identity):
        return torch.full_like(norm_chosen, 0.5), torch.full_like(norm_rejected, 0.5)
''',
    "entangle/scores/rules.py": """

@register_rule("Scale")
def scale(module, call):
    slope = 1 - module.scale.tanh() ** 2
    return {"scale": vector((call.g * call.by_row(module.inner(call.input)) * slope).sum(1))}
""",
    "entangle/commands/zebra.py": '''
from dataclasses import dataclass

from entangle.commands.output import Output
from entangle.config import Options


@dataclass(frozen=True)
class ZebraConfig(Options):
    """A toy."""

    size: int = 1
    """How large it is."""


def command(config, console):
    return Output(f"zebra of {config.size}", "Kept: nowhere", status=config.size)
''',
}
"""By file: what is added to it, or all of it where there is none."""

LINE = 'Command("zebra", "entangle.commands.zebra:ZebraConfig", "entangle.commands.zebra:command", "Toys", "A toy."),'
"""The command's line in COMMANDS."""


def extended(folder: Path) -> Path:
    """Both packages in `folder`, by links, with the toys."""
    for package in ("entangle", "losses"):
        shutil.copytree(
            ROOT / package,
            folder / package,
            copy_function=os.symlink,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name, text in ADDED.items():
        _replace(folder / name, (ROOT / name).read_text() + text if (ROOT / name).is_file() else text)
    table = (ROOT / "entangle/cli.py").read_text()
    first = "    for command in (\n"
    assert table.count(first) == 1
    _replace(folder / "entangle/cli.py", table.replace(first, f"{first}        {LINE}\n"))
    return folder


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def said(*arguments: str) -> tuple[int, str]:
    """Exit status and standard output of a command, run in this process."""
    from entangle.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = main(arguments)
        except SystemExit as left:
            status = int(left.code or 0)
    return status, " ".join(out.getvalue().split())


def main(base: str) -> dict[str, object]:
    """What the extended package shows of its toys; the working folder is where it writes."""
    rows = [
        {"prompt": "the cat", "black": " sat" * (i % 3 + 1) + f" {i}", "white": " thought of it", "kind": "a"}
        for i in range(8)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"model_name_or_path: {base}\ndataset_name: rows.jsonl\nreference: self\n"
    Path("probe.yaml").write_text(common + "losses: [{name: zebra, beta: 0.2}]\ndiagnostics: [stripes]\n")
    Path("rft.yaml").write_text(common + "reward: zebra\nnum_generations: 2\nmax_completion_length: 3\n")
    Path("train.yaml").write_text(
        f"model_name_or_path: {base}\ndataset_name: rows.jsonl\nloss: zebra\nmitigations: [zebra]\nmax_steps: 1\n"
        "per_device_train_batch_size: 2\nlora_r: 2\nsave_steps: 0\nmax_length: 32\n"
    )
    Path("zebra.yaml").write_text("size: 0\n")
    found: dict[str, object] = {
        "help": said("--help"),
        **{f"{verb} --help": said(verb, "--help") for verb in ("probe", "rft", "train", "zebra")},
        "zebra": said("zebra", "--size", "3"),
        "zebra.yaml": said("zebra", "zebra.yaml"),
        "losses": said("losses"),
        "losses zebra": said("losses", "zebra"),
        "probe": said("probe", "probe.yaml", "--output_dir", "probed"),
        "report": said("report", "probed", "--output", "page.html"),
        "rft": said("rft", "rft.yaml", "--output_dir", "rewarded"),
        "train": said("train", "train.yaml", "--output_dir", "trained"),
    }
    sys.path.append(str(ROOT / "docs"))
    import hooks  # pyright: ignore[reportMissingImports]

    from tests.losses.cases import LOSSES
    from tests.scores import test_engines

    found["hooks"] = hooks.on_page_markdown(
        "\n".join(
            f"{{{{ {what} }}}}" for what in ("formats", "losses", "mitigations", "commands", "options probe")
        )
    )
    found["tests"] = [loss.label for loss in LOSSES if loss.name == "zebra"]
    model = test_engines.tiny_model("llama")
    model.model.layers[0].mlp = test_engines.Scale(model.model.layers[0].mlp, 16)
    engine = test_engines.make_engine(model, test_engines.trainable(model), engine="factored")
    found["covered"] = sorted(name for name in engine.covered if name.endswith("scale"))  # pyright: ignore[reportAttributeAccessIssue]
    return found


if __name__ == "__main__":
    Path("found.json").write_text(json.dumps(main(sys.argv[1])))
