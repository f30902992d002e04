import numpy as np
import pytest
from numba import njit
from scipy import stats

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose

pytestmark = pytest.mark.promise

INDICES = np.arange(2000)
CHANCE = 1e-4  # how often right draws would fail a test: small, as there are many; the seeds are fixed, so a pass stays one


def slow_bits(*parts: int) -> int:
    """The hash in Python's unbounded integers, from the paper's constants."""
    state = 0
    for part in parts:
        state = ((state ^ part) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


# A change of any of these numbers gives every resumed run other views or another order.


@pytest.mark.parametrize(
    ("name", "bits", "uniform"),
    [
        ((0, 0, 0, 0, 0, 0), 0xCBD37AD29B93B094, 0.7961956752947816),
        ((1, 0, 0, 0, 1, 0), 0xFA8656F77FCFA66B, 0.9786123613592381),
        ((7, 3, 1281166, 9, 1, 39), 0x870A86F4B8E9A3B5, 0.527504381891879),
        ((2**63 - 1, 299, 5, 1, 6, 1), 0x509874FAB4A9657C, 0.31482630844826565),
    ],
)
def test_the_hash_is_kept(name, bits, uniform):
    seed, epoch, index, view, purpose, lane = name
    assert slow_bits(*name) == bits
    assert int(rng.bits_at(*name)) == bits
    assert (
        rng.uniform(seed, epoch, index, view, Purpose(purpose), lane + 1)[0, lane]
        == uniform
        == (bits >> 11) / 2**53
    )


def test_the_first_part_is_splitmix64():
    assert slow_bits(0) == 0xE220A8397B1DCDAF  # its published first output for the state 0


def test_the_order_and_the_seeds_are_kept():
    assert rng.permutation(0, 0, 10).tolist() == [8, 7, 3, 5, 6, 2, 9, 4, 0, 1]
    assert rng.permutation(0, 1, 10).tolist() == [3, 1, 8, 4, 0, 9, 7, 5, 6, 2]
    assert rng.permutation(5, 0, 10, Purpose.SUBSET).tolist() == [2, 0, 5, 3, 1, 7, 8, 9, 6, 4]
    assert rng.seed_of(0, 0, 0) == 2992097026366946029
    assert rng.seed_of(3, 1000, 2) == 4919521272697531113


def test_the_purposes_keep_their_numbers():
    first = [
        "ORDER",
        "CROP",
        "FLIP",
        "JITTER",
        "JITTER_ORDER",
        "GRAYSCALE",
        "BLUR",
        "SOLARIZE",
        "DROPOUT",
        "SUBSET",
    ]
    first += ["SPLIT", "BN_SHUFFLE", "REPLACEMENT"]
    assert [purpose.name for purpose in Purpose][: len(first)] == first
    assert [purpose.value for purpose in Purpose] == list(range(len(Purpose)))


def test_a_draw_depends_on_nothing_but_its_name():
    whole = rng.uniform(3, 5, INDICES, 1, Purpose.CROP, 4)
    shuffled = np.random.default_rng(0).permutation(INDICES)
    np.testing.assert_array_equal(rng.uniform(3, 5, shuffled, 1, Purpose.CROP, 4), whole[shuffled])
    np.testing.assert_array_equal(
        rng.uniform(3, 5, INDICES[700:703], 1, Purpose.CROP, 4), whole[700:703]
    )
    np.testing.assert_array_equal(rng.uniform(3, 5, 42, 1, Purpose.CROP, 4), whole[42:43])
    np.testing.assert_array_equal(rng.uniform(3, 5, INDICES, 1, Purpose.CROP, 9)[:, :4], whole)
    np.testing.assert_array_equal(
        rng.uniform(3, 5, INDICES.astype(np.int32), 1, Purpose.CROP, 4), whole
    )


@pytest.mark.parametrize(
    "other",
    [
        (4, 5, 1, Purpose.CROP),
        (3, 6, 1, Purpose.CROP),
        (3, 5, 2, Purpose.CROP),
        (3, 5, 1, Purpose.FLIP),
    ],
)
def test_every_part_of_the_name_counts(other):
    a = rng.uniform(3, 5, INDICES, 1, Purpose.CROP, 4)
    b = rng.uniform(*other[:2], INDICES, *other[2:], 4)
    assert not np.any(a == b)
    assert (
        abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.04
    )  # 3.6 standard deviations of 8,000 independent pairs


def test_swapped_parts_are_other_draws():
    assert (
        len(
            {
                rng.uniform(*name[:3], name[3], Purpose(name[4]), 1)[0, 0]
                for name in np.eye(5, dtype=int).tolist()
            }
        )
        == 5
    )


def test_draws_are_uniform_and_independent():
    drawn = rng.uniform(0, 0, np.arange(20000), 0, Purpose.JITTER, 5)
    assert drawn.shape == (20000, 5)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > CHANCE
    between_lanes = np.corrcoef(drawn.T) - np.eye(5)
    between_neighbours = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]
    assert (
        max(np.abs(between_lanes).max(), abs(between_neighbours)) < 0.025
    )  # 3.5 standard deviations


def test_epochs_are_independent_for_one_image():
    drawn = np.array([rng.uniform(0, epoch, 17, 0, Purpose.CROP, 1)[0, 0] for epoch in range(2000)])
    assert stats.kstest(drawn, "uniform").pvalue > CHANCE
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.08


def test_jitted_code_draws_the_same():
    @njit
    def inside(seed, index, lane):
        return rng.uniform_at(seed, 2, index, 1, 5, lane)

    np.testing.assert_array_equal(
        [inside(9, 30, lane) for lane in range(4)],
        rng.uniform(9, 2, 30, 1, Purpose.GRAYSCALE, 4)[0],
    )


@pytest.mark.parametrize("n", [0, 1, 2, 1797])
def test_a_permutation_has_every_index_once(n):
    order = rng.permutation(0, 0, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_permutations_differ_by_seed_epoch_and_purpose():
    orders = [rng.permutation(*name, 1000) for name in [(0, 0), (0, 1), (1, 0)]] + [
        rng.permutation(0, 0, 1000, Purpose.SUBSET)
    ]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.01  # one fixed place in a thousand is what chance gives


def test_every_order_of_three_is_equally_frequent():
    orders = [tuple(rng.permutation(seed, 0, 3)) for seed in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > CHANCE


def test_seeds_differ_by_step_and_part_and_suit_torch():
    seeds = [
        rng.seed_of(seed, step, part)
        for seed in range(3)
        for step in range(50)
        for part in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
