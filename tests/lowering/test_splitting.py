"""How work is cut: pure functions of sizes, which need no GPU."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mhf_compiler.lowering.kernels.splitting import Split, share_of_sum, split_last_round
from mhf_compiler.lowering.tiles import Sizes, portable, specialised

PROGRAMS = 132
#: 32 heads of width 128, with 22 gated sub-networks of 256 hidden units, on an H100
SIZES = Sizes(4096, 32, 32, 128, 22, 256, True, True, (False,) * 3, torch.bfloat16, (9, 0))


def test_the_last_round() -> None:
    """Whole rounds stay whole; the rest is cut into parts with work, at most one to a program."""
    tile_counts = (1, 4, 65, 66, 67, 131, 132, 133, 264, 300, 4096)
    for tiles, iterations in itertools.product(tile_counts, (1, 3, 88)):
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_programs_for_every_multiprocessor(capability: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens, heads in itertools.product((1, 16, 64, 200, 4096, 32768), (1, 2, 5, 16)):
        sizes = SIZES._replace(tokens=tokens, heads=heads, dtype=dtype, capability=capability)
        tile = portable("forward", sizes._replace(sub_networks=64))
        tiles = -(-tokens // tile.tokens) * heads
        assert tiles * tile.parts >= 128
        assert tile.parts == 1 or tiles * (tile.parts - 1) < 128


def test_no_more_programs_than_tiles_of_hidden_units() -> None:
    tile = portable("forward", SIZES._replace(tokens=1, heads=1, sub_networks=3))
    assert tile.parts == 3 * 256 // tile.hidden


@pytest.mark.parametrize("parts", [2, 3, 8, 11, 66, 128, 132, 300])
def test_the_sum_of_parts(parts: int) -> None:
    """Shares cover a tile, and a program loads all parts at once, however many there are."""
    extents = ((16, 64, 128, 192), (1, 8, 20, 96, 256), (1, 5, 200, 4096))
    for tokens, width, length in itertools.product(*extents):
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
    "changes",
    [
        {"tokens": 16},
        {"dtype": torch.float32, "tokens": 200},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"interpreted": True},
    ],
    ids=str,
)
def test_what_plain_triton_keeps(changes: dict[str, Any]) -> None:
    assert specialised("forward", SIZES._replace(**changes)) is None
    assert specialised("forward", SIZES, out_dtype=torch.float32) is None
    assert specialised("forward", SIZES) is not None


@pytest.mark.parametrize("width", [8, 16, 17, 24, 32, 33])
def test_narrow_heads_take_the_tiles_of_64_columns(width: int) -> None:
    for kernel in ("dq", "dv", "dk_du"):
        wide = specialised(kernel, SIZES._replace(head_dim=64))
        assert wide is not None
        assert specialised(kernel, SIZES._replace(head_dim=width)) == wide
    forward = specialised("forward", SIZES._replace(head_dim=width))
    assert forward is not None
    assert forward.tile.schedule == ("order" if width <= 32 else "turns")


@pytest.mark.parametrize("width", [8, 32, 33, 64, 65, 128])
def test_what_plain_triton_keeps_of_networks_without_a_gate(width: int) -> None:
    """Where activations take longer than products; dK and dV are one kernel of Hopper's anyway."""
    ungated = SIZES._replace(head_dim=width, gated=False)
    assert (specialised("forward", ungated) is None) == (width <= 32)
    assert (specialised("dq", ungated) is None) == (width <= 64)
    assert specialised("dk_dv", ungated) is not None
