"""Draw the random numbers of the next batch while the trainer uses the current one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Request = TypeVar("Request")
Draws = TypeVar("Draws")

# Types of devices. On a CPU the thread would take its time from the network's computation.
THREADED_DEVICES = ("cuda",)


def draw_ahead(
    draw: Callable[[Request], Draws], requests: Iterable[Request], device: torch.device
) -> Iterator[tuple[Request, Draws]]:
    """Yield each request with its draws.

    On a GPU, a thread draws for the next request while the caller uses the current draws. The draws
    only depend on their request, so they are the same with and without the thread. An error is
    raised when its request is due.

    Args:
        draw: Function of a request. It must not depend on earlier calls.
        requests: The requests, which may be endless. One is taken ahead.
        device: Device of the batches.
    """
    if device.type not in THREADED_DEVICES:
        yield from ((request, draw(request)) for request in requests)
        return
    previous: tuple[Request, Future[Draws]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="draw_ahead") as executor:
        for request in requests:
            future = executor.submit(draw, request)
            if previous is not None:
                yield previous[0], previous[1].result()
            previous = request, future
        if previous is not None:
            yield previous[0], previous[1].result()
