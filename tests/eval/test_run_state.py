"""The state of a run, decided from its folder: running, stopped, failed, finished."""

import json
import multiprocessing
import os
import time

import pytest
from untrained_run import edit_manifest, make_run

from ssl_pretrain.eval.appended_lines import AppendedLines
from ssl_pretrain.eval.run_state import RunStateReader
from ssl_pretrain.fault_tolerance.run_lock import RunLock
from ssl_pretrain.monitoring.progress import ProgressText


def hold_lock(run, locked):
    with RunLock(run):
        locked.set()
        time.sleep(600)


@pytest.fixture
def run(tmp_path):
    """A run of 60 epochs of 5 steps that has trained 100 steps."""
    run = make_run(tmp_path / "run", step=100)
    edit_manifest(run, last_step=300)
    write_records(run, range(10, 101, 10))
    return run


def write_records(run, steps, **entries):
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            record = {"step": step, "epoch": step / 5, "loss": 1.0, "lr": 0.1, "knn": step / 1000}
            record |= {"images_per_second": 500.0, "seconds_per_step": 2.0, "data_wait": 0.0}
            file.write(json.dumps(record | {"time": 1e9 + 2 * step} | entries) + "\n")


def read(run):
    return RunStateReader(run).read()


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_does_not_exist_waits(tmp_path):
    state = read(tmp_path / "later")
    assert (state.state, state.reason) == ("waiting", f"{tmp_path}/later does not exist yet")
    assert not (tmp_path / "later").exists()


def test_a_run_that_holds_its_lock_is_running_and_its_end_is_known(run):
    now = time.time()
    write_records(run, [110], time=now)
    with RunLock(run):
        state = read(run)
    assert (state.state, state.step, state.num_steps) == ("running", 110, 300)
    assert state.reason.startswith(f"process {os.getpid()} on ")
    assert state.ends_at == pytest.approx(now + 190 * 2.0)
    assert state.seconds_left(now) == pytest.approx(380.0)


def test_the_time_left_is_that_of_the_console(run):
    seconds = [3.0, 1.0, 2.5]
    for step, value in zip((110, 120, 130), seconds):
        write_records(run, [step], seconds_per_step=value)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    console = ProgressText(300, records)
    with RunLock(run):
        state = read(run)
    assert state.ends_at - state.updated_at == pytest.approx(console.seconds_left(130))


def test_a_run_that_writes_no_record_for_long_is_called_silent(run):
    write_records(run, [110], time=time.time() - 3600)
    with RunLock(run):
        assert read(run).reason.endswith(", without a new record for 60 min")


def test_a_run_that_ended_early_is_stopped(run):
    state = read(run)
    assert (state.state, state.reason) == ("stopped", "the same command resumes the run")
    assert (state.best_knn, state.fraction) == (10.0, pytest.approx(1 / 3))
    assert state.ends_at is None


def test_a_run_that_did_all_steps_is_finished(run):
    edit_manifest(run, last_step=100)
    assert read(run).state == "finished"


def test_a_run_that_an_error_ended_has_failed_until_it_goes_on(run):
    with pytest.raises(RuntimeError), RunLock(run):
        raise RuntimeError("CUDA out of <memory>\nof all kinds")
    state = read(run)
    assert state.state == "failed"
    assert state.reason == "RuntimeError: CUDA out of <memory> of all kinds"
    with RunLock(run):
        assert read(run).state == "running"
    assert read(run).state == "stopped"


def test_ctrl_c_is_no_failure(run):
    with pytest.raises(KeyboardInterrupt), RunLock(run):
        raise KeyboardInterrupt
    assert read(run).state == "stopped"


def test_a_run_that_is_refused_does_not_mark_the_run_in_its_folder_as_failed(run):
    with RunLock(run):
        with pytest.raises(ValueError, match="is in use by"), RunLock(run):
            pass
        assert read(run).state == "running"
    assert read(run).state == "stopped"


def test_a_run_whose_process_was_killed_has_failed(run):
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=hold_lock, args=(run, locked))
    process.start()
    assert locked.wait(60)
    reader = RunStateReader(run)
    assert reader.read().state == "running"
    process.kill()
    process.join()
    state = reader.read()
    assert state.state == "failed"
    assert state.reason == "the process was killed, or its machine went down"


def test_without_a_checkpoint_the_number_of_steps_follows_from_the_epochs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("epochs: 60\nmethod:\n  name: simclr\nseed: 3\n")
    write_records(run, [7])
    state = read(run)
    assert (state.num_steps, state.method, state.seed) == (300, "simclr", 3)


def test_a_damaged_file_does_not_hide_the_run(run):
    (run / "config.yaml").write_text("method: [")
    (run / "failure.json").write_text("{")
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_text('{"name": "knn"}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": null}\n{"step": 120, "epoch": 24.0, "tru')
    state = read(run)
    assert (state.state, state.step, state.evaluations) == ("stopped", 100, {})


def test_asking_for_the_state_changes_nothing(run):
    before = files_of(run)
    reader = RunStateReader(run)
    assert reader.read() == reader.read()
    assert files_of(run) == before


def test_a_new_record_a_new_number_and_a_trimmed_file_are_seen(run):
    reader = RunStateReader(run)
    with RunLock(run):
        assert reader.read().step == 100
        write_records(run, [110], knn=0.9)
        assert (reader.read().step, reader.read().best_knn) == (110, 90.0)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "new").write_text("".join(lines[:5]))
        (run / "new").rename(run / "metrics.jsonl")
        assert (reader.read().step, reader.read().best_knn) == (50, 5.0)
    result = {"name": "linear", "rows": [{"features": "pretrained", "metrics": {"clean": 81.5}}]}
    (run / "eval").mkdir()
    (run / "eval" / "linear.json").write_text(json.dumps(result))
    assert reader.read().evaluations == {"linear": 81.5}


def test_a_run_at_rest_is_not_read_again(run, monkeypatch):
    reader = RunStateReader(run)
    state = reader.read()
    os.utime(run, (1e9, 1e9))
    reader.read()
    monkeypatch.setattr(AppendedLines, "read", lambda self: pytest.fail("read again"))
    assert reader.read() == state


def test_only_complete_new_lines_are_read(tmp_path):
    path = tmp_path / "lines"
    lines = AppendedLines(path)
    assert lines.read() == ([], False)
    path.write_bytes(b"one\ntwo\nthr")
    assert lines.read() == ([b"one", b"two"], True)
    assert lines.read() == ([], False)
    with path.open("ab") as file:
        file.write(b"ee\n")
    assert lines.read() == ([b"three"], False)
    path.write_bytes(b"four\n")
    assert lines.read() == ([b"four"], True)
    path.unlink()
    assert lines.read() == ([], True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("method: {name: simcse}\nviews: {crops: {}}", "bert"),
        ("method: {name: none}\nviews: {crops: {}}", "resnet50"),
        ("method: {name: clip}\nviews: {crops: {global: {size: 8}}}", "resnet50"),
    ],
)
def test_the_network_of_a_method_of_sentences_is_its_text_encoder(settings, expected, tmp_path):
    networks = "backbone: {name: resnet50}\ntext_encoder: {name: bert}\n"
    (tmp_path / "config.yaml").write_text(f"{networks}{settings}\n")
    assert read(tmp_path).backbone == expected
