"""torch's settings for speed and memory on CUDA."""

import os
import platform

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # new and old name


def apply(device: torch.device, deterministic: bool) -> None:
    """Select a CUDA device and choose the settings that suit training on it.

    Args:
        device: CUDA device of this rank.
        deterministic: Keep algorithms that are the same in every run.
    """
    use_expandable_segments()
    torch.cuda.set_device(device)
    # Shapes never change, so the search for the fastest algorithm pays off within an epoch.
    torch.backends.cudnn.benchmark = not deterministic


def use_expandable_segments() -> None:
    """Let the allocator grow its segments, so that views of several sizes do not fragment memory.

    Nothing changes if the user has configured the allocator, or if CUDA is in use already. The
    allocator reads the variable when CUDA is initialized. Only Linux has such segments, and the
    Windows subsystem for Linux lacks the driver calls.
    """
    is_configured = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    is_supported = platform.system() == "Linux" and "microsoft" not in platform.release().lower()
    if is_supported and not is_configured and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
