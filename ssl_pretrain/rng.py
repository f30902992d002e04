"""Counter-based random numbers, each a pure function of its purpose and position.

A number is identified by (seed, epoch, index, view, purpose, lane). The lane is the position of the
number among those with the same purpose. The hash of this tuple gives its 64 bits. No state is
carried from one number to the next, so batch size, ranks, workers and resumed runs do not change
the numbers. The hash absorbs the elements of the tuple one after another, each with the finalizer
of splitmix64 (Steele, Lea, Flood, OOPSLA 2014, doi:10.1145/2660193.2660195). It uses integer
arithmetic only, so the bits are the same on every machine.

The hash and the values of `Purpose` must never change, or resumed runs would get other views.
"""

from enum import IntEnum

import numpy as np

from ssl_pretrain.system.jit import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)
ULP = 2.0**-53  # spacing of the uniform numbers, which use the top 53 of 64 bits


class Purpose(IntEnum):
    """Uses of random numbers. Only append to this list, because runs depend on the values."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    JITTER = 3
    JITTER_ORDER = 4
    GRAYSCALE = 5
    BLUR = 6
    SOLARIZE = 7
    DROPOUT = 8
    SUBSET = 9
    SPLIT = 10
    BN_SHUFFLE = 11
    REPLACEMENT = 12
    BLOCK_ORDER = 13
    CORRUPTION = 14
    MASK_PATCHES = 15
    MASK_BLOCKS = 16
    MASK_SIZES = 17
    MASK_ORDER = 18
    SLICES = 19
    CAPTION = 20
    COMPOSITES = 21


@njit(cache=True, nogil=True)
def _absorb(state, element):
    mixed = (state ^ np.uint64(element)) + GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * FIRST_MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND_MULTIPLIER
    return mixed ^ (mixed >> np.uint64(31))


@njit(cache=True, nogil=True)
def bits_at(seed, epoch, index, view, purpose, lane):
    """Return 64 random bits, for use in jitted functions. All arguments are integers."""
    state = _absorb(np.uint64(0), seed)
    state = _absorb(state, epoch)
    state = _absorb(state, index)
    state = _absorb(state, view)
    state = _absorb(state, purpose)
    return _absorb(state, lane)


@njit(cache=True, nogil=True)
def uniform_at(seed, epoch, index, view, purpose, lane):
    """Return column `lane` of `uniform` for one index, for use in jitted functions."""
    return np.float64(bits_at(seed, epoch, index, view, purpose, lane) >> np.uint64(11)) * ULP


@njit(cache=True, nogil=True)
def _fill_uniform(seed, epoch, indices, view, purpose, out):
    for row in range(out.shape[0]):
        for lane in range(out.shape[1]):
            out[row, lane] = uniform_at(seed, epoch, indices[row], view, purpose, lane)


@njit(cache=True, nogil=True)
def _fill_bits(seed, epoch, purpose, out):
    for index in range(out.shape[0]):
        out[index] = bits_at(seed, epoch, index, 0, purpose, 0)


def uniform(
    seed: int, epoch: int, indices: np.ndarray | int, view: int, purpose: Purpose, num_values: int
) -> np.ndarray:
    """Return independent uniform numbers in [0, 1).

    Row i depends on `indices[i]` but not on the other indices. A column does not depend on
    `num_values`, so a purpose can use more numbers without changing its earlier ones.

    Args:
        seed: Seed of the run, in [0, 2**63).
        epoch: Number of completed passes over the data.
        indices: Indices of images in the data set, int64 of shape (n,), or a single index.
        view: Index of the view in the order of `views.recipe.crop_per_view`.
        purpose: Purpose of the numbers.
        num_values: Number of values per index.

    Returns:
        float64 array of shape (n, num_values). A single index gives (1, num_values).
    """
    rows = np.atleast_1d(np.asarray(indices, dtype=np.int64))
    out = np.empty((len(rows), num_values))
    _fill_uniform(seed, epoch, rows, view, int(purpose), out)
    return out


def permutation(seed: int, epoch: int, length: int, purpose: Purpose = Purpose.ORDER) -> np.ndarray:
    """Return a random order of range(length), as int64, that differs between epochs.

    The order comes from a stable sort of hashed keys, so it is the same on every machine and with
    every version of numpy. The permutations of numpy's generators may change between versions.
    """
    keys = np.empty(length, dtype=np.uint64)
    _fill_bits(seed, epoch, int(purpose), keys)
    return np.argsort(keys, kind="stable")


def derive_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the seed of one micro-batch for `torch.manual_seed`, in [0, 2**63).

    It depends on the position of the micro-batch in the global batch and not on the rank. Dropout
    with K micro-batches on one rank therefore drops the same activations as on K ranks.
    """
    return int(bits_at(seed, step, micro_batch, 0, int(Purpose.DROPOUT), 0)) >> 1
