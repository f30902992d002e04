"""Report how long compilation took and how many graphs came from the compiler's cache.

Functions import torch's compiler when they are called, because loading it takes seconds.
"""

import sys
import time
from dataclasses import dataclass

from ssl_pretrain.distributed import process_group


@dataclass
class _Compilation:
    """Time that this process has spent on compilation."""

    is_observed: bool = False
    start_time: float = 0.0
    seconds: float = 0.0
    reported_seconds: float = 0.0


_compilation = _Compilation()


def observe() -> None:
    """Start measuring compilation time, from zero."""
    from torch._dynamo import callback

    if not _compilation.is_observed:
        callback.on_compile_start(_start_clock)
        callback.on_compile_end(_stop_clock)
    _compilation.is_observed = True
    _compilation.seconds = _compilation.reported_seconds = 0.0
    _reset_counters()


def measure() -> dict[str, float]:
    """Return the seconds spent on compilation so far, as a metric, if they have increased.

    Rank 0 prints a line after the first compilations.
    """
    seconds, reported_seconds = _compilation.seconds, _compilation.reported_seconds
    if seconds == reported_seconds:
        return {}
    if not reported_seconds:
        process_group.print_once(_describe_counters(seconds), file=sys.stderr)
    _compilation.reported_seconds = seconds
    return {"compile_seconds": seconds}


def describe(
    seconds: float, num_graphs: int, num_cached: int, cache: str, is_default_cache: bool
) -> str:
    """Describe compilations in one line, with a remedy if the cache may be lost.

    Args:
        seconds: Time spent on compilation.
        num_graphs: Graphs that were compiled or loaded. A trained part has two, for forward and
            backward pass.
        num_cached: Graphs that were loaded from the cache.
        cache: Folder of the cache.
        is_default_cache: True if the folder is the temporary one that torch chooses by default.
    """
    share = {0: "none", num_graphs: "all"}.get(num_cached, str(num_cached))
    text = f"compilation: {seconds:.0f} s for {num_graphs} graphs, {share} of them from {cache}"
    if num_cached == num_graphs or not is_default_cache:
        return text
    return (
        f"{text}; set TORCHINDUCTOR_CACHE_DIR to a folder that later jobs can read, to save this "
        "time"
    )


def _describe_counters(seconds: float) -> str:
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    inductor = counters["inductor"]
    num_cached = inductor["fxgraph_cache_hit"]
    num_compiled = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
    num_graphs, is_default_cache = num_cached + num_compiled, cache_dir() == default_cache_dir()
    return describe(seconds, num_graphs, num_cached, cache_dir(), is_default_cache)


def _reset_counters() -> None:
    from torch._dynamo.utils import counters

    for name in ("hit", "miss", "bypass"):
        counters["inductor"].pop(f"fxgraph_cache_{name}", None)


def _start_clock(*_: object) -> None:
    _compilation.start_time = time.monotonic()


def _stop_clock(*_: object) -> None:
    _compilation.seconds += time.monotonic() - _compilation.start_time
