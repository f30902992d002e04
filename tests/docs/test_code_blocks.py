"""Every code block of the README, the tutorials and three guides runs, or its page says why not."""

import numpy as np
import pytest
from blocks import ROOT, find_blocks, run
from PIL import Image
from suites import quick_and_full

PAGES = [
    "README.md",
    "docs/configuration.md",
    "docs/data.md",
    "docs/quickstart.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "tutorials").glob("*.md")),
]
LONG = ["docs/configuration.md", "docs/data.md"]  # many commands, which take a minute together
NUM_PHOTOS = 24


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with photos and the top of the repository, as readers of a clone have it."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.jpg")
    for name in ("launch", "eval", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: str, folder, treatments: list[str]) -> None:
    variables = {"__name__": "__main__"}
    for block in find_blocks(ROOT / page):
        if block.treatment in treatments:
            run(block, folder, variables)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page):
    unmarked = [block.line for block in find_blocks(ROOT / page) if not block.treatment]
    assert unmarked == [], f"{page}: no comment before the blocks at these lines"


@pytest.mark.parametrize("page", quick_and_full([p for p in PAGES if p not in LONG], PAGES))
def test_the_short_blocks_of_a_page_run_in_order(page, folder):
    run_blocks(page, folder, ["run"])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_all_blocks_of_a_page_that_can_run_do(page, folder):
    run_blocks(page, folder, ["run", "full"])
