"""What the benchmarks run: models of random weights, pairs of random tokens, and ways of computing their scores.

A method is prepared for a model, its probed parameters and the batches, and then called as often as it is timed.
All methods of a case return the same numbers, except those that stop short of any: the plain pass and full logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import peft
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from entangle.analysis.geometry import PairGeometry
from entangle.scores import FactoredEngine, fast_gemm, score_gram
from entangle.scores.base import studying
from entangle.scores.logps import Rows, evaluating, gather_positions, model_inputs, scored_logps, target_logps
from entangle.scores.rows import RowBatch
from entangle.scores.sums import GroupSums
from entangle.scores.tokens import token_products

Parameters = Mapping[str, nn.Parameter]
Run = Callable[[], Tensor | None]
"""One timed run over all batches: A, B and c of every pair `(n, 3)`, or products of tokens `(1, m)`."""
Method = Callable[[nn.Module, Parameters, Sequence[RowBatch]], Run]


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, what of it is probed, and the pairs that it is asked about.

    Args:
        layers: layers.
        width: hidden size.
        inner: width of the feed-forward layers.
        heads: attention heads.
        vocabulary: tokens.
        lora: rank of a LoRA with random factors, whose parameters are probed; None: all of the model's own.
        targets: layers that it is put on.
        prompt: fewest and most tokens of a prompt.
        response: fewest and most tokens of a response.
        pairs: pairs.
        per_batch: pairs per pass.
        kv_heads: heads of keys and values; None: as many as `heads`.
    """

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    lora: int | None = 16
    targets: str | tuple[str, ...] = "all-linear"
    prompt: tuple[int, int] = (200, 400)
    response: tuple[int, int] = (20, 50)
    pairs: int = 2
    per_batch: int = 2
    kv_heads: int | None = None

    @property
    def tiny(self) -> Shape:
        """The same kind of thing, small enough for a test."""
        return replace(
            self,
            layers=2,
            width=16,
            inner=24,
            heads=2,
            vocabulary=48,
            lora=self.lora and 2,
            prompt=(8, 12),
            response=(3, 5),
            pairs=min(self.pairs, 4),
            per_batch=min(self.per_batch, 2),
            kv_heads=None,
        )


def build(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model on its device, made there, and its probed parameters by name."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=dtype)
        if shape.lora is not None:
            targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
            options = peft.LoraConfig(r=shape.lora, lora_alpha=2 * shape.lora, target_modules=targets)
            model = peft.get_peft_model(model, options, autocast_adapter_dtype=False)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def batches_of(shape: Shape, device: str = "cpu") -> list[RowBatch]:
    """Pairs of random tokens, `per_batch` at a time, as of a long data set that is sorted by length.

    Prompts of one batch are about equally long, within 4 %; the batches spread over the range, and so do responses.
    """
    draw = torch.Generator().manual_seed(0)
    passes = -(-shape.pairs // shape.per_batch)

    def text(bounds: tuple[int, int], place: float, stretch: float = 1.0) -> Tensor:
        length = round((bounds[0] + (bounds[1] - bounds[0]) * place) * stretch)
        return torch.randint(3, shape.vocabulary, (length,), generator=draw)

    order = torch.randperm(
        shape.pairs, generator=draw
    ).tolist()  # of the chosen responses; rejected the other way
    pairs = []
    for i, rank in enumerate(order):
        number, within = divmod(i, shape.per_batch)
        stretch = 1 + 0.04 * ((within + 0.5) / shape.per_batch - 0.5)
        place = (rank + 0.5) / shape.pairs
        prompt = text(shape.prompt, (number + 0.5) / passes, stretch)
        pairs.append((prompt, text(shape.response, place), text(shape.response, 1 - place)))
    return [
        batch_of(pairs[start : start + shape.per_batch]).to(device)
        for start in range(0, len(pairs), shape.per_batch)
    ]


def batch_of(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> RowBatch:
    """A batch of (prompt, chosen, rejected), padded on the right."""
    rows = [(prompt, responses[k]) for k in range(2) for prompt, *responses in pairs]
    ids, attention, completion = (
        nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        for tensors in (
            [torch.cat(row) for row in rows],
            [torch.ones(len(p) + len(r), dtype=torch.int64) for p, r in rows],
            [torch.cat([torch.zeros_like(p), torch.ones_like(r)]) for p, r in rows],
        )
    )
    return RowBatch(ids, attention, completion, torch.tensor([len(prompt) for prompt, *_ in pairs]))


def ours(
    model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch], *, share_prompts: bool = True
) -> Run:
    """The engine. Its self-check, once per engine, isn't timed."""
    engine = FactoredEngine(model, parameters, share_prompts=share_prompts)
    engine.pairs(batches[0])

    def run() -> Tensor:
        return torch.cat([_columns(engine.pairs(batch).geometry) for batch in batches])

    return run


def ours_with_sums(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """The engine, with the sums of scores for the set's block: a pass's pairs lie in different groups."""
    engine = FactoredEngine(model, parameters)
    sums = GroupSums(parameters, groups=4)

    def run() -> Tensor:
        found = []
        for number, batch in enumerate(batches):
            n = len(batch.prompt_length)
            into = sums.of_pass(torch.arange(n) % 4, [f"{number}, {i}" for i in range(n)])
            found.append(_columns(engine.pairs(batch, sums=into).geometry))
        return torch.cat(found)

    run()  # checks itself, and touches the memory of the sums
    return run


def ours_fast_gemm(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """The engine on oneDNN's float32 matrix product."""
    plain = ours(model, parameters, batches)

    def run() -> Tensor | None:
        with fast_gemm():
            return plain()

    return run


def ours_gram(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """The Gram matrix of all rows of all batches; A, B and c are read off it."""
    engine = FactoredEngine(model, parameters)
    engine.pairs(batches[0])

    def run() -> Tensor:
        gram, found, start = score_gram(engine, batches), [], 0
        for batch in batches:
            n = len(batch.prompt_length)
            w = torch.arange(start, start + n)
            found.append(torch.stack([gram[w, w], gram[w + n, w + n], gram[w, w + n]], 1))
            start += 2 * n
        return torch.cat(found)

    return run


def plain_pass(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """The unit of cost: one forward and one backward of all rows of a batch, LM head at response positions."""

    def run() -> None:
        for batch in batches:
            with studying(model, parameters):
                scored_logps(model, Rows.from_batch(batch)).sum().backward()
            _forget(parameters)

    return run


def full_logits(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """The plain pass with the LM head at every position: what calling the model does."""

    def run() -> None:
        for batch in batches:
            rows = Rows.from_batch(batch)
            with studying(model, parameters):
                logits = gather_positions(model(**model_inputs(model, rows)).logits, rows.index)
                target_logps(logits, rows.targets, rows.valid).sum().backward()
            _forget(parameters)

    return run


def response_loop(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """Today's practice: batch size 1, full logits, one backward per response, dots of the two gradients."""

    def run() -> Tensor:
        found = []
        for batch in batches:
            rows, n = Rows.from_batch(batch), len(batch.prompt_length)
            for i in range(n):
                chosen, rejected = (_score(model, parameters, rows[k : k + 1]) for k in (i, n + i))
                found.append(_block(chosen, rejected))
        return torch.stack(found)

    return run


def torch_vmap(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """torch.func: vmap over rows of grad of a functional call, all rows of a batch at once."""
    theta = {name: p.detach() for name, p in parameters.items()}

    def logp(theta: dict[str, Tensor], ids: Tensor, index: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        logits = functional_call(model, theta, (), inputs).logits
        return target_logps(logits[0, index], targets, valid).sum()

    def run() -> Tensor:
        found = []
        for batch in batches:
            rows, n = Rows.from_batch(batch), len(batch.prompt_length)
            with evaluating(model):
                scores = vmap(grad(logp), in_dims=(None, 0, 0, 0, 0))(
                    theta, rows.input_ids, rows.index, rows.targets, rows.valid
                )
            for i in range(n):
                chosen, rejected = ([score[k] for score in scores.values()] for k in (i, n + i))
                found.append(_block(chosen, rejected))
        return torch.stack(found)

    return run


def token_sums(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """Products of every token with both scores of its pair."""

    def run() -> Tensor:
        found = [token_products(model, parameters, batch) for batch in batches]
        sides = [side for products in found for side in (products.chosen, products.rejected)]
        return torch.cat(
            [torch.stack([side.along_chosen, side.along_rejected]) for side in sides], 1
        ).ravel()[None]

    return run


def token_loop(model: nn.Module, parameters: Parameters, batches: Sequence[RowBatch]) -> Run:
    """Today's practice for tokens: full logits, one backward per token, all gradients kept, their products."""

    def run() -> Tensor:
        found = []
        for batch in batches:
            rows = Rows.from_batch(batch)
            gradients = torch.cat([_token_gradients(model, parameters, rows[i : i + 1]) for i in range(2)])
            gram, cut = gradients @ gradients.T, int(rows.valid[0].sum())
            found.append(torch.stack([gram[:, :cut].sum(1), gram[:, cut:].sum(1)]))
        return torch.cat(found, 1).double().ravel()[None]

    return run


def _token_gradients(model: nn.Module, parameters: Parameters, row: Rows) -> Tensor:
    """The gradient of every scored token of one row, `(T, theta)`."""
    theta = list(parameters.values())
    with studying(model, parameters):
        values = _full_logps(model, row)
        return torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(value, theta, retain_graph=True)])
                for value in values
            ]
        )


def _score(model: nn.Module, parameters: Parameters, row: Rows) -> Sequence[Tensor]:
    with studying(model, parameters):
        return torch.autograd.grad(_full_logps(model, row).sum(), list(parameters.values()))


def _full_logps(model: nn.Module, row: Rows) -> Tensor:
    """Log-probs of one row's scored tokens, by log_softmax over all positions."""
    logps = model(**model_inputs(model, row)).logits[0].float().log_softmax(-1)
    return logps[row.index[0], row.targets[0]]


def _block(chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> Tensor:
    """A, B, c `(3,)`; elementwise products keep the digits that a long float32 `dot` loses."""
    pairs = ((chosen, chosen), (rejected, rejected), (chosen, rejected))
    return torch.stack(
        [
            torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()
            for a, b in pairs
        ]
    ).cpu()


def _columns(geometry: PairGeometry) -> Tensor:
    return torch.stack([geometry.sq_chosen, geometry.sq_rejected, geometry.inner], 1)


def _forget(parameters: Parameters) -> None:
    for parameter in parameters.values():
        parameter.grad = None
