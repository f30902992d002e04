"""Image files as people have them: unreadable ones, deep ones, bombs, and files damaged on the way."""

from __future__ import annotations

import json
import os
import time
import zipfile
from pathlib import Path

from commands import class_folders, finish, run, start, write_config


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def damage(files: list[Path]) -> None:
    for file in files:
        os.truncate(file, 60)


class TestReplaced:
    """Unreadable images are replaced, counted, and too many of them stop the run, whatever the source."""

    def test_images_that_vanish_stop_the_run(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=4, per_class=10)
        process = start("-m", "ssl_pretrain.train", write_config(tmp_path, root), "epochs=2000", "data.num_workers=1")
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for file in sorted(root.rglob("*.png"))[1:]:
            file.unlink()
        finished = finish(process)
        assert finished.status == 2, finished.text
        assert "error: data." in finished.stderr and "No such file or directory; " in finished.stderr
        assert str(root / "train") in finished.stderr and "Traceback" not in finished.stderr

    def test_a_few_are_counted_in_the_records_and_the_report(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=2, per_class=12)
        class_folders(root, "val", classes=2, per_class=4, first=50)
        damage(sorted((root / "train").rglob("*.png"))[5:6])
        finished = run("-m", "ssl_pretrain.train", write_config(tmp_path, root), "epochs=2")
        assert finished.status == 0, finished.text
        assert sum(record["replaced_images"] for record in records(tmp_path)) == 2
        assert finished.text.count("takes its place") == 1
        finished = run("-m", "eval.report", tmp_path / "run")
        assert finished.status == 0, finished.text
        page = (tmp_path / "run" / "report.html").read_text()
        assert "unreadable images replaced" in page and "Replaced images" in page

    def test_a_damaged_zip_is_refused_and_a_higher_ceiling_is_obeyed(self, tmp_path):
        folder = class_folders(tmp_path / "files", "train", classes=2, per_class=12)
        files = sorted(folder.rglob("*.png"))
        damage(files[::4])
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
        config = write_config(tmp_path, tmp_path / "data.zip")
        finished = run("-m", "ssl_pretrain.train", config)
        assert finished.status == 2 and "error: data.max_replaced: " in finished.stderr
        assert "more than the 1 that may be replaced (0.01 of the images)" in finished.stderr
        finished = run("-m", "ssl_pretrain.train", config, "data.max_replaced=0.5")
        assert finished.status == 0, finished.text
        assert records(tmp_path)[-1]["replaced_images"] >= 1

    def test_ranks_count_together(self, tmp_path):
        """Each of two ranks meets fewer unreadable images than may be replaced, both together more."""
        root = class_folders(tmp_path / "data", "train", classes=4, per_class=50)
        damage(sorted(root.rglob("*.png"))[10:14])  # 4 of 200, and 2 may be
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_pretrain.train")
        finished = run(*torchrun, write_config(tmp_path, root), "global_batch_size=20", "epochs=1", "log.every_steps=50")
        assert finished.status != 0
        assert "error: data.max_replaced: " in finished.stderr

    def test_evaluations_have_the_ceiling_too(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=2, per_class=8)
        class_folders(root, "val", classes=2, per_class=8, first=50)
        assert run("-m", "ssl_pretrain.train", write_config(tmp_path, root)).status == 0
        damage(sorted((root / "val").rglob("*.png"))[::3])  # the first one too
        finished = run("-m", "eval.knn", tmp_path / "run")
        assert finished.status == 2, finished.text
        assert "data.max_replaced: " in finished.stderr and f"of 16 images of {root / 'val'} could not be read" in finished.stderr
        assert not (tmp_path / "run" / "eval" / "knn.json").exists()

    def test_a_ceiling_that_is_no_share_is_refused(self, tmp_path):
        root = class_folders(tmp_path / "data", "train")
        finished = run("-m", "ssl_pretrain.train", write_config(tmp_path, root), "data.max_replaced=1.5", "--plan")
        assert finished.status == 2
        assert "data.max_replaced: 1.5 must be a share between 0 and 1, such as 0.01" in finished.stderr
