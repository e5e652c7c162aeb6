"""Reward functions: what gives a sampled answer its reward.

A reward function is a frozen dataclass, its fields the options: `RougeL(reference="chosen")`, in YAML
`{name: rouge_l, reference: chosen}`, on the command line `rouge_l:reference=chosen`. A function of the user's
is named `module:function` and is called as TRL calls a reward function; a class of the user's, derived from
`RewardFunction`, goes by `module:Class`.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from entangle.analysis.statistics import Array
from entangle.config.specs import construct, import_own, spec_text, to_spec
from entangle.data.pairs import Text
from entangle.errors import ConfigError, UserError
from entangle.rewards.statistics import Support

REWARD_FUNCTIONS: dict[str, type[RewardFunction]] = {}
"""Every reward function by name."""


class RewardError(UserError):
    """A reward can't be had: the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class AnswerSet:
    """The answers to one prompt, as reward functions see them.

    Args:
        prompt: a string or a list of messages.
        completions: K texts, without special tokens.
        columns: further columns of the prompt's row in the data set.
        logps: `(K,)` log pi of the answers, nats.
        ref_logps: `(K,)` the same under the reference; None without one.
        rewards: `(K,)` rewards that came with the answers; None unless they were read from a file.
        parts: `(K,)` by column, rewards of single functions that came with them.
    """

    prompt: Text
    completions: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    logps: Array | None = None
    ref_logps: Array | None = None
    rewards: Array | None = None
    parts: Mapping[str, Array] = field(default_factory=dict)


class RewardFunction(ABC):
    """Gives every answer a reward. A subclass with a `name` is known by it from its declaration on.

    A class attribute `name` is its name in options; `support` is what is known of its rewards.
    """

    name: ClassVar[str]
    support: ClassVar[Support] = Support()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            REWARD_FUNCTIONS[cls.name] = cls

    @abstractmethod
    def __call__(self, answers: AnswerSet) -> Array:
        """Rewards `(K,)` float64, NaN where one can't be given."""


@dataclass(frozen=True)
class RougeL(RewardFunction):
    """ROUGE-L F1 against a reference text, in [0, 1]; by the library rouge-score.

    Args:
        reference: the column that holds the reference.
        stem: reduce words to their stems first.
    """

    reference: str = "chosen"
    stem: bool = True
    name: ClassVar[str] = "rouge_l"
    support: ClassVar[Support] = Support(0.0, 1.0)

    @cached_property
    def _scorer(self) -> Any:
        return _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=self.stem)

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        reference = _reference(answers, self.reference, self.name)
        return np.array(
            [self._scorer.score(reference, text)["rougeL"].fmeasure for text in answers.completions]
        )


@dataclass(frozen=True)
class ChrF(RewardFunction):
    """The character F-score chrF against a reference text, divided by 100 to lie in [0, 1]; by the library sacrebleu.

    Args:
        reference: the column that holds the reference.
    """

    reference: str = "chosen"
    name: ClassVar[str] = "chrf"
    support: ClassVar[Support] = Support(0.0, 1.0)

    @cached_property
    def _scorer(self) -> Any:
        return _library("sacrebleu.metrics").CHRF()

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        reference = _reference(answers, self.reference, self.name)
        return np.array(
            [self._scorer.sentence_score(text, [reference]).score / 100 for text in answers.completions]
        )


@dataclass(frozen=True)
class Length(RewardFunction):
    """1 for an answer of `least` to `most` words, else 0."""

    least: int = 1
    most: int = 40
    name: ClassVar[str] = "length"
    support: ClassVar[Support] = Support(0.0, 1.0, is_binary=True)

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise RewardError(f"length needs 0 <= least <= most; got least={self.least}, most={self.most}.")

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        return np.array([float(self.least <= len(text.split()) <= self.most) for text in answers.completions])


@dataclass(frozen=True)
class Format(RewardFunction):
    """1 for an answer in which the regular expression `pattern` is found (`^`, `$`: its ends), else 0."""

    pattern: str = r"[.!?]\s*$"
    name: ClassVar[str] = "format"
    support: ClassVar[Support] = Support(0.0, 1.0, is_binary=True)

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RewardError(f"format: {self.pattern!r} isn't a regular expression: {error}.") from None

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        return np.array([float(re.search(self.pattern, text) is not None) for text in answers.completions])


@dataclass(frozen=True)
class RewardModel(RewardFunction):
    """The single output of a sequence-classification model on prompt + answer.

    Args:
        model: hub id or folder, with its tokenizer; safetensors weights.
        batch_size: answers per pass.
        max_length: longer inputs are cut at the left, so that the answer stays.
    """

    model: str = ""
    batch_size: int = 16
    max_length: int = 1024
    name: ClassVar[str] = "reward_model"

    def __post_init__(self) -> None:
        if not self.model:
            raise RewardError("reward_model needs a model, as reward_model:model=NAME_OR_FOLDER; got none.")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, truncation_side="left")
            model: Any = AutoModelForSequenceClassification.from_pretrained(self.model, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RewardError(
                f"Can't load the reward model {self.model!r}: {' '.join(str(error).split())[:300]}"
            ) from error
        if model.config.num_labels != 1:
            raise RewardError(
                f"Expected a reward model with one output; {self.model!r} has {model.config.num_labels}. A "
                "classifier can be used through a function of your own (reward module:function)."
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        tokenizer, model = self._loaded
        texts = [_joined(answers.prompt, text, tokenizer) for text in answers.completions]
        size = self.batch_size if tokenizer.pad_token_id is not None else 1
        rewards: list[float] = []
        for start in range(0, len(texts), size):
            batch = tokenizer(
                texts[start : start + size],
                return_tensors="pt",
                padding=size > 1,
                truncation=True,
                max_length=self.max_length,
            ).to(model.device)
            rewards += model(**batch).logits[:, 0].double().tolist()
        return np.array(rewards)


@dataclass(frozen=True)
class Implicit(RewardFunction):
    """DPO's implicit reward of the policy itself, beta (log pi - log pi_ref), up to a constant of the prompt.

    Its gradient is beta times that of KL(pi || pi_ref). Paper: arXiv 2305.18290, section 4.
    """

    beta: float = 0.1
    name: ClassVar[str] = "implicit"

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        if answers.logps is None or answers.ref_logps is None:
            raise RewardError(
                "The implicit reward needs a reference policy; this run has none (see --reference)."
            )
        return self.beta * (answers.logps - answers.ref_logps)


@dataclass(frozen=True)
class FromFile(RewardFunction):
    """The rewards that stand in the rollouts file.

    Args:
        column: the column that holds them, or several joined by `+`, which are added; by default rewards or reward.
    """

    column: str = ""
    name: ClassVar[str] = "file"

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        if self.column in answers.parts:
            return answers.parts[self.column]
        if answers.rewards is None:
            raise RewardError(
                "Expected rewards beside the answers (a column 'rewards', or 'reward' with a row per answer); "
                "there are none. Add them, or name a reward, for instance --reward rouge_l."
            )
        return answers.rewards


@dataclass(frozen=True)
class Function(RewardFunction):
    """A function of the user's, called as TRL calls one: f(prompts, completions, **columns) -> rewards.

    Every argument is a list with an entry per answer; conversational prompts get conversational completions.
    None in its result is a reward that can't be given.

    Args:
        function: `module:function`; the module is looked for in the working folder too.
    """

    function: str = ""
    name: ClassVar[str] = "function"

    @cached_property
    def _loaded(self) -> Any:
        try:
            return import_own(self.function, "reward function")
        except ConfigError as error:
            raise RewardError(str(error)) from error

    def __call__(self, answers: AnswerSet) -> Array:
        """See `RewardFunction`."""
        texts: list[Any] = list(answers.completions)
        if not isinstance(answers.prompt, str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [value] * len(texts) for name, value in answers.columns.items()}
        rewards = self._loaded(prompts=[answers.prompt] * len(texts), completions=texts, **columns)
        try:
            found = np.array([np.nan if r is None else float(r) for r in rewards])
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self.function} should return a list of numbers; got {rewards!r}.") from error
        if len(found) != len(texts):
            raise RewardError(
                f"{self.function} should return {len(texts)} rewards, one per answer; got {len(found)}."
            )
        return found


def build_reward_function(spec: str | Mapping[str, Any]) -> RewardFunction:
    """A reward function from its name, its options (`name:key=value,...` or a mapping) or code of the user's own.

    Args:
        spec: what names it; of `module:Name` a class derived from `RewardFunction` is built, anything else is called.

    Raises:
        RewardError: the name or an option isn't known.

    Examples:
        >>> build_reward_function("length:most=20")
        Length(least=1, most=20)
    """
    try:
        name = to_spec(spec, "reward")
        if isinstance(name, str) and ":" in name and not _is_class(name):
            return Function(name)
        return construct(name, REWARD_FUNCTIONS, RewardFunction, "reward")
    except ConfigError as error:
        raise RewardError(str(error)) from None


def reward_label(function: RewardFunction) -> str:
    """What a reward function is called in tables: a file's by its columns, others as they are typed."""
    if isinstance(function, FromFile):
        return function.column or "the file's"
    given = {f.name: getattr(function, f.name) for f in fields(function)}  # pyright: ignore[reportArgumentType]
    own = {f.name: f.default for f in fields(function)}  # pyright: ignore[reportArgumentType]
    if isinstance(function, Function):
        return function.function
    return spec_text({"name": function.name} | {k: v for k, v in given.items() if v != own[k]})


def _is_class(name: str) -> bool:
    """Whether `module:Name` is a class of reward functions, or is to be refused as one, as `length:most` is."""
    if name.partition(":")[0] in REWARD_FUNCTIONS:
        return True
    found = import_own(name, "reward function")
    return isinstance(found, type) and issubclass(found, RewardFunction)


def _reference(answers: AnswerSet, column: str, name: str) -> str:
    value = answers.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):  # a conversation: its last turn
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise RewardError(
            f"The reward {name} needs a reference text in the column {column!r}; the prompt's columns are: "
            f"{', '.join(answers.columns) or 'none'}. Name it as {name}:reference=COLUMN."
        )
    return value


def _joined(prompt: Text, completion: str, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt + completion
    return tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": completion}], tokenize=False
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"rouge_score": "rouge-score"}.get(name.partition(".")[0], name.partition(".")[0])
        raise RewardError(f"This reward needs the package {package}: pip install {package}.") from error
