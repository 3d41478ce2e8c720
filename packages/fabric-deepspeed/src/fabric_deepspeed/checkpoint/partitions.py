"""Where the elements of a parameter are among what the ranks have written. All memory there is flat.

Stages 1 and 2 lay the parameters of a group end to end and cut the whole into one partition for each rank, so that a
parameter lies on one rank, or on a few that follow each other. Stage 3 cuts every parameter by itself, so that each
rank has a piece, the last ones padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.streams import StreamedTensor

Memory = Sequence[Mapping[int, Tensor]]
"""By rank and number of the flat tensor."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter: those from ``start`` on in one of a rank's flat tensors."""

    rank: int
    flat: int
    start: int
    length: int


@dataclass(frozen=True)
class Places:
    """Where all parameters of an optimizer are.

    Attributes:
        shapes: by name, in the order in which they lie in memory.
        flats: for each flat tensor, the names of the parameters in it.
        pieces: by name, in the order of the elements.
    """

    shapes: dict[str, torch.Size]
    flats: list[list[str]]
    pieces: dict[str, list[Piece]]

    def stream(self, name: str, memory: Memory) -> StreamedTensor:
        """The parameter's elements in ``memory``, by rank and flat tensor, put together when they are read."""
        pieces = self.pieces[name]

        def read() -> Iterator[Tensor]:
            for piece in pieces:
                yield memory[piece.rank][piece.flat][piece.start : piece.start + piece.length]

        dtype = memory[pieces[0].rank][pieces[0].flat].dtype if pieces else torch.float32
        return StreamedTensor(self.shapes[name], dtype, read)


def cut_by_group(
    shapes: Sequence[Mapping[str, torch.Size]],
    gaps: Sequence[Sequence[int]] | None,
    lengths: Sequence[int],
    world_size: int,
) -> Places:
    """Stages 1 and 2.

    Args:
        shapes: of the parameters of each group, in the order in which they lie in memory.
        gaps: for each group, how many elements are unused after each parameter; none if not given.
        lengths: for each group, how long a partition is.
        world_size: how many partitions there are.
    """
    places = _without_pieces(shapes)
    for flat, names in enumerate(places.flats):
        numbers = [places.shapes[name].numel() for name in names]
        for name, first, number in zip(names, offsets(numbers, gaps[flat] if gaps else None), numbers, strict=True):
            for rank in range(world_size):
                start, _, length = overlap(first, number, lengths[flat], rank)
                if length > 0:
                    places.pieces[name].append(Piece(rank, flat, start, length))
    return places


def offsets(numbers: Sequence[int], gaps: Sequence[int] | None) -> list[int]:
    """Where tensors of so many elements begin that lie end to end, with so many unused elements after each."""
    widths = numbers if gaps is None else [number + gap for number, gap in zip(numbers, gaps, strict=True)]
    return [0, *accumulate(widths)][:-1]


def overlap(first: int, number: int, length: int, rank: int) -> tuple[int, int, int]:
    """What rank ``rank``'s partition of ``length`` elements has of the ``number`` elements from ``first`` on.

    Where that begins in the partition, where among the elements, and how many there are, none if that is not positive.
    """
    begin = max(first, rank * length)
    return begin - rank * length, begin - first, min(first + number, (rank + 1) * length) - begin


def cut_each(shapes: Sequence[Mapping[str, torch.Size]], world_size: int) -> Places:
    """Stage 3. ``shapes`` are those of the parameters in each flat tensor."""
    places = _without_pieces(shapes)
    for flat, names in enumerate(places.flats):
        start = 0
        for name in names:
            places.pieces[name].extend(pieces_of(places.shapes[name].numel(), world_size, flat, start))
            start += partition_length(places.shapes[name].numel(), world_size)
    return places


def partition_length(elements: int, world_size: int) -> int:
    """How many elements each rank has of a parameter at stage 3, padding included."""
    return -(-elements // world_size)


def pieces_of(elements: int, world_size: int, flat: int, start: int) -> Iterator[Piece]:
    """The ranks' pieces of a parameter at stage 3, without their padding."""
    length = partition_length(elements, world_size)
    for rank in range(world_size):
        left = elements - rank * length
        if left > 0:
            yield Piece(rank, flat, start, min(length, left))


def _without_pieces(shapes: Sequence[Mapping[str, torch.Size]]) -> Places:
    all_shapes = {name: torch.Size(shape) for group in shapes for name, shape in group.items()}
    return Places(all_shapes, [list(group) for group in shapes], {name: [] for name in all_shapes})
