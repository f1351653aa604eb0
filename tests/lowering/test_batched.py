"""When PyTorch's batched products take a problem, and what they compute at a time: pure functions.

What they compute is tested under Triton's interpreter, in test_kernels_interpreted.py, and on a
card, in test_batched_gpu.py.
"""

from typing import Any

import pytest
import torch
from support.problems import stored_as

pytest.importorskip("triton")

from mhf_compiler.lowering import tiles
from mhf_compiler.lowering.kernels.batched.views import Rows, Units, units_of
from mhf_compiler.lowering.tiles import (
    MOST_BYTES,
    Kernel,
    Sizes,
    backward_kernels,
    batched_chunk,
    select,
)
from mhf_compiler.lowering.workload import Workload, _tunable

CARDS = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
#: 32 heads of width 512 with 2048 hidden units each
SIZES = Sizes(2048, 32, 32, 512, 1, 2048, False, False, (False,) * 3, torch.bfloat16, (9, 0))


def taken(**changes: Any) -> list[bool]:
    """Whether the products are the forward pass, and the backward pass."""
    sizes = SIZES._replace(**changes)
    forward = select("forward", sizes).family == "batched"
    return [forward, backward_kernels(sizes) == ("backward",)]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_wide_heads(card: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 2048):
            for width in (257, 512, 1536):
                about = {"dtype": dtype, "tokens": tokens, "capability": card}
                assert taken(head_dim=width, **about) == [True, True]
    assert taken(interpreted=True) == [True, True]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_narrower_heads_in_16_bits(card: tuple[int, int]) -> None:
    """The backward pass alone, where plain Triton's tiles fill all registers."""
    for width, tokens, backward in (
        (256, 1024, True),
        (129, 1024, True),
        (256, 1023, False),
        (128, 4096, False),
    ):
        found = taken(head_dim=width, tokens=tokens, capability=card)
        assert found == [False, backward], (width, tokens)
    assert taken(head_dim=256, interpreted=True) == [False, False]


@pytest.mark.parametrize("width", [8, 64, 128, 256])
def test_float32_has_no_matrix_units_of_tiles(width: int) -> None:
    about = {"head_dim": width, "dtype": torch.float32}
    assert taken(tokens=256, **about) == [True, True]
    assert taken(tokens=255, **about) == [False, False]
    assert taken(tokens=256, interpreted=True, **about) == [False, False]


def test_results_of_another_dtype() -> None:
    assert select("forward", SIZES, out_dtype=torch.float32).family == "batched"


def test_nothing_of_theirs_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhf_compiler.lowering import workload

    monkeypatch.setattr(workload, "capability", lambda device: (9, 0))
    monkeypatch.setattr(workload, "interpreted", lambda: False)
    device = torch.device("cuda", 0)

    def tuned(training: bool, **changes: Any) -> list[Kernel]:
        sizes = SIZES._replace(capability=(0, 0), **changes)
        return _tunable(Workload(sizes, "gelu", sizes.dtype, device, training))

    assert tuned(True) == tuned(False) == []
    assert tuned(True, head_dim=256) == tuned(False, head_dim=256) == ["forward"]
    assert tuned(True, head_dim=64) == ["forward", "dq", "dv", "dk_du"]


def test_what_a_chunk_has() -> None:
    """As many heads as fit: 8 MiB of each in the forward pass, and twice that in the backward."""
    assert batched_chunk("forward", SIZES) == (16, 2048, 16 * 2**23)
    assert batched_chunk("backward", SIZES) == (8, 2048, 8 * 2**24)
    assert batched_chunk("backward", SIZES._replace(gated=True))[:2] == (5, 2048)
    assert batched_chunk("forward", SIZES._replace(tokens=1))[:2] == (32, 1)


def test_chunks_are_of_equal_size() -> None:
    chunk = batched_chunk("forward", SIZES._replace(heads=18, groups=18))
    assert chunk.groups == 9  # and 9, not 16 and 2


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("gated", [False, True])
def test_memory_is_bounded(kernel: Kernel, groups: int, gated: bool) -> None:
    for tokens in (0, 1, 100, 4096, 1 << 20):
        for hidden in (1, 256, 20000):
            sizes = SIZES._replace(tokens=tokens, groups=groups, hidden=hidden, gated=gated)
            chunk = batched_chunk(kernel, sizes)
            kept = (1 + gated + (kernel == "backward")) * chunk.groups * chunk.rows * hidden * 2
            assert chunk.kept == kept <= MOST_BYTES
            assert 1 <= chunk.groups <= groups
            assert chunk.rows == tokens * (32 // groups) or chunk.rows % 128 == 0


def test_the_fewest_rows_may_take_more_memory() -> None:
    chunk = batched_chunk("forward", SIZES._replace(tokens=4096, hidden=1 << 20))
    assert chunk == (1, tiles._FEWEST_ROWS, 2 * 128 << 20)


ALL = slice(0, 2)


def tokens(order: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    return stored_as(torch.arange(3.0 * 5 * 4 * 6).view(3, 5, 4, 6), order)


@pytest.mark.parametrize(
    ("order", "heads_first", "copied"),
    [
        ((0, 1, 2, 3), None, True),  # between tokens lie heads of other groups
        ((2, 0, 1, 3), True, False),
        ((2, 1, 0, 3), None, True),
        ((0, 2, 1, 3), None, True),
    ],
)
def test_tokens_of_heads_that_share_weights(
    order: tuple[int, ...], heads_first: bool | None, copied: bool
) -> None:
    x = tokens(order)
    rows = Rows.of(2, x)
    assert heads_first is None or rows.heads_first == heads_first
    assert (rows.view(x) is None) == copied
    heads = x.unflatten(2, (2, 2))  # (B, L, G, heads, d)
    expected = heads.permute(2, 3, 0, 1, 4) if rows.heads_first else heads.permute(2, 0, 1, 3, 4)
    found = rows.read(x, ALL)
    assert found.equal(expected.flatten(1, 3))
    assert rows.read(x, slice(1, 2)).equal(found[1:])
    place = rows.place(x, ALL, x.dtype)
    place.copy_(-found)
    rows.keep(x, ALL, place)
    assert x.equal(-tokens(order))


def test_heads_that_all_share_their_weights_lie_in_the_order_of_tokens() -> None:
    x = tokens()
    view = Rows.of(1, x).view(x)
    assert view is not None
    assert view.shape == (1, 60, 6)
    assert view.data_ptr() == x.data_ptr()


def test_each_head_of_its_own_weights_is_a_view() -> None:
    """As models have it: tokens step over all heads, which the library takes."""
    x = tokens()
    view = Rows.of(4, x).view(x)
    assert view is not None
    assert view.stride() == (6, 24, 1)
    assert view.equal(x.permute(2, 0, 1, 3).flatten(1, 2))


def test_what_no_product_takes_is_copied() -> None:
    expanded = torch.randn(3, 1, 4, 6).expand(3, 5, 4, 6)
    one = torch.randn(1, 1, 4, 6).expand(3, 5, 4, 6)
    every_other = torch.randn(3, 5, 4, 12)[..., ::2]
    for x in (expanded, one, every_other):
        rows = Rows.of(4, x)
        assert rows.view(x) is None
        assert rows.read(x, slice(0, 4)).equal(x.permute(2, 0, 1, 3).flatten(1, 2))


def test_weights() -> None:
    weights = torch.randn(2, 3, 5, 6)
    by_columns = stored_as(weights, (0, 1, 3, 2))
    packed = torch.randn(2, 3, 10, 6).chunk(2, dim=2)[1]
    assert units_of(weights) is not None
    assert units_of(by_columns) is None
    assert units_of(packed) is None
    assert units_of(by_columns[:, :1]) is not None
    assert units_of(packed[:, :1]) is not None
    for x in (weights, by_columns, packed, by_columns[:, :1], packed[:, :1]):
        assert Units(x).read(slice(1, 2)).equal(x[1:].flatten(1, 2))
