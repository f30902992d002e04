"""Tiles of the logits between the embeddings of a rank and those of all ranks, one at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_pretrain.losses.backend import Backend
from ssl_pretrain.losses.half_precision import ScaledRows
from ssl_pretrain.losses.similarity import upcast


class Tile(NamedTuple):
    """A rectangle of pairs of anchors and candidates."""

    rows: slice  # anchors of this rank
    columns: slice  # candidates of all ranks
    is_local: bool  # True if the candidates belong to this rank
    # Rows of the mirror, the tile with the transposed logits. None if there is no such tile.
    mirror_rows: slice | None


def iterate_logits(
    anchors: Tensor,
    candidates: Tensor,
    local_start: int,
    excluded_offsets: tuple[int, ...],
    backend: Backend,
    skip_mirrors: bool = False,
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield every tile with its logits, which are -inf for excluded pairs.

    All tiles share one buffer, which the next tile overwrites.

    Args:
        anchors: As in `tiles.log_sum_exp`.
        candidates: As in `tiles.log_sum_exp`.
        local_start: As in `tiles.log_sum_exp`.
        excluded_offsets: As in `tiles.log_sum_exp`.
        backend: Backend, which sets the tile size.
        skip_mirrors: Skip tiles below the diagonal, whose mirrors above it have the same logits.
    """
    height = backend.tile_rows
    # With square tiles, the diagonal only crosses tiles that start on it.
    width = height if skip_mirrors else backend.tile_columns
    buffer = anchors.new_empty(min(height, len(anchors)) * min(width, len(candidates)))
    for tile in _tiles(len(anchors), len(candidates), local_start, height, width):
        mirror_rows = tile.mirror_rows
        if skip_mirrors and mirror_rows is not None and mirror_rows.start < tile.rows.start:
            continue
        tile_anchors, tile_candidates = anchors[tile.rows], candidates[tile.columns]
        logits = buffer[: len(tile_anchors) * len(tile_candidates)].view(len(tile_anchors), -1)
        torch.mm(tile_anchors, tile_candidates.T, out=logits)
        for offset in excluded_offsets if tile.is_local else ():
            diagonal = local_start + tile.rows.start + offset - tile.columns.start
            logits.diagonal(diagonal).fill_(float("-inf"))
        yield tile, logits


class ScaledTile(NamedTuple):
    """A rectangle of pairs of anchors and candidates, both multiplied by their factors."""

    rows: slice
    columns: slice
    anchors: Tensor  # (num_rows, dim)
    candidates: Tensor  # (num_columns, dim)
    logits: Tensor  # (num_rows, num_columns)


def iterate_scaled_logits(
    anchors: ScaledRows, candidates: ScaledRows, backend: Backend
) -> Iterator[ScaledTile]:
    """Yield tiles of the logits between rows that are multiplied by their factors tile by tile.

    So normalizing embeddings takes no memory. All tiles share one buffer of logits, which the next
    tile overwrites.
    """
    num_anchors, num_candidates = len(anchors.rows), len(candidates.rows)
    height, width = min(backend.tile_rows, num_anchors), min(backend.tile_columns, num_candidates)
    buffer = upcast(anchors.rows[:0]).new_empty(height * width)
    for start in range(0, num_anchors, height):
        rows = slice(start, min(start + height, num_anchors))
        tile_anchors = anchors.multiply(rows)
        for column in range(0, num_candidates, width):
            columns = slice(column, min(column + width, num_candidates))
            tile_candidates = candidates.multiply(columns)
            logits = buffer[: len(tile_anchors) * len(tile_candidates)].view(len(tile_anchors), -1)
            torch.mm(tile_anchors, tile_candidates.T, out=logits)
            yield ScaledTile(rows, columns, tile_anchors, tile_candidates, logits)


def _tiles(
    num_rows: int, num_columns: int, local_start: int, height: int, width: int
) -> Iterator[Tile]:
    """Yield tiles that cover every pair once. No tile mixes columns of this rank and of others."""
    local_stop = local_start + num_rows
    bounds = (
        (0, local_start, False),
        (local_start, min(local_stop, num_columns), True),
        (local_stop, num_columns, False),
    )
    for row in range(0, num_rows, height):
        rows = slice(row, min(row + height, num_rows))
        for start, stop, is_local in bounds:
            for column in range(start, stop, width):
                end = min(column + width, stop)
                has_mirror = is_local and column != local_start + row
                mirror_rows = slice(column - local_start, end - local_start) if has_mirror else None
                yield Tile(rows, slice(column, end), is_local, mirror_rows)
