"""Trains the embedded policy and its LoRA adapter from real TL;DR data, reproducibly from one seed.

The stages, each on one CPU thread:

0. a byte-level BPE tokenizer from the training posts and the training summaries;
1. language modelling on the posts (and on the training summaries behind their posts);
2. supervised fine-tuning on the authors' summaries;
3. a few DPO steps of a LoRA adapter, so that both of its factors carry a gradient.

`python experiments/embedded/train.py` writes `entangle/embedded/policy` and `entangle/embedded/adapter`.
The data folder is not part of the project: without it the script ends with a message.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from card import draw_curve, write_card
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
END_OF_TEXT_ID, PADDING_ID = 0, 1
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER_BASE = "entangle/embedded/policy"

Row = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """Optimisation settings of one training stage.

    `tokens_per_batch` bounds a batch's padded size, `prompt_weight` is the loss weight of a prompt token
    (a completion token weighs 1) and `evaluations_per_epoch` says how often the held-out loss is measured.
    """

    epochs: int
    learning_rate: float
    warm_up_steps: int
    tokens_per_batch: int = 2816
    weight_decay: float = 0.1
    prompt_weight: float = 1.0
    evaluations_per_epoch: int = 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the data and the versions of the libraries."""

    seed: int = 20170911
    threads: int = 1
    posts: int = 3000
    posts_held_out: int = 150
    summaries: int = 430
    summaries_held_out: int = 60
    vocabulary: int = 4096
    width: int = 160
    layers: int = 4
    heads: int = 5
    feed_forward: int = 432
    positions: int = 1024
    language: Stage = Stage(epochs=4, learning_rate=3e-3, warm_up_steps=100, evaluations_per_epoch=2)
    summarise: Stage = Stage(
        epochs=2, learning_rate=2e-4, warm_up_steps=20, prompt_weight=0.05, evaluations_per_epoch=2
    )
    untouched_pairs: int = 100
    adapter_pairs: int = 200
    adapter_rank: int = 8
    adapter_alpha: int = 16
    adapter_steps: int = 25
    adapter_batch: int = 8
    adapter_learning_rate: float = 5e-4
    adapter_beta: float = 0.1


def quick_settings() -> Settings:
    """The settings of `--quick`: the same path with a handful of steps on a handful of rows."""
    full = Settings()
    return replace(
        full,
        posts=40,
        posts_held_out=8,
        summaries=20,
        summaries_held_out=6,
        vocabulary=1024,
        language=replace(full.language, epochs=1, warm_up_steps=2, evaluations_per_epoch=1),
        summarise=replace(full.summarise, epochs=1, warm_up_steps=1),
        untouched_pairs=4,
        adapter_pairs=8,
        adapter_steps=2,
        adapter_batch=4,
    )


@dataclass(frozen=True)
class Data:
    """The rows of each part; `train` and `held` parts are disjoint, the pairs are used by neither stage."""

    posts_train: list[Row]
    posts_held: list[Row]
    summaries_train: list[Row]
    summaries_held: list[Row]
    pairs_untouched: list[Row]
    pairs_adapter: list[Row]


@dataclass(frozen=True)
class Document:
    """Token ids of one document and the loss weight of each token (of the first one it is unused)."""

    ids: list[int]
    weights: list[float]


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and `held_out` held-out rows, drawn by `seed`."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held, train = order[:held_out], order[held_out:]
    return [rows[index] for index in sorted(train)], [rows[index] for index in sorted(held)]


def read_data(folder: Path, settings: Settings) -> Data:
    """Reads the TL;DR files of `folder` and splits them by the seed.

    Of the preference pairs the adapter trains on the last `adapter_pairs`; the first `untouched_pairs` only
    measure the finished policy.
    """
    posts = read_rows(folder / "tldr_posts.jsonl", settings.posts)
    summaries = read_rows(folder / "tldr_sft.jsonl", settings.summaries)
    pairs = read_rows(folder / "tldr_pairs.jsonl")
    posts_train, posts_held = split(posts, settings.posts_held_out, settings.seed)
    summaries_train, summaries_held = split(summaries, settings.summaries_held_out, settings.seed)
    return Data(
        posts_train,
        posts_held,
        summaries_train,
        summaries_held,
        pairs[: settings.untouched_pairs],
        pairs[-settings.adapter_pairs :],
    )


def train_tokenizer(data: Data, settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training text: no normaliser, so every text comes back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] for row in data.posts_train]
    texts += [row["prompt"] + row["completion"] for row in data.summaries_train]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def new_policy(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama with tied embeddings."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def post_document(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> Document:
    """A post up to its `TL;DR:`; no end of text follows, because a summary would."""
    ids = tokenizer.encode(row["prompt"])[-limit:]
    return Document(ids, [1.0] * len(ids))


def summary_document(
    row: Row, tokenizer: PreTrainedTokenizerBase, limit: int, prompt_weight: float
) -> Document:
    """A post, its author's summary and the end of text; the prompt is cut from the left to fit `limit`."""
    completion = [*tokenizer.encode(row["completion"]), END_OF_TEXT_ID]
    prompt = tokenizer.encode(row["prompt"])[-(limit - len(completion)) :]
    return Document(prompt + completion, [prompt_weight] * len(prompt) + [1.0] * len(completion))


def padded_length(document: Document, positions: int) -> int:
    """The document's length rounded up to a multiple of 64: few shapes keep the CPU kernels' cache small."""
    return min(positions, -(-len(document.ids) // 64) * 64)


def batches(
    documents: Sequence[Document], tokens: int, positions: int, order: random.Random
) -> list[list[Document]]:
    """One epoch of batches in random order, each of documents of one padded length.

    A batch's padded size, its number of documents times the padded length, is at most `tokens`, or that of
    one document.
    """
    buckets: dict[int, list[Document]] = {}
    for document in order.sample(list(documents), len(documents)):
        buckets.setdefault(padded_length(document, positions), []).append(document)
    groups = []
    for length, bucket in buckets.items():
        size = max(1, tokens // length)
        groups += [bucket[start : start + size] for start in range(0, len(bucket), size)]
    order.shuffle(groups)
    return groups


def collate(batch: Sequence[Document], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (documents, padded length) padded on the right, and weights of that shape, zero on the padding."""
    length = padded_length(batch[0], positions)
    ids = torch.full((len(batch), length), PADDING_ID)
    weights = torch.zeros(len(batch), length)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    return ids, weights


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropies in nats, (documents, length - 1), of every token after the first, padding included.

    Padding stands on the right and attention is causal, so no attention mask is needed.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden.flatten(0, 1))
    losses = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return losses.float().view(len(ids), -1)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: Sequence[Document]) -> float:
    """Mean cross entropy in nats per token, weighted as the documents say, in float32."""
    total = weight = 0.0
    for batch in batches(documents, 2816, model.config.max_position_embeddings, random.Random(0)):
        ids, weights = collate(batch, model.config.max_position_embeddings)
        total += (token_losses(model, ids) * weights[:, 1:]).double().sum().item()
        weight += weights[:, 1:].double().sum().item()
    return total / weight


def optimiser_for(model: LlamaForCausalLM, stage: Stage) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": stage.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.05."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def training_step(model: LlamaForCausalLM, optimiser: torch.optim.AdamW, batch: Sequence[Document]) -> float:
    """One AdamW step under bfloat16 autocast with the gradient's norm clipped at 1; the loss in nats."""
    ids, weights = collate(batch, model.config.max_position_embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_losses(model, ids)
    loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def epochs_of(
    documents: Sequence[Document], stage: Stage, positions: int, seed: int
) -> Iterator[tuple[float, list[Document]]]:
    """Every batch of the stage with the number of epochs done once it has been trained on."""
    order = random.Random(seed)
    for epoch in range(stage.epochs):
        groups = batches(documents, stage.tokens_per_batch, positions, order)
        for position, batch in enumerate(groups, start=1):
            yield epoch + position / len(groups), batch


def copied_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the model's weights by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_stage(
    model: LlamaForCausalLM,
    documents: Sequence[Document],
    stage: Stage,
    seed: int,
    measure: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Trains `model` in place, leaves it at its best `held_out` measure, its start included; the loss curve.

    `measure` returns held-out losses in nats per token, the one to choose by under the key `held_out`.
    """
    plan = list(epochs_of(documents, stage, model.config.max_position_embeddings, seed))
    optimiser = optimiser_for(model, stage)
    factor = partial(learning_rate_factor, steps=len(plan), warm_up=stage.warm_up_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    evaluations = stage.epochs * stage.evaluations_per_epoch
    due = {round(len(plan) * index / evaluations) for index in range(1, evaluations + 1)}
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    best, best_state = measure()["held_out"], copied_weights(model)
    for step, (epochs_done, batch) in enumerate(plan, start=1):
        recent.append(training_step(model, optimiser, batch))
        schedule.step()
        if step not in due:
            continue
        point = {
            "step": step,
            "epoch": round(epochs_done, 2),
            "train": sum(recent) / len(recent),
            **measure(),
        }
        curve.append(point)
        recent.clear()
        print(json.dumps(point), flush=True)
        if point["held_out"] < best:
            best, best_state = point["held_out"], copied_weights(model)
    model.load_state_dict(best_state)
    return curve


def split_ids(
    row: Row, key: str, tokenizer: PreTrainedTokenizerBase, prompt_limit: int
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, cut from the left, and of the text `row[key]` behind it, with no special token."""
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
    whole = tokenizer.encode(row["prompt"] + row[key], add_special_tokens=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError("a token crosses the boundary between prompt and completion")
    return prompt[-prompt_limit:], whole[len(prompt) :]


@torch.no_grad()
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    key: str,
    prompt_limit: int,
) -> dict[str, float]:
    """Cross entropy of the texts `row[key]` given their prompts, per token and per UTF-8 byte, in nats.

    Only the text is scored, neither the prompt nor an end of text; `standard_error` is that of nats per byte,
    over rows. A beginning-of-text token is put before the prompt where the tokenizer has one.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    nats, tokens, sizes = [], 0, []
    for row in rows:
        prompt, text = split_ids(row, key, tokenizer, prompt_limit)
        ids = torch.tensor([start + prompt + text])
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(text) - 1 : -1]
        nats.append(functional.cross_entropy(logits, ids[0, -len(text) :], reduction="sum").item())
        tokens += len(text)
        sizes.append(len(row[key].encode("utf-8")))
    per_byte = sum(nats) / sum(sizes)
    squares = sum((cost - per_byte * size) ** 2 for cost, size in zip(nats, sizes, strict=True))
    return {
        "rows": len(rows),
        "tokens": tokens,
        "bytes": sum(sizes),
        "nats_per_token": sum(nats) / tokens,
        "nats_per_byte": per_byte,
        "standard_error": math.sqrt(squares) / sum(sizes),
    }


def compare(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, data: Data, other: Path, settings: Settings
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the policy and, where the folder `other` is there, of the model in it, on the same texts."""
    policy.eval()
    scorers: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase, int]] = {
        "embedded policy": (policy, tokenizer, settings.positions - 256)
    }
    if other.is_dir():
        model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
        scorers[other.name] = (model, AutoTokenizer.from_pretrained(other), 350)
    texts = {
        "held-out summaries": (data.summaries_held, "completion"),
        "chosen texts of untouched pairs": (data.pairs_untouched, "chosen"),
    }
    return {
        name: {scorer: score_texts(*parts[:2], rows, key, parts[2]) for scorer, parts in scorers.items()}
        for name, (rows, key) in texts.items()
    }


def train_policy(
    tokenizer: PreTrainedTokenizerBase, data: Data, settings: Settings
) -> tuple[LlamaForCausalLM, dict[str, list[dict[str, float]]], dict[str, float]]:
    """The trained policy, the loss curve of either stage and the seconds that each took."""
    limit = settings.positions
    held_posts = [post_document(row, tokenizer, limit) for row in data.posts_held]
    held_summaries = [summary_document(row, tokenizer, limit, 0.0) for row in data.summaries_held]
    model = new_policy(tokenizer, settings)

    def measure_language() -> dict[str, float]:
        losses = held_out_loss(model, held_posts), held_out_loss(model, held_summaries)
        return {"held_out": losses[0], "held_out_summaries": losses[1]}

    def measure_summaries() -> dict[str, float]:
        return {"held_out": held_out_loss(model, held_summaries)}

    started = time.monotonic()
    documents = [post_document(row, tokenizer, limit) for row in data.posts_train]
    documents += [summary_document(row, tokenizer, limit, 1.0) for row in data.summaries_train]
    language = train_stage(model, documents, settings.language, settings.seed, measure_language)
    between = time.monotonic()
    weight = settings.summarise.prompt_weight
    documents = [summary_document(row, tokenizer, limit, weight) for row in data.summaries_train]
    summarise = train_stage(model, documents, settings.summarise, settings.seed + 1, measure_summaries)
    seconds = {"language": between - started, "summarise": time.monotonic() - between}
    return model, {"language": language, "summarise": summarise}, seconds


def dpo_arguments(folder: Path, settings: Settings) -> DPOConfig:
    """TRL's settings for the adapter: float32 on the CPU, nothing saved or reported on the way."""
    return DPOConfig(
        output_dir=str(folder),
        max_steps=settings.adapter_steps,
        per_device_train_batch_size=settings.adapter_batch,
        learning_rate=settings.adapter_learning_rate,
        beta=settings.adapter_beta,
        max_length=settings.positions,
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def train_adapter(policy: Path, data: Data, settings: Settings, folder: Path) -> list[dict[str, float]]:
    """Trains the LoRA adapter of the policy in `policy` with TRL's DPO, saves it and returns TRL's log."""
    set_seed(settings.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.adapter_rank,
        lora_alpha=settings.adapter_alpha,
        lora_dropout=0.0,
        target_modules=LINEAR_LAYERS,
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            args=dpo_arguments(Path(scratch), settings),
            train_dataset=Dataset.from_list(data.pairs_adapter),
            processing_class=AutoTokenizer.from_pretrained(policy),
            peft_config=lora,
        )
        trainer.train()
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the adapter's weights and a configuration that names the embedded policy, not a local path."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = ADAPTER_BASE
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(data: Data, settings: Settings, output: Path, other: Path) -> dict[str, Any]:
    """Runs every stage, writes `policy` and `adapter` under `output` and returns the training record."""
    torch.set_num_threads(settings.threads)
    policy_folder = output / "policy"
    tokenizer = train_tokenizer(data, settings)
    model, curves, seconds = train_policy(tokenizer, data, settings)
    shutil.rmtree(policy_folder, ignore_errors=True)
    model.save_pretrained(str(policy_folder))
    save_tokenizer(tokenizer, policy_folder)
    started = time.monotonic()
    adapter_log = train_adapter(policy_folder, data, settings, output / "adapter")
    seconds["adapter"] = time.monotonic() - started
    record = {
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "curves": curves,
        "scores": compare(model, tokenizer, data, other, settings),
        "adapter_log": adapter_log,
    }
    (policy_folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw_curve(curves, policy_folder / "loss.svg")
    write_card(record, policy_folder / "README.md")
    return record


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    shared = REPOSITORY.parent / "shared"
    parser = argparse.ArgumentParser(description="Trains the embedded policy and its adapter.")
    parser.add_argument("--data", type=Path, default=shared / "data" / "tldr", help="folder of TL;DR files")
    parser.add_argument(
        "--compare", type=Path, default=shared / "models" / "stories260k", help="a model to compare with"
    )
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "entangle" / "embedded")
    parser.add_argument("--quick", action="store_true", help="a handful of steps, to try the script")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains everything; exit status 2 where the data folder is absent."""
    options = parse_arguments(arguments)
    if not (options.data / "tldr_posts.jsonl").is_file():
        print(f"no TL;DR data at {options.data}: name its folder with --data", file=sys.stderr)
        return 2
    settings = quick_settings() if options.quick else Settings()
    record = train(read_data(options.data, settings), settings, options.output_dir, options.compare)
    print(json.dumps({"scores": record["scores"], "seconds": record["seconds"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
