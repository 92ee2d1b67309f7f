"""Which records are taken and which are held out: by hashes, so that it is the same everywhere and tomorrow.

No library promises that its random numbers stay the same from version to version.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from loram_hub.errors import InvalidRequestError

Keys = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


def position_keys(count: int, *, seed: int) -> Keys:
    """Return a well-mixed number for each of `count` positions: the smallest are a sample."""
    return _mixed(np.arange(count, dtype=np.uint64), seed)


def content_key(text: str) -> int:
    """Return 64 bits that tell a question from others; differences in white space do not count."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hold_out(keys: Keys, *, amount: float, seed: int) -> Positions:
    """Choose examples to hold out; those with the same key stay together.

    Args:
        keys: `content_key` of each example, (examples,).
        amount: below 1 a share of the different questions, whose choice does not depend on the other examples;
            otherwise a number of examples, which is met exactly unless questions with many answers prevent it.
        seed: of the choice.

    Returns:
        Positions of the examples that are held out, ascending; none if `amount` is 0.

    Raises:
        InvalidRequestError: the amount is negative or no whole number, or nothing or everything would be held out.
    """
    if amount < 0 or (amount >= 1 and amount != int(amount)):
        raise InvalidRequestError(f"held_out is {amount:g}; give a share below 1, or a whole number of examples.")
    if amount == 0:
        return np.empty(0, dtype=np.int64)
    mixed = _mixed(keys, seed)
    if amount < 1:
        chosen = np.flatnonzero(mixed < np.uint64(int(amount * 2**64)))
    else:
        chosen = _groups_of_at_most(mixed, int(amount))
    if not 0 < len(chosen) < len(keys):
        raise InvalidRequestError(
            f"held_out is {amount:g}, and of {len(keys):,} examples with {len(np.unique(keys)):,} different questions "
            f"that makes {len(chosen):,}. Some must be held out and some be left; the answers to one question stay "
            "together. Change held_out, or give more data."
        )
    return chosen


def _groups_of_at_most(mixed: Keys, wanted: int) -> Positions:
    """Take whole groups of equal numbers, the smallest numbers first, passing over groups that no longer fit."""
    numbers, group_of, sizes = np.unique(mixed, return_inverse=True, return_counts=True)
    taken = np.zeros(len(numbers), dtype=bool)
    for group, size in enumerate(sizes):
        if size <= wanted:
            taken[group] = True
            wanted -= int(size)
        if wanted == 0:
            break
    return np.flatnonzero(taken[group_of])


def _mixed(values: Keys, seed: int) -> Keys:
    """Mix 64-bit numbers with a seed: the finalizer of SplitMix64, one-to-one, every bit depends on every other."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = values ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
