"""Time to open the page of `ssl-pretrain runs`, and to update it, over 20 and over 200 runs.

PYTHONPATH=.:tests/eval .venv/bin/python tests/bench/run_list.py

In both folders ten runs train: their locks are held, and each writes a record before every update.
The runs are copies of a real one, with 300 records each. The two folders take turns. The first
lines are the times of each folder, the last one the ratios of their medians.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import browser_checks
from untrained_run import make_run

from ssl_pretrain.fault_tolerance.run_lock import RunLock
from ssl_pretrain.monitoring import records

NUM_RUNS, NUM_WRITING, NUM_RECORDS = (20, 200), 10, 300
METHODS = ("simclr", "byol", "dino", "vicreg", "moco_v3")
UPDATE = """const done = arguments[0], start = performance.now();
refresh().then(() => { document.body.offsetHeight; done(performance.now() - start); });"""
OPEN = """const entry = performance.getEntriesByType("navigation")[0];
return [entry.loadEventEnd, entry.responseEnd, document.querySelector("tbody").rows.length]"""


def record(step: int, now: float) -> dict[str, float]:
    """Return a record with as many entries as a real one."""
    values = {"step": step, "epoch": step / 5, "loss": 5.0 / step, "lr": 0.1, "data_wait": 0.01}
    values |= {"images_per_second": 900.0, "seconds_per_step": 0.3, "memory_gib": 1.3}
    values |= {f"measure_{number}": 1 / (step + number) for number in range(12)}
    if step % 20 == 0:
        values["knn"] = 1 - 1 / step
    return values | {"time": now}


def make_runs(folder: Path, template: Path, num_runs: int) -> list[Path]:
    """Copy the template `num_runs` times and return the runs that will write."""
    start = time.time() - NUM_RECORDS
    lines = [records.encode(record(step, start + step)) for step in range(1, NUM_RECORDS + 1)]
    runs = []
    for number in range(num_runs):
        run = folder / f"study_{number % 4}" / f"run_{number:03d}"
        shutil.copytree(template, run)
        config = (run / "config.yaml").read_text()
        method = METHODS[number % len(METHODS)]
        (run / "config.yaml").write_text(config.replace("name: simclr", f"name: {method}", 1))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        row = {"features": "pretrained", "metrics": {"clean": 80 + number / 20}}
        (run / "eval").mkdir()
        for name in ("knn", "linear"):
            result = {"name": name, "step": NUM_RECORDS, "rows": [row]}
            (run / "eval" / f"{name}.json").write_text(json.dumps(result))
        runs.append(run)
    return runs[:: num_runs // NUM_WRITING][:NUM_WRITING]


class ServedFolder:
    """A folder of runs, ten of which train, and the command that serves it."""

    def __init__(self, folder: Path, template: Path, num_runs: int, stack: ExitStack):
        self.num_runs, self.step = num_runs, NUM_RECORDS
        self.writing = make_runs(folder, template, num_runs)
        for run in self.writing:
            stack.enter_context(RunLock(run))
        start = time.perf_counter()
        command = [sys.executable, "-m", "ssl_pretrain.eval.run_list", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(self._process.wait)
        stack.callback(self._process.terminate)
        assert self._process.stdout
        line = self._process.stdout.readline()
        self.address = next(word for word in line.split() if word.startswith("http"))
        self.start_seconds = time.perf_counter() - start

    def write(self) -> None:
        """Append a record to each of the ten runs."""
        self.step += 1
        for run in self.writing:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(records.encode(record(self.step, time.time())) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements per folder")
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = stack.enter_context(browser_checks.start_browser())
        template = make_run(root / "template", step=NUM_RECORDS)
        served = [ServedFolder(root / str(n), template, n, stack) for n in NUM_RUNS]
        times = {(kind, n): [] for kind in ("first", "open", "server", "update") for n in NUM_RUNS}
        for number in range(rounds + 1):
            for folder in served:
                opened, answered, num_rows = open_list(browser, folder)
                assert num_rows == folder.num_runs
                if number == 0:  # the server reads all runs
                    times["first", folder.num_runs].append(opened)
                    continue
                times["open", folder.num_runs].append(opened)
                times["server", folder.num_runs].append(answered)
                times["update", folder.num_runs].append(update_list(browser, folder))
    for (kind, n), values in times.items():
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{kind:7} {n:4} runs: {statistics.median(values):7.1f} ms ({spread})")
    medians = {key: statistics.median(values) for key, values in times.items()}
    ratios = [
        f"{kind}_200_vs_20={medians[kind, 200] / medians[kind, 20]:.2f}"
        for kind in ("open", "update", "first")
    ]
    print(f"ratios: {' '.join(ratios)}")


def update_list(browser, folder: ServedFolder) -> float:
    """Write records and return the milliseconds of the update that shows them.

    The server reads the runs once per second at most, so an update may come too early.
    """
    folder.write()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        milliseconds = browser.execute_async_script(UPDATE)
        shown = browser.find_element("css selector", ".runs .done").text
        if f"{folder.step} of" in shown:
            return milliseconds
        time.sleep(0.3)
    raise SystemExit(f"{folder.address}: step {folder.step} was not shown within 30 s")


def open_list(browser, folder: ServedFolder) -> tuple[float, float, int]:
    """Open the page and return the milliseconds to its end, to the answer's end, and its rows."""
    time.sleep(1.1)
    folder.write()
    browser.get(folder.address)
    return tuple(browser.execute_script(OPEN))


if __name__ == "__main__":
    main()
