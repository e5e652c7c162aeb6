"""Tiny tokenizers, models and adapters, built from nothing in a few milliseconds; none is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, START, PAD = "<|end|>", "<|start|>", "<|pad|>"

CORPUS = (
    "the cat sat on the mat and then the other cat sat there too",
    "she said that they think the weather is better than they thought",
    "Question: what is the sum of two and two? Answer: the sum is four.",
    "TL;DR: the author thinks that the thing is better than nothing.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ROWS = (
    {"prompt": "what is the sum?", "chosen": " the sum is four", "rejected": " the sum is five, they said"},
    {"prompt": "TL;DR:", "chosen": " cats are better", "rejected": " dogs"},
    {"prompt": "she said that", "chosen": " they think", "rejected": " they think the other thing, then"},
)
"""Three plain pairs of unlike lengths."""


@cache
def _trained(metaspace: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def gpt2_tokenizer(
    *, adds_end: bool = False, pad: bool = False, chat: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level, without a beginning and without padding, as GPT-2's. `adds_end`: appends END by itself."""
    core = Tokenizer.from_str(_trained(metaspace=False))
    if adds_end:
        core.post_processor = _template(f"$A {END}", END)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD if pad else None)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading mark, a beginning-of-sequence token before every text, padding: as Llama's."""
    core = Tokenizer.from_str(_trained(metaspace=True))
    core.post_processor = _template(f"{START} $A", START)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=START, eos_token=END, pad_token=PAD)


def _template(single: str, token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, [PAD, START, END].index(token))]
    )


def llama(*, hidden: int = 16, layers: int = 2, vocabulary: int = 352, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in eval mode, with weights large enough for tokens to differ in probability."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        attention_dropout=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_policy(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **shape: int) -> str:
    """A Llama with its tokenizer on disk; `shape` as for `llama`."""
    llama(**shape).save_pretrained(folder)
    (tokenizer or gpt2_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str, *, seed: int = 1, zero: bool = False, **shape: int) -> str:
    """A trained LoRA on disk, for a base of the given shape (see `llama`): B is random, or 0 if `zero`."""
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.5,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(llama(**shape), config)
    assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not (zero and "lora_B" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)
