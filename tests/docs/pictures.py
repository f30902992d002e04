"""Make every picture of README and docs with the present code: `make pictures`.

PYTHONPATH=.:tests/eval .venv/bin/python tests/docs/pictures.py [--list] [--train] [NAME ...]

The folder $SSL_PRETRAIN_DATA has cifar10.zip and imagenet_sample.zip.
Each picture comes from finished runs. Those of `runs/` are reused. A picture whose runs are missing
is not made, and the command that trains them is printed with its time. The exit status is then 1.
`--train` trains them first.
"""

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import browser_checks
from page_runs import serve
from PIL import Image

from ssl_pretrain.eval import compare
from ssl_pretrain.eval.html import live, run_list_server
from ssl_pretrain.eval.run_folders import RunFolders
from ssl_pretrain.fault_tolerance import failure_note
from ssl_pretrain.fault_tolerance.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")
DATA = Path(os.environ.get("SSL_PRETRAIN_DATA", ROOT.parent / "shared" / "data"))
RESULTS, PAGES = Path("docs/results"), Path("docs/results/pages")
HEIGHTS = {1400: 1000, 400: 900}  # height of the screenshots by their width
NUM_COLORS = 128  # colors of a screenshot, which keep it below 200 KB
ON_CIFAR10 = f"data.root={shlex.quote(str(DATA / 'cifar10.zip'))}"
LEARNING = f"launch/sweep.py learning output={RUNS}/learning {ON_CIFAR10} seed=0,1,2"
COLLAPSING = ("byol_without_predictor", "simsiam_without_stop_gradient", "vicreg_without_variance")
COMPARED_RUNS = tuple(f"{method}_{seed}" for seed in range(3) for method in ("simclr", "vicreg"))


@dataclass(frozen=True)
class Picture:
    """A picture, or several that one command makes.

    Attributes:
        paths: Files that are made.
        runs: Folders below `runs/` that must exist.
        training: Commands that train these runs, without the interpreter. None are needed for a
            picture without runs.
        training_time: Time of the training on two cores.
        command: Command that makes the pictures, without the interpreter.
        draw: Function that makes them instead.
    """

    paths: tuple[Path, ...]
    runs: tuple[str, ...]
    training: tuple[str, ...]
    training_time: str
    command: str = ""
    draw: Callable[[], None] | None = None


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="pictures to make (default: all)")
    parser.add_argument("--list", action="store_true", help="print the pictures and their runs")
    parser.add_argument("--train", action="store_true", help="train the runs that are missing")
    options = parser.parse_args()
    os.chdir(ROOT)
    pictures = build_list()
    if unknown := set(options.names) - pictures.keys():
        parser.error(
            f"{', '.join(sorted(unknown))}: no such picture; choose from {', '.join(pictures)}"
        )
    is_complete = True
    for name in options.names or pictures:
        picture = pictures[name]
        if options.list:
            source = ", ".join(picture.runs) or "data alone"
            print(f"{name}: {', '.join(map(str, picture.paths))} from {source}")
            continue
        missing = [run for run in picture.runs if not (RUNS / run).exists()]
        if missing and options.train:
            for command in picture.training:
                run(command)
        elif missing:
            commands = "; ".join(f"python {command}" for command in picture.training)
            print(
                f"{name}: not made, because {', '.join(missing)} is missing in {RUNS}. "
                f"Train it ({picture.training_time}): {commands}"
            )
            is_complete = False
            continue
        start = time.perf_counter()
        if picture.draw:
            picture.draw()
        else:
            run(picture.command)
        print(
            f"{name}: {', '.join(map(str, picture.paths))} in {time.perf_counter() - start:.0f} s"
        )
    return 0 if is_complete else 1


def build_list() -> dict[str, Picture]:
    """Return the pictures by name, in the order in which they are made."""
    demo = ("launch/demo.py",), "2 min"
    pictures = {
        "neighbors": Picture(
            (RESULTS / "neighbors.png",),
            ("demo",),
            *demo,
            command=f"tests/bench/neighbors.py {RUNS}/demo {RESULTS}/neighbors.png",
        ),
        "health": Picture(
            tuple(RESULTS / f"health/{name}.png" for name in COLLAPSING),
            ("health",),
            (f"tests/bench/collapse.py --cases {' '.join(COLLAPSING)} --output {RUNS}/health",),
            "10 min",
            command=f"tests/bench/collapse.py --output {RUNS}/health --draw {RESULTS}/health",
        ),
        "learning": Picture(
            (RESULTS / "learning_curves.png",),
            ("learning",),
            (LEARNING,),
            "about 3 h",
            draw=draw_learning_curves,
        ),
    }
    for study in ("temperature", "ablation"):
        pictures[f"sweep_{study}"] = study_picture(study, f"sweep_{study}", "20 min")
    for study in ("temperature_spectrum", "collapse"):
        pictures[study] = study_picture(
            study,
            study,
            "1 to 3 h",
            plots=("", "_spectrum", "_curves"),
            keys=(ON_CIFAR10, "parallel.threads=1"),
        )
    pictures["composites"] = Picture(
        (RESULTS / "composites.png",),
        ("clip_composites", "composites_labels"),
        (
            f"launch/pretrain.py configs/clip_composites.yaml output={RUNS}/clip_composites",
            "tests/bench/composites.py --train --evaluate",
        ),
        "50 min",
        command=f"tests/bench/composites.py --draw {RESULTS}/composites.png",
    )
    pictures["segmentation"] = Picture(
        (RESULTS / "segmentation_images.png",), (), (), "", draw=draw_composed_images
    )
    pages = tuple(
        PAGES / f"{page}_{width}_{scheme}.png"
        for page in ("report", "compare", "runs", "live")
        for width in HEIGHTS
        for scheme in browser_checks.SCHEMES
    )
    pictures["pages"] = Picture(
        pages,
        ("demo", *COMPARED_RUNS),
        (*demo[0], *map(compared_run_command, COMPARED_RUNS)),
        "8 min",
        draw=photograph_pages,
    )
    return pictures


def study_picture(
    study: str,
    page: str,
    training_time: str,
    plots: Sequence[str] = ("",),
    keys: Sequence[str] = (),
) -> Picture:
    """Return the plots of a study of configs/sweeps/, whose page in docs is written with them."""
    command = " ".join(["launch/sweep.py", study, f"output={RUNS}/{page}", *keys])
    return Picture(
        tuple(RESULTS / f"{page}{plot}.png" for plot in plots),
        (page,),
        (command,),
        training_time,
        command=f"{command} --table-only --table {RESULTS}/{page}.md",
    )


def compared_run_command(name: str) -> str:
    """Return the command that trains a run of the compared methods, without the interpreter."""
    method, seed = name.rsplit("_", 1)
    keys = f"output={RUNS}/{name} seed={seed} method.name={method} epochs=10"
    if method == "vicreg":
        keys += " method.projector_dims=[256,256]"
    return f"launch/pretrain.py configs/methods_digits.yaml {keys} online.knn_every_epochs=2"


def run(command: str) -> None:
    """Run a command of the clone with this interpreter."""
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def draw_learning_curves() -> None:
    """Draw the curves beside the study's own table. The page in docs was written by hand."""
    run(f"{LEARNING} --table-only --table {RUNS}/learning/learning.md")
    shutil.copy(RUNS / "learning" / "learning_curves.png", RESULTS)


def draw_composed_images() -> None:
    """Draw images and masks of the segmentation study, which come from real pixels."""
    photos = shlex.quote(str(DATA / "imagenet_sample.zip"))
    with tempfile.TemporaryDirectory() as folder:
        run(
            f"-m ssl_pretrain.eval.dense.composed_masks {folder}/data --photos {photos} "
            f"--count 400 100 --picture {RESULTS}/segmentation_images.png"
        )


def photograph_pages() -> None:
    """Save screenshots of the report, the comparison, the list and the live page."""
    PAGES.mkdir(parents=True, exist_ok=True)
    run(f"-m ssl_pretrain.eval.report {RUNS}/demo")
    with ExitStack() as stack:
        browser = stack.enter_context(browser_checks.start_browser())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs"
        folder.mkdir()
        for name in ("demo", *COMPARED_RUNS):
            (folder / name).symlink_to((RUNS / name).resolve())
        stack.enter_context(play_training(RUNS / "demo", folder / "demo_seed_1", seed=1))
        fail(RUNS / "demo", folder / "demo_large_batch")
        study = [folder / name for name in COMPARED_RUNS]
        page = compare.write(study, folder.parent / "compare.html")
        photograph(browser, (RUNS / "demo" / "report.html").resolve().as_uri(), "report")
        photograph(browser, page.as_uri(), "compare")
        with serve(run_list_server.build_server(RunFolders(folder))) as address:
            photograph(browser, address, "runs")
        with serve(live.build_server(folder / "demo_seed_1")) as address:
            photograph(browser, address, "live")


def copy_beginning(source: Path, run: Path, num_records: int, seed: int = 0) -> None:
    """Copy a run without its end, as if it had just trained that far."""
    shutil.copytree(
        source, run, ignore=shutil.ignore_patterns("eval", "checkpoints", "report.html")
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()[:num_records]
    records = [json.loads(line) for line in lines]
    shift = time.time() - records[-1]["time"]
    texts = [json.dumps(record | {"time": record["time"] + shift}) for record in records]
    (run / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("\nseed: 0\n", f"\nseed: {seed}\n"))


@contextmanager
def play_training(source: Path, run: Path, seed: int) -> Iterator[None]:
    """Copy the first half of a run and hold its lock, as its training would."""
    copy_beginning(source, run, num_records=17, seed=seed)
    with RunLock(run):
        yield


def fail(source: Path, run: Path) -> None:
    """Copy the first records of a run, with the note of an error."""
    copy_beginning(source, run, num_records=3)
    failure_note.write(run, RuntimeError("CUDA out of memory. Tried to allocate 18.20 GiB"))


def photograph(browser, address: str, name: str) -> None:
    """Save screenshots of a page at both widths, in light and dark."""
    for width, height in HEIGHTS.items():
        for scheme in browser_checks.SCHEMES:
            browser_checks.set_window(browser, width, scheme, height)
            browser.get(address)
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            path = PAGES / f"{name}_{width}_{scheme}.png"
            picture.quantize(NUM_COLORS).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
