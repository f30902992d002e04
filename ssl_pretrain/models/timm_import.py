"""timm without wandb.

timm loads wandb, where it is installed, for one function of its own training script. That takes
longer than torch itself, in every command and on every rank, none of which uses it: records are
sent by a process of their own (wandb_process.py). So wandb is hidden while timm is imported, and
that function finds it when it is called.
"""

import importlib
import sys
from typing import Any


class _Wandb:
    """Stands for the module wandb, which is loaded when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("wandb"), name)


def _import() -> Any:
    if "timm" in sys.modules or "wandb" in sys.modules:
        return importlib.import_module("timm")
    sys.modules["wandb"] = None  # type: ignore[assignment]  # `import wandb` raises ImportError
    try:
        module = importlib.import_module("timm")
    finally:
        del sys.modules["wandb"]
    vars(importlib.import_module("timm.utils.summary"))["wandb"] = _Wandb()
    return module


timm = _import()
