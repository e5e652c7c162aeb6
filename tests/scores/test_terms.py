"""The algebra of factored scores, against scores written out by einsum."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from entangle.scores import ghost as ghost_form
from entangle.scores import terms
from entangle.scores.ghost import Ghost, Side
from entangle.scores.reduce import gram_block, pair_block
from entangle.scores.terms import Dense, OneHot, Outer, Score

A, B, ROWS = 5, 4, 6


def factor(kind: str, size: int, positions: int, seed: int) -> Tensor | OneHot:
    """A random factor `(rows, positions, size)`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "onehot":
        return OneHot(torch.randint(size, (ROWS, positions), generator=generator), size)
    return torch.randn(ROWS, positions, size, generator=generator, dtype=torch.float64)


def dense(value: Tensor | OneHot) -> Tensor:
    """A factor as a tensor."""
    return (
        torch.nn.functional.one_hot(value.index, value.size).double() if isinstance(value, OneHot) else value
    )


def written_out(term: Outer | Dense) -> Tensor:
    """A term's scores, `(rows, a, b)`."""
    return (
        term.value
        if isinstance(term, Dense)
        else torch.einsum("rsa,rsb->rab", dense(term.left), dense(term.right))
    )


def make_terms() -> dict[str, Outer | Dense]:
    """One term of every kind, with different numbers of positions."""
    return {
        "outer": Outer(factor("tensor", A, 3, 1), factor("tensor", B, 3, 2)),
        "left_onehot": Outer(factor("onehot", A, 7, 3), factor("tensor", B, 7, 4)),
        "right_onehot": Outer(factor("tensor", A, 2, 5), factor("onehot", B, 2, 6)),
        "dense": Dense(
            torch.randn(ROWS, A, B, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        ),
    }


SCORES = [names for size in (1, 2, 4) for names in itertools.combinations(make_terms(), size)]
N = ROWS // 2


def two_members(names: tuple[str, ...], shared: bool) -> Score:
    """Terms as two members of three rows; the first tensor factor of an outer term may be shared."""
    members: list[list[Outer | Dense]] = [[], []]
    for name in names:
        term = make_terms()[name]
        first, second = term[:N], term[N:]
        if shared and isinstance(first, Outer) and isinstance(second, Outer):
            second = Outer(second.left, first.right) if name == "outer" else Outer(first.left, second.right)
        members[0].append(first)
        members[1].append(second)
    return Score(tuple(map(tuple, members)), (A, B))


@pytest.fixture(params=[(names, shared) for names in SCORES for shared in (False, True)], ids=str)
def score(request: pytest.FixtureRequest) -> tuple[Score, Tensor]:
    """A sum of terms, and the same written out."""
    made = two_members(*request.param)
    return made, torch.cat(
        [sum((written_out(t) for t in member), torch.zeros(())) for member in made.members]
    )


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_slices(score: tuple[Score, Tensor], budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They tile the matrix, in pieces of at most the budget (or one row of the matrix)."""
    monkeypatch.setitem(terms.SLICE_ELEMENTS, "cpu", budget)
    pieces = list(score[0].slices())
    torch.testing.assert_close(torch.cat([value for _, _, value in pieces], 1), score[1])
    assert all(value.numel() <= max(budget, ROWS * B) for _, _, value in pieces)
    assert [stop - start for start, stop, _ in pieces] == [value.shape[1] for _, _, value in pieces]


def test_product(score: tuple[Score, Tensor]) -> None:
    """<score, direction>."""
    direction = torch.randn(A, B, dtype=torch.float64)
    torch.testing.assert_close(score[0].product(direction), (score[1] * direction).sum((1, 2)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["cheapest", "written_out", "ghost"])
def test_blocks(
    score: tuple[Score, Tensor], weighted: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pair blocks and Gram blocks, in either form, with and without a metric."""
    monkeypatch.setattr(ghost_form, "BLOCK", 2)
    if form != "cheapest":
        monkeypatch.setattr(Ghost, "cost", lambda *_: 10**9 if form == "written_out" else 0)
    weight = torch.rand(A, B, dtype=torch.float64) if weighted else None
    flat = (score[1] * (1 if weight is None else weight.sqrt())).flatten(1)
    gram = flat @ flat.T
    torch.testing.assert_close(gram_block(score[0], weight), gram)
    w, l = torch.arange(N), torch.arange(N, 2 * N)  # noqa: E741
    expected = [gram[w, w], gram[l, l], gram[w, l], gram[w, w] - gram[w, l], gram[l, l] - gram[w, l]]
    torch.testing.assert_close(pair_block(score[0], weight), torch.stack(expected))


def test_compact() -> None:
    """Written out where that is far smaller: the same score; otherwise the very same term."""
    long = Outer(factor("tensor", A, 50, 1), factor("tensor", B, 50, 2))
    compact = long.compact()
    assert isinstance(compact, Dense)
    torch.testing.assert_close(compact.value, written_out(long))
    for term in make_terms().values():
        assert term.compact() is term


@pytest.mark.parametrize("side", ["left", "right"])
def test_ghost_of_every_kind(score: tuple[Score, Tensor], side: Side) -> None:
    """Either side as the kernel: all dots, cross terms included (tied embeddings: one-hot against dense)."""
    ghost = Ghost.from_score(score[0], side)
    others = {
        type(t.right if side == "left" else t.left)
        for m in score[0].members
        for t in m
        if isinstance(t, Outer)
    }
    has_dense = any(isinstance(t, Dense) for m in score[0].members for t in m)
    assert (ghost is None) == (has_dense or OneHot in others)
    if ghost is not None:
        flat = score[1].flatten(1).view(2, N, -1)
        torch.testing.assert_close(ghost.dots(ghost), torch.einsum("knp,mnp->kmn", flat, flat))


def test_ghost_shares_what_is_shared() -> None:
    """A factor that both members hold enters the kernel once; equal copies of it don't count as one."""
    shared, apart = (two_members(("outer",), flag) for flag in (True, False))
    copied = Score(tuple((Outer(t.left, t.right.clone()),) for (t,) in shared.members), (A, B))  # pyright: ignore
    counts = [len(ghost.kernels) for s in (shared, apart, copied) if (ghost := Ghost.from_score(s, "right"))]
    assert counts == [1, 2, 2]


def test_ghost_adds_what_meets_one_factor() -> None:
    """Two terms of a member with the same kernel factor."""
    x, y, z = factor("tensor", B, 3, 1), factor("tensor", A, 3, 2), factor("tensor", A, 3, 3)
    score = Score(((Outer(y, x), Outer(z, x)),), (A, B))
    ghost = Ghost.from_score(score, "right")
    assert ghost is not None and len(ghost.kernels) == 1
    flat = next(score.slices())[2].flatten(1)
    torch.testing.assert_close(ghost.dots(ghost)[0, 0], (flat * flat).sum(1))


def test_first_row(score: tuple[Score, Tensor]) -> None:
    """The first row alone."""
    first = score[0].first_row()
    assert len(first) == 1
    torch.testing.assert_close(next(first.slices())[2], score[1][:1])


def test_wrong_shapes_are_refused() -> None:
    """A rule that mixes up input and output is found at once."""
    with pytest.raises(ValueError, match="for a matrix"):
        Outer(factor("tensor", B, 3, 1), factor("tensor", A, 3, 2)).as_matrices((A, B))
    with pytest.raises(RuntimeError):
        Dense(torch.zeros(2, 3)).as_matrices((2, 2))
