"""The notebook of the first tutorial runs, on photos without labels or without any."""

import zipfile
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the extra docs is not installed")

from notebook import ROOT, execute

NOTEBOOK = ROOT / "docs" / "tutorials" / "your_own_photos.ipynb"
NUM_PHOTOS = 300


def printed_text(content) -> str:
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.full
def test_the_first_tutorial_ends_with_a_report_of_300_photos(tmp_path, shared_data):
    with zipfile.ZipFile(shared_data("imagenet_sample.zip")) as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")]
        (tmp_path / "tutorial_photos").mkdir()
        for name in islice(names, NUM_PHOTOS):
            (tmp_path / "tutorial_photos" / Path(name).name).write_bytes(archive.read(name))
    text = printed_text(execute(NOTEBOOK, tmp_path, EPOCHS=1))
    assert "300 photos" in text
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()


@pytest.mark.full
def test_the_first_tutorial_makes_photos_if_there_are_none(tmp_path):
    execute(NOTEBOOK, tmp_path, EPOCHS=1)
    assert len(list((tmp_path / "tutorial_photos").iterdir())) == NUM_PHOTOS
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()
