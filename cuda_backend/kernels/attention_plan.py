"""How attention is cut up: a tile per card and head dimension, and into how many parts the keys are split."""

from __future__ import annotations

from .cards import Card
from .launch import Config


def tile(rows: int, keys: int, num_warps: int, num_stages: int) -> Config:
    """Stacked query rows, keys of a step, and columns of the values (at most) of one program."""
    return Config({"ROWS": rows, "KEYS": keys, "COLUMNS": 256}, num_warps, num_stages)


# By compute capability and head dimension, for 16 bits. Shared memory holds the queries, ROWS * d * 2 bytes, and keys
# and values, KEYS * (d + COLUMNS) * 2 bytes per buffer; on Hopper and B200 there are ``num_stages`` buffers, elsewhere
# one fewer. The loads of a step are issued behind its products, so with two stages on Hopper little else hides them:
# that is what a head dimension of 512 leaves room for. From L2 a byte of keys serves ROWS operations: 64 suffice for
# the slower tensor cores of sm_89 and sm_120.
TILES = {
    (80, 256): tile(128, 64, 8, 2),
    (80, 512): tile(64, 32, 4, 2),
    (89, 256): tile(64, 16, 4, 3),
    (89, 512): tile(64, 16, 4, 2),
    (90, 256): tile(128, 32, 8, 4),
    (90, 512): tile(128, 32, 8, 2),
    (100, 256): tile(128, 32, 8, 4),
    (100, 512): tile(128, 32, 8, 2),
    (120, 256): tile(64, 16, 4, 3),
    (120, 512): tile(64, 16, 4, 2),
}
TILES_32_BITS = {256: tile(64, 32, 4, 1), 512: tile(16, 16, 4, 1)}  # no tensor cores: for tests and small models

# Costs beside a step over one tile of keys, in such steps: starting a program, starting the second kernel, and writing
# and reading one program's part of the result in float32. Estimated for Hopper (a step about 1 us), never measured.
START, SECOND, PART = 3.0, 2.0, 5.0
SPLITS = (2, 4, 8, 16)  # few, for each is a kernel to compile
MOST_WAVES = 4  # a bound on the memory for parts


def tile_for(card: Card, dim: int, element_size: int) -> Config:
    size = 256 if dim <= 256 else 512
    return TILES_32_BITS[size] if element_size == 4 else TILES[card.sm, size]


def splits_for(programs: int, steps: int, processors: int) -> int:
    """Into how many parts to split ``steps`` over tiles of keys, where there are ``programs`` without splitting."""

    def cost(splits: int) -> float:
        waves = -(-programs * splits // processors)
        extra = (SECOND + PART * programs * splits / processors) if splits > 1 else 0.0
        return waves * (-(-steps // splits) + START) + extra

    fits = [n for n in SPLITS if programs * n <= MOST_WAVES * processors and 2 * n <= steps]
    return min([1, *fits], key=cost)
