import math

import pytest

from ssl_pretrain.optim import schedules


def test_warmup_cosine_reaches_the_given_values():
    def rate(progress):
        return schedules.warmup_and_decline(
            progress, warmup_fraction=0.1, start=0.5, peak=2.0, final=0.2
        )

    assert rate(0.0) == 0.5
    assert rate(0.05) == pytest.approx(1.25)
    assert rate(0.1) == pytest.approx(2.0)
    assert rate(0.55) == pytest.approx(1.1)  # the middle of the cosine
    assert rate(1.0) == pytest.approx(0.2)


def test_warmup_cosine_without_warmup_is_half_a_cosine():
    expected = (1 + math.cos(math.pi / 4)) / 2
    assert schedules.warmup_and_decline(0.25, warmup_fraction=0.0) == pytest.approx(expected)


def test_linear_stays_at_its_final_value():
    fractions = (0.0, 0.25, 0.5, 1.0)
    values = [schedules.linear(x, start=0.04, final=0.07, final_position=0.5) for x in fractions]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
