"""Run the product's commands as a user would type them, on runs that take seconds."""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

# All other keys have their default values.
CONFIG = """
method: {name: simclr, temperature: 0.2, projector_dims: [16, 8]}
backbone: {name: test_resnet, stem: no_pool}
data: {source: folder, num_workers: 0}
views: {crops: {global: {count: 2, size: 16, scale: [0.3, 1.0]}}}
optim: {name: lars, base_lr: 4.0, warmup_epochs: 0}
parallel: {threads: 1}
log: {every_steps: 1, wandb: "off"}
online: {knn_every_epochs: 0}
evaluation: {crop_ratio: 1.0, k: 3}
global_batch_size: 8
epochs: 1
"""


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


def make_noise_image(seed: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    """Return an image of color noise, seeded with `seed`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, names: list[str], first_number: int = 0) -> Path:
    """Write one small image per name, such as `train/cat/1.png`, below the folder."""
    for number, name in enumerate(names, first_number):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_noise_image(number).save(path)
    return folder


def write_class_folders(
    folder: Path, split: str, num_classes: int = 2, images_per_class: int = 8, first_number: int = 0
) -> Path:
    """Write `<split>/class_<c>/<n>.png`, the layout of torchvision's ImageFolder."""
    names = [
        f"{split}/class_{c}/{n}.png" for c in range(num_classes) for n in range(images_per_class)
    ]
    return write_images(folder, names, first_number)


def write_config(folder: Path, root: Path, text: str = CONFIG) -> Path:
    """Write the configuration with its `data.root` and an `output` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = text.replace("data: {", f"data: {{root: {root}, cache_dir: {folder / 'cache'}, ")
    path = folder / "config.yaml"
    path.write_text(f"{text}output: {folder / 'run'}\n")
    return path


def start(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` in a new process group, with the checkout on the path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_restore_sighup,
    )


def _restore_sighup() -> None:
    """Undo nohup, under which a child would ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> CommandResult:
    """Wait for a started command, and kill it with its children after the timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}") from None
    return CommandResult(process.returncode, out, err)


def run(
    *arguments: str | Path, timeout: float = 120, cwd: Path = ROOT, **environment: str
) -> CommandResult:
    """Run `python ARGUMENTS` to its end, for example `run("-m", "ssl_pretrain.train", config)`."""
    return finish(start(*arguments, cwd=cwd, **environment), timeout)


def run_modules(commands: list[list[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Run `python -m MODULE ARGUMENTS` for each list, and return each status, stdout and stderr.

    All commands run in one process, forked from one that has imported everything. This saves
    seconds per command.
    """
    context = multiprocessing.get_context("forkserver")  # preloaded by conftest.py
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_modules, args=(commands, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"still running after {timeout} s: {commands}"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def _run_modules(commands: list[list[str]], sender: Connection) -> None:
    os.chdir(ROOT)
    # The modules have already been imported, about which runpy warns.
    warnings.filterwarnings(
        "ignore", ".* found in sys.modules after import of package", RuntimeWarning
    )
    results = []
    for command in commands:
        sys.argv, out, err, status = command, io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(command[0], run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            except BaseException:  # a new interpreter would print this and end with status 1
                traceback.print_exc()
                status = 1
        results.append((status, out.getvalue(), err.getvalue()))
    sender.send(results)
