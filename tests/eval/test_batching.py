"""Batches of concurrent images: one that fails is alone, and none waits for ever."""

import asyncio

import numpy as np
import pytest
import torch

from ssl_pretrain.eval.serving.batching import Batcher


def embed(images):
    """Return the sum of each image, and fail for a batch with a negative one."""
    if any(image.min() < 0 for image in images):
        raise RuntimeError("a negative image")
    return np.array([[image.sum().item()] for image in images])


async def embed_together(function, *values, max_batch=4):
    """Embed constant images in one batch and return the vectors or errors."""
    batcher = Batcher(function, max_batch, 1.0)
    batcher.num_announced = 1  # so that a batch waits for the others
    batcher.start()
    images = [torch.full((2,), float(value)) for value in values]
    try:
        async with asyncio.timeout(20):
            return await asyncio.gather(*map(batcher.embed, images), return_exceptions=True)
    finally:
        await batcher.stop()


def test_an_image_that_fails_does_not_fail_those_of_its_batch():
    first, second, third = asyncio.run(embed_together(embed, 1, -1, 3))
    assert (first.tolist(), third.tolist()) == ([2.0], [6.0])
    assert isinstance(second, RuntimeError) and str(second) == "a negative image"


def test_a_network_that_returns_too_few_rows_is_an_error_and_not_a_wait():
    outcomes = asyncio.run(embed_together(lambda images: np.zeros((0, 1)), 1, 2))
    assert [str(error) for error in outcomes] == ["embed returns one row per image"] * 2


@pytest.mark.parametrize("num_announced", [0, 1])
def test_images_that_wait_at_the_end_are_cancelled(num_announced):
    async def stop_early():
        batcher = Batcher(embed, 4, 60.0)
        batcher.num_announced = num_announced  # with one, a batch waits for it
        if num_announced:
            batcher.start()
        waiting = [asyncio.ensure_future(batcher.embed(torch.ones(2))) for _ in range(3)]
        await asyncio.sleep(0.05)
        await batcher.stop()
        async with asyncio.timeout(20):
            return await asyncio.gather(*waiting, return_exceptions=True)

    outcomes = asyncio.run(stop_early())
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 3
