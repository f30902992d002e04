"""The learning rate schedule of MAE's evaluations, written a second time."""

import math


def mae_lr(epoch, *, warmup_epochs, epochs, lr=1.0, min_lr=0.0):
    """Return the learning rate of util/lr_sched.py in facebookresearch/mae."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    angle = math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(angle))
