"""Every picture of README and docs is made by `make pictures`."""

from collections import Counter

import pictures

SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".svg"}


def test_every_picture_of_the_documentation_is_made_by_one_command():
    root = pictures.ROOT
    files = (path for path in (root / "docs").rglob("*") if path.suffix in SUFFIXES)
    # A plot is saved as PNG and as SVG.
    present = {path.relative_to(root).with_suffix(".png") for path in files}
    num_commands = Counter(
        path for picture in pictures.build_list().values() for path in picture.paths
    )
    assert present == num_commands.keys()
    assert set(num_commands.values()) == {1}
