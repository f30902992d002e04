"""Counter-based random numbers: every draw is a pure function of what it is for.

A draw is named by (seed, epoch, index, view, purpose, lane); hashing that tuple gives its
64 bits, so nothing is carried from one draw to the next. Order, batch size, rank, worker
and resume step change nothing. The hash absorbs the tuple's parts one after another, each
with the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014, doi:10.1145/2660193.2660195):
integer arithmetic only, so the bits are the same on every machine.

The hash and the numbers of `Purpose` are a contract: a change gives resumed runs other views.
"""

from enum import IntEnum

import numpy as np

from ssl_pretrain.system.jit import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)
ULP = 2.0**-53  # the top 53 of 64 bits are all that a double in [0, 1) holds


class Purpose(IntEnum):
    """What a draw is for. Append only: a number that moves changes every run."""

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


@njit(cache=True, nogil=True)
def _absorb(state, part):
    mixed = (state ^ np.uint64(part)) + GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * FIRST_MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND_MULTIPLIER
    return mixed ^ (mixed >> np.uint64(31))


@njit(cache=True, nogil=True)
def bits_at(seed, epoch, index, view, purpose, lane):
    """64 hashed bits of one draw, for use inside other jitted functions (every argument an integer)."""
    state = _absorb(np.uint64(0), seed)
    state = _absorb(state, epoch)
    state = _absorb(state, index)
    state = _absorb(state, view)
    state = _absorb(state, purpose)
    return _absorb(state, lane)


@njit(cache=True, nogil=True)
def uniform_at(seed, epoch, index, view, purpose, lane):
    """One draw in [0, 1), for use inside other jitted functions: `uniform(...)[i, lane]` bit for bit."""
    return np.float64(bits_at(seed, epoch, index, view, purpose, lane) >> np.uint64(11)) * ULP


@njit(cache=True, nogil=True)
def _fill(seed, epoch, indices, view, purpose, out):
    for row in range(out.shape[0]):
        for lane in range(out.shape[1]):
            out[row, lane] = uniform_at(seed, epoch, indices[row], view, purpose, lane)


@njit(cache=True, nogil=True)
def _fill_bits(seed, epoch, purpose, out):
    for index in range(out.shape[0]):
        out[index] = bits_at(seed, epoch, index, 0, purpose, 0)


def uniform(
    seed: int, epoch: int, indices: np.ndarray | int, view: int, purpose: Purpose, count: int
) -> np.ndarray:
    """Independent uniform draws in [0, 1): float64 (len(indices), count), (1, count) for a single index.

    Row i depends on `indices[i]` alone, never on the other indices; column `lane` does not
    depend on `count`, so a purpose can grow a draw without changing its earlier ones.

    Args:
        seed: of the run, in [0, 2**63).
        epoch: passes over the data before this one.
        indices: of the samples in the data set, (n,) integers.
        view: number of the view, as `views.recipe.expand_counts` orders them.
        purpose: what the numbers decide.
        count: draws per index.
    """
    rows = np.atleast_1d(np.asarray(indices, dtype=np.int64))
    out = np.empty((len(rows), count))
    _fill(seed, epoch, rows, view, int(purpose), out)
    return out


def permutation(seed: int, epoch: int, n: int, purpose: Purpose = Purpose.ORDER) -> np.ndarray:
    """A random order of range(n), another one each epoch: int64 (n,).

    The sorting order of hashed keys; stable, so even equal keys have one order on every
    machine, which numpy's own generators do not promise between versions.
    """
    keys = np.empty(n, dtype=np.uint64)
    _fill_bits(seed, epoch, int(purpose), keys)
    return np.argsort(keys, kind="stable")


def seed_of(seed: int, step: int, part: int) -> int:
    """A seed for `torch.manual_seed`, in [0, 2**63): dropout and drop path of one part of one step's global batch.

    It names the part and not the rank, so that K parts on one rank drop what K ranks drop.
    """
    return int(bits_at(seed, step, part, 0, int(Purpose.DROPOUT), 0)) >> 1
