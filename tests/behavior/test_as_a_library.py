"""Training from a program: a script without a guard, a thread, an event loop, a notebook cell."""

import commands
import pytest

PREAMBLE = """
import torch
from ssl_pretrain import config, train

def train_run(name, workers):
    overrides = [f"output=FOLDER/{name}", f"data.num_workers={workers}"]
    run_config = config.load("FOLDER/config.yaml", overrides)
    print(name, "steps", train.train(run_config, torch.device("cpu")), flush=True)
"""


@pytest.fixture
def write_script(tmp_path):
    root = commands.write_class_folders(tmp_path / "images", "train")
    commands.write_config(tmp_path, root)

    def write_script(text: str):
        path = tmp_path / "program.py"
        path.write_text(PREAMBLE.replace("FOLDER", str(tmp_path)) + text)
        return path

    return write_script


@pytest.mark.full
def test_a_script_without_a_guard_trains_once(write_script):
    result = commands.run(
        write_script("print('imported', flush=True)\ntrain_run('unguarded', 2)\n")
    )
    assert (result.status, result.stdout.count("imported")) == (0, 1), result.text
    assert result.stdout.count("unguarded steps 2") == 1


@pytest.mark.full
def test_a_thread_and_an_event_loop_can_train(write_script):
    text = """
import asyncio, signal, threading

def train_or_print_error(name):
    try:
        train_run(name, 2)
    except ValueError as error:
        print("second thread:", error, flush=True)

async def main():
    train_run("coroutine", 0)
    await asyncio.to_thread(train_run, "executor", 2)

if __name__ == "__main__":
    handler = signal.getsignal(signal.SIGTERM)
    threads = [threading.Thread(target=train_or_print_error, args=("thread",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(main())
    assert signal.getsignal(signal.SIGTERM) is handler
"""
    result = commands.run(write_script(text))
    assert result.status == 0, result.text
    assert (
        "second thread: another thread of this process is training, and both would use"
        in result.stdout
    )
    for name in ("thread", "coroutine", "executor"):
        assert f"{name} steps 2" in result.stdout


@pytest.mark.full
def test_a_process_that_cannot_start_workers_is_told_the_remedies(write_script):
    text = """
import multiprocessing

def train_or_print_error(workers):
    try:
        train_run(f"pool{workers}", workers)
    except ValueError as error:
        print(error, flush=True)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.map(train_or_print_error, [2, 0])
"""
    result = commands.run(write_script(text))
    assert result.status == 0 and "pool0 steps 2" in result.stdout, result.text
    assert (
        "data.num_workers: 2 workers cannot be started by a daemonic process, such as a worker of "
        "multiprocessing.Pool; "
        "set data.num_workers=0, or train in a concurrent.futures.ProcessPoolExecutor\n"
    ) in result.stdout


@pytest.mark.full
def test_a_notebook_cell_can_train(write_script):
    """The main module of a notebook kernel has no file or spec, and its event loop is running."""
    path = write_script(
        "async def cell():\n    train_run('cell', 2)\nimport asyncio\nasyncio.run(cell())\n"
    )
    result = commands.run("-c", path.read_text())
    assert result.status == 0 and "cell steps 2" in result.stdout, result.text


@pytest.mark.full
def test_a_transform_defined_in_the_script_needs_a_guard_and_the_error_says_so(
    write_script, tmp_path
):
    """Workers import the script to get the transform."""
    text = """
from ssl_pretrain.data import readers, sources

class HalfSize:
    def __call__(self, image):
        return image[:, ::2, ::2].contiguous()

source = sources.open_source(sources.DataConfig(source="digits"), "val")
GUARD
    batches = readers.read_images(source, range(5), HalfSize(), 4, 2)
    print([tuple(pixels.shape) for pixels, labels in batches])
"""
    guarded_script = write_script(text.replace("GUARD", 'if __name__ == "__main__":'))
    result = commands.run(guarded_script)
    assert result.status == 0 and result.stdout == "[(4, 3, 4, 4), (1, 3, 4, 4)]\n", result.text
    result = commands.run(write_script(text.replace("GUARD", "if True:")))
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == (
        f"ValueError: data.num_workers: each worker process imports "
        f"{tmp_path / 'program.py'}, which starts training when it is "
        'imported; put the call that starts training below `if __name__ == "__main__":`, or set '
        "data.num_workers=0"
    )
