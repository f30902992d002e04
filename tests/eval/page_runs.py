"""Runs whose training is played by the test, and servers of the pages about them."""

import json
import threading
from contextlib import contextmanager

from ssl_pretrain.fault_tolerance.run_lock import RunLock


@contextmanager
def serve(server):
    """Run a server and yield its address."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def add_records(run, *steps, **entries):
    """Append a record per step to a run of 60 epochs of 5 steps."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            record = {"step": step, "epoch": step / 5, "loss": 10 / step, "lr": 0.1}
            record |= {"images_per_second": 100 + step, "seconds_per_step": 2.0}
            file.write(json.dumps(record | {"time": 1e9 + 2 * step} | entries) + "\n")


def make_small_run(run, method="simclr", seed=0, steps=(10, 20), **settings):
    """Write a run without a checkpoint and return its folder."""
    add_records(run, *steps)
    lines = [f"{key}: {value}" for key, value in {"epochs": 60, "seed": seed, **settings}.items()]
    lines += [f"method: {{name: {method}}}", "backbone: {name: resnet18}", "data: {source: digits}"]
    (run / "config.yaml").write_text("\n".join(lines))
    return run


def add_result(run, name, value):
    """Write a result of an evaluation."""
    row = {"features": "pretrained", "metrics": {"clean": value}, "spread": {}, "notes": {}}
    (run / "eval").mkdir(exist_ok=True)
    result = {"name": name, "step": 20, "checkpoint": "c", "protocol": {}, "rows": [row]}
    (run / "eval" / f"{name}.json").write_text(json.dumps(result))


@contextmanager
def train(run):
    """Hold the lock of a run, as its training does."""
    with RunLock(run):
        yield
