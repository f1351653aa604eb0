"""How work is cut: pure functions of sizes, which need no GPU."""

import pytest

pytest.importorskip("triton")

from mhf_compiler.lowering.kernels.splitting import Split, share_of_sum, split_last_round
from mhf_compiler.lowering.tiles import choose, choose_pipelined, choose_streamed

PROGRAMS = 132


@pytest.mark.parametrize("tiles", [1, 4, 65, 66, 67, 131, 132, 133, 264, 300, 4096])
@pytest.mark.parametrize("iterations", [1, 3, 88])
def test_the_last_round(tiles: int, iterations: int) -> None:
    """Whole rounds stay whole; the rest is cut into parts with work, at most one to a program."""
    split = split_last_round(tiles, iterations, PROGRAMS)
    assert split.parts <= iterations
    cut = split.pieces(tiles) - split.whole
    if split.parts == 1:
        assert cut == 0
        assert split == Split(tiles, 1)
        rest = tiles % PROGRAMS
        assert iterations == 1 or rest == 0 or 2 * rest > PROGRAMS
    else:
        assert split.whole % PROGRAMS == 0
        assert 0 < cut <= PROGRAMS


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [1, 16, 64, 200, 4096, 32768])
@pytest.mark.parametrize("heads", [1, 2, 5, 16])
def test_programs_for_every_multiprocessor(
    capability: tuple[int, int], itemsize: int, tokens: int, heads: int
) -> None:
    tile = choose(
        "forward",
        tokens=tokens,
        heads=heads,
        hidden=256,
        width=128,
        itemsize=itemsize,
        capability=capability,
    )
    tiles = -(-tokens // tile.tokens) * heads
    assert tiles * tile.parts >= 128
    assert tile.parts == 1 or tiles * (tile.parts - 1) < 128


@pytest.mark.parametrize("parts", [2, 3, 8, 11, 66, 128, 132, 300])
@pytest.mark.parametrize("tokens", [16, 64, 128, 192])
@pytest.mark.parametrize("width", [1, 8, 20, 96, 256])
@pytest.mark.parametrize("length", [1, 5, 200, 4096])
def test_the_sum_of_parts(parts: int, tokens: int, width: int, length: int) -> None:
    """Shares cover a tile, and a program loads all parts at once, however many there are."""
    together, elements = share_of_sum(parts, tokens, width, length)
    assert tokens * width % elements == 0
    assert elements.bit_count() == together.bit_count() == 1  # powers of two
    assert min(parts, 128) <= together <= max(2 * parts, 2)
    assert together * elements <= 1024
    assert elements < 2 * min(tokens, length) * width


def test_the_sum_of_one_heads_parts() -> None:
    """A token of one head, 256 wide, whose weights every multiprocessor reads a part of."""
    assert share_of_sum(128, 16, 256, 1) == (128, 8)  # 32 programs
    assert share_of_sum(66, 128, 256, 256) == (128, 8)


@pytest.mark.parametrize(
    ("tokens", "width", "itemsize", "capability"),
    [
        (16, 128, 2, (9, 0)),
        (4096, 128, 4, (9, 0)),
        (4096, 128, 2, (8, 0)),
        (4096, 128, 2, (10, 0)),
    ],
    ids=["few tokens", "float32", "sm_80", "sm_100"],
)
def test_what_plain_triton_keeps(
    tokens: int, width: int, itemsize: int, capability: tuple[int, int]
) -> None:
    sizes = {"tokens": tokens, "hidden": 256, "width": width, "itemsize": itemsize}
    assert choose_pipelined(**sizes, capability=capability) is None
    ours = {"tokens": 4096, "hidden": 256, "width": 128, "itemsize": 2}
    assert choose_pipelined(**ours, capability=(9, 0)) is not None


@pytest.mark.parametrize("width", [8, 16, 17, 24, 32, 33])
def test_narrow_heads_take_the_tiles_of_64_columns(width: int) -> None:
    sizes = {"tokens": 4096, "itemsize": 2, "capability": (9, 0)}
    wide = choose_pipelined(**sizes, hidden=256, width=64)
    assert wide is not None
    assert choose_pipelined(**sizes, hidden=256, width=width) == wide
    kind = {"gated": True, "routed": True, "biased": (False, False, False)}
    for kernel in ("query", "down", "up"):
        wide = choose_streamed(kernel, **sizes, **kind, width=64)
        assert wide is not None
        assert choose_streamed(kernel, **sizes, **kind, width=width) == wide
