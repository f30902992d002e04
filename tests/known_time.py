"""A step time that tests of the suggestion know, so that they need not wait for real steps."""

import torch

from ssl_pretrain.planning import step_time
from ssl_pretrain.views.batch import Batch


def fix_step_time(seconds, monkeypatch):
    """Set the seconds per image of every network. Reading takes no time."""
    reading = step_time.Reading(Batch([], torch.zeros(0), torch.zeros(0)))
    monkeypatch.setattr(step_time, "measure_reading", lambda config, source: reading)
    monkeypatch.setattr(step_time, "measure_step", lambda config, batch: seconds)
