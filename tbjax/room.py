"""How much room the cache of keys and values needs, and how much of a prompt is read at once: arithmetic alone.

The programs of generation allocate by it, and the planner prices by it.
"""

import math

from tbjax.config import ModelConfig

# The smallest prompt length or capacity that is compiled for.
SMALLEST_BUCKET = 32

# So many tokens of all rows are read at once on a device: enough to keep any busy, and few beside what a cache holds.
TOKENS_AT_ONCE = 8192
# But of a row no fewer.
SMALLEST_CHUNK = 512

# What a TPU keeps in one tile, of numbers of 16 bits. Keys and values of so many tokens, or a multiple of them, lie in
# memory in the order of their dimensions. Of any other number a program would be given them in an order that spares
# padding, and would turn all of them round: they would be there twice.
TILE = 16
# Rings of up to so many tokens may be: the copy is then no larger than the keys and values of the tokens that are read
# at once, which stand beside a cache anyway, while whole tiles in every part would lengthen a ring by a good share.
LONGEST_LOOSE_RING = 512

# Ropes that turn by the length of the whole, which they must see.
WHOLE_ROPES = ("dynamic", "longrope")


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """`size` rounded up: powers of two, and half-way between them."""
    if size <= smallest:
        return smallest
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def tokens_at_once(config: ModelConfig, rows: int, length: int, *, pp: int = 1) -> int:
    """How many tokens are read at once of each of a device's `rows`, in prompts padded to `length`."""
    whole = any(rope is not None and rope.kind in WHOLE_ROPES for rope in (config.rope, config.window_rope))
    if whole or length <= SMALLEST_CHUNK or in_stages(config, pp):
        return length
    chunk = SMALLEST_CHUNK * 2 ** max(0, math.floor(math.log2(max(1, TOKENS_AT_ONCE // (rows * SMALLEST_CHUNK)))))
    return min(length, chunk)


def in_stages(config: ModelConfig, pp: int) -> bool:
    """Whether generation runs over the stages of a pipeline, whose layers follow one pattern; it keeps no rings."""
    return pp > 1 and len(config.groups) == 1


def heads_are_whole(config: ModelConfig, tp: int) -> bool:
    """Whether every device has all heads of its part of a cache, since tp has too many devices to share them out."""
    return tp > config.kv_heads


def parts(config: ModelConfig, *, tp: int, cp: int) -> int:
    """Into how many parts devices cut the tokens of a cache."""
    return cp * (tp if heads_are_whole(config, tp) else 1)


def slots(window: int | None, capacity: int, chunk: int, cut: int = 1) -> int:
    """How many tokens a layer keeps of up to `capacity`, of which `chunk` are written at once, to be cut equally."""
    whole = -(-capacity // cut) * cut
    if window is None:
        return whole
    ring = window + chunk - 1
    unit = cut * TILE if ring > LONGEST_LOOSE_RING else cut
    return min(whole, -(-ring // unit) * unit)
