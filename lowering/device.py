"""Properties of the device that the choice of kernels depends on. Triton is imported on demand."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["ANY_CARD", "Card", "capability", "cards", "find_card", "interpreted", "multiprocessors"]


class Card(NamedTuple):
    """A card that need not be there: what kernels are chosen and times are estimated by."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


#: for tensors without a device, of which nothing is run: nothing is known but that they match
ANY_CARD = Card("", (0, 0), 0)

_CARDS = {
    card.name: card
    for card in (
        Card("a10", (8, 6), 72),
        Card("a100", (8, 0), 108),
        Card("b200", (10, 0), 148),
        Card("gh200", (9, 0), 132),
        Card("h100", (9, 0), 132),
        Card("h200", (9, 0), 132),
        Card("l4", (8, 9), 58),
        Card("l40s", (8, 9), 142),
        Card("rtx3090", (8, 6), 82),
        Card("rtx4090", (8, 9), 128),
        Card("rtx5090", (12, 0), 170),
    )
}


def find_card(device: str) -> Card:
    """The card of a name such as ``"cuda:h100"``.

    Raises:
        ValueError: there is none of that name; the message lists those that are known.
    """
    kind, _, name = device.lower().partition(":")
    name = "".join(letter for letter in name if letter.isalnum())
    if kind == "cuda" and name in _CARDS:
        return _CARDS[name]
    near = difflib.get_close_matches(name, _CARDS, n=1)
    hint = f"; the nearest is 'cuda:{near[0]}'" if near else ""
    raise ValueError(f"device is {device!r}, must be cuda: and one of {', '.join(_CARDS)}{hint}")


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles are chosen for."""
    if device.type == "cuda" and torch.version.hip is not None:
        return 8, 6  # AMD counts its cards otherwise; these are the most modest choices
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return 9, 0  # Triton's interpreter, which runs any choice


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel that takes a whole multiprocessor run at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # an H100's


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it decides so at its import."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def cards() -> tuple[tuple[str, int, int, int], ...]:
    """The kinds of CUDA devices that there are, as kernels are chosen for: name, compute capability
    and number of multiprocessors."""
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        sorted({(one.name, one.major, one.minor, one.multi_processor_count) for one in found})
    )
