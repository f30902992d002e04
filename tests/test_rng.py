"""Random numbers have fixed values, depend only on their identifier, and are uniform."""

import numpy as np
import pytest
from numba import njit
from scipy import stats

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose

pytestmark = pytest.mark.promise

INDICES = np.arange(2000)
# Probability that correct numbers fail a test. The seeds are fixed, so a test that has passed
# always passes.
CHANCE = 1e-4


def slow_bits(*elements: int) -> int:
    """Return the hash in Python's unbounded integers, with the paper's constants."""
    state = 0
    for element in elements:
        state = ((state ^ element) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


@pytest.mark.parametrize(
    ("identifier", "bits", "uniform"),
    [
        ((0, 0, 0, 0, 0, 0), 0xCBD37AD29B93B094, 0.7961956752947816),
        ((1, 0, 0, 0, 1, 0), 0xFA8656F77FCFA66B, 0.9786123613592381),
        ((7, 3, 1281166, 9, 1, 39), 0x870A86F4B8E9A3B5, 0.527504381891879),
        ((2**63 - 1, 299, 5, 1, 6, 1), 0x509874FAB4A9657C, 0.31482630844826565),
    ],
)
def test_the_hash_does_not_change(identifier, bits, uniform):
    seed, epoch, index, view, purpose, lane = identifier
    assert slow_bits(*identifier) == bits
    assert int(rng.bits_at(*identifier)) == bits
    numbers = rng.uniform(seed, epoch, index, view, Purpose(purpose), lane + 1)
    assert numbers[0, lane] == uniform == (bits >> 11) / 2**53


def test_the_first_element_is_hashed_as_in_splitmix64():
    assert slow_bits(0) == 0xE220A8397B1DCDAF  # the published first output for state 0


def test_orders_and_seeds_do_not_change():
    assert rng.permutation(0, 0, 10).tolist() == [8, 7, 3, 5, 6, 2, 9, 4, 0, 1]
    assert rng.permutation(0, 1, 10).tolist() == [3, 1, 8, 4, 0, 9, 7, 5, 6, 2]
    assert rng.permutation(5, 0, 10, Purpose.SUBSET).tolist() == [2, 0, 5, 3, 1, 7, 8, 9, 6, 4]
    assert rng.derive_seed(0, 0, 0) == 2992097026366946029
    assert rng.derive_seed(3, 1000, 2) == 4919521272697531113


def test_the_purposes_keep_their_numbers():
    names = ["ORDER", "CROP", "FLIP", "JITTER", "JITTER_ORDER", "GRAYSCALE", "BLUR", "SOLARIZE"]
    names += ["DROPOUT", "SUBSET", "SPLIT", "BN_SHUFFLE", "REPLACEMENT"]
    assert [purpose.name for purpose in Purpose][: len(names)] == names
    assert [purpose.value for purpose in Purpose] == list(range(len(Purpose)))


def test_a_number_depends_only_on_its_identifier():
    def draw(indices, num_lanes=4):
        return rng.uniform(3, 5, indices, 1, Purpose.CROP, num_lanes)

    expected = draw(INDICES)
    shuffled = np.random.default_rng(0).permutation(INDICES)
    np.testing.assert_array_equal(draw(shuffled), expected[shuffled])
    np.testing.assert_array_equal(draw(INDICES[700:703]), expected[700:703])
    np.testing.assert_array_equal(draw(42), expected[42:43])
    np.testing.assert_array_equal(draw(INDICES, num_lanes=9)[:, :4], expected)
    np.testing.assert_array_equal(draw(INDICES.astype(np.int32)), expected)


@pytest.mark.parametrize(
    "other",
    [
        (4, 5, 1, Purpose.CROP),
        (3, 6, 1, Purpose.CROP),
        (3, 5, 2, Purpose.CROP),
        (3, 5, 1, Purpose.FLIP),
    ],
)
def test_every_element_of_the_identifier_changes_the_numbers(other):
    a = rng.uniform(3, 5, INDICES, 1, Purpose.CROP, 4)
    b = rng.uniform(*other[:2], INDICES, *other[2:], 4)
    assert not np.any(a == b)
    correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert abs(correlation) < 0.04  # 3.6 standard deviations of 8,000 independent pairs


def test_swapped_elements_give_different_numbers():
    identifiers = np.eye(5, dtype=int).tolist()
    numbers = {
        rng.uniform(*elements[:4], Purpose(elements[4]), 1)[0, 0] for elements in identifiers
    }
    assert len(numbers) == 5


def test_numbers_are_uniform_and_independent():
    numbers = rng.uniform(0, 0, np.arange(20000), 0, Purpose.JITTER, 5)
    assert numbers.shape == (20000, 5)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > CHANCE
    between_lanes = np.corrcoef(numbers.T) - np.eye(5)
    between_neighbors = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    largest = max(np.abs(between_lanes).max(), abs(between_neighbors))
    assert largest < 0.025  # 3.5 standard deviations


def test_epochs_are_independent_for_one_image():
    epochs = range(2000)
    numbers = np.array([rng.uniform(0, epoch, 17, 0, Purpose.CROP, 1)[0, 0] for epoch in epochs])
    assert stats.kstest(numbers, "uniform").pvalue > CHANCE
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.08


def test_jitted_code_gets_the_same_numbers():
    @njit
    def draw_jitted(seed, index, lane):
        return rng.uniform_at(seed, 2, index, 1, 5, lane)

    np.testing.assert_array_equal(
        [draw_jitted(9, 30, lane) for lane in range(4)],
        rng.uniform(9, 2, 30, 1, Purpose.GRAYSCALE, 4)[0],
    )


@pytest.mark.parametrize("n", [0, 1, 2, 1797])
def test_a_permutation_has_every_index_once(n):
    order = rng.permutation(0, 0, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_permutations_differ_by_seed_epoch_and_purpose():
    orders = [rng.permutation(seed, epoch, 1000) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    orders.append(rng.permutation(0, 0, 1000, Purpose.SUBSET))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.01  # by chance, one index in a thousand keeps its place


def test_every_order_of_three_is_equally_frequent():
    orders = [tuple(rng.permutation(seed, 0, 3)) for seed in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > CHANCE


def test_seeds_differ_by_step_and_micro_batch_and_are_valid_in_torch():
    seeds = [
        rng.derive_seed(seed, step, micro_batch)
        for seed in range(3)
        for step in range(50)
        for micro_batch in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
