"""The rules that raise an alert."""

import math

import pytest

from ssl_pretrain.monitoring.collapse_alerts import RULES, AlertHistory


def raise_alerts(metric, values, **other_metrics):
    """Return the index and title of each alert raised by measurements that are 50 steps apart."""
    history = AlertHistory([])
    return [
        (index, alert.title)
        for index, value in enumerate(values)
        for alert in history.update(50 * index, {metric: value, **other_metrics})
    ]


@pytest.mark.parametrize("rule", RULES, ids=[rule.title for rule in RULES])
def test_an_alert_is_raised_once_after_two_low_values_in_a_row(rule):
    good, bad = 1.5 * rule.low_threshold / rule.drop_fraction, 0.8 * rule.low_threshold
    assert raise_alerts(rule.metric, [good, bad, bad, bad, bad]) == [(2, rule.title)]
    assert raise_alerts(rule.metric, [good, bad, good, bad, good]) == []
    assert raise_alerts(rule.metric, [good, math.nan, math.nan, math.nan]) == []
    values = [good, bad, bad, good, bad, bad]
    assert raise_alerts(rule.metric, values) == [(2, rule.title), (5, rule.title)]


@pytest.mark.parametrize("rule", RULES, ids=[rule.title for rule in RULES])
def test_one_severe_value_is_enough(rule):
    good = 1.5 * rule.low_threshold / rule.drop_fraction
    assert raise_alerts(rule.metric, [good, good * 1e-3]) == [(1, rule.title)]


@pytest.mark.parametrize("rule", RULES, ids=[rule.title for rule in RULES])
def test_no_guarded_alert_is_raised_while_views_match(rule):
    good, bad = 1.5 * rule.low_threshold / rule.drop_fraction, 0.8 * rule.low_threshold
    values = [good, bad, bad]
    assert bool(raise_alerts(rule.metric, values, positive_chance=0.4)) is not rule.is_guarded
    assert raise_alerts(rule.metric, values, positive_chance=0.9) == [(2, rule.title)]


def test_a_run_may_begin_in_a_bad_state_for_a_limited_time():
    assert raise_alerts("embedding_std", [0.05] * 15 + [0.1, 0.3, 0.8, 0.9]) == []
    assert raise_alerts("embedding_std", [0.05] * 40) == [(20, "collapse")]  # step 1,000


def test_a_collapse_to_a_point_raises_the_alert_of_methods_that_aim_at_a_normal_distribution():
    """The values are those of embeddings with a deviation of 1, and of 0.3, 0.2 and 0.1."""
    values = [0.997, 0.994, 0.294, 0.143, 0.038]
    assert raise_alerts("gaussianity", values, positive_chance=0.1) == [(3, "not Gaussian")]
    fresh_network = [0.463, 0.626, 0.872, 0.95, 0.96, 0.955]  # deviations of 0.4, 0.5, 0.7, ...
    assert raise_alerts("gaussianity", fresh_network, positive_chance=0.1) == []


def test_an_alert_names_the_metric_its_value_and_its_best_value():
    history = AlertHistory([{"step": 2, "embedding_std": 0.4}])
    (alert,) = history.update(4, {"embedding_std": 0.05})
    assert alert.text.startswith(
        "step 4: embedding_std is 0.05, its best was 0.4: the embeddings of different images have "
        "become similar. "
    )


def test_a_resumed_run_remembers_its_records():
    past_records = [
        {"step": 50, "embedding_std": 0.5},
        {"step": 100, "embedding_std": 0.4, "loss": 1.0},
    ]
    measurement = {"embedding_std": 0.15}
    assert AlertHistory(past_records).update(150, measurement) == []
    assert (
        len(AlertHistory([*past_records, {"step": 125, **measurement}]).update(150, measurement))
        == 1
    )
