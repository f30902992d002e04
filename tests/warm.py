"""Preload the modules and compiled code that take half of a small run's CPU time.

fork_server.py makes the fork server import this module, so that forked ranks inherit them.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import rng

torch.set_num_threads(1)  # a pool of threads would not survive the fork
rng.derive_seed(0, 0, 0)  # loads numba's code
with torch.device("meta"), FlopCounterMode(display=False):  # loads torch's decompositions
    nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))(torch.empty(2, 3, 8, 8))
