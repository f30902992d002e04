"""The report's page: its style, and the pieces of HTML that it is made of. Nothing in it is fetched."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_pretrain.eval import results

TITLES = {
    "knn": "k-NN",
    "knn_grid": "k-NN, every k and temperature",
    "knn_train": "k-NN of held-out training images",
    "knn_train_grid": "k-NN of held-out training images, every k and temperature",
    "linear": "Linear",
    "linear_grid": "Linear, every setting tried",
    "semi": "Few labels, whole network",
    "spectrum": "Spectrum",
    "retrieval": "Retrieval",
    "robustness": "Robustness",
    "detection": "Detection",
}
STYLE = """
:root { color-scheme: light dark;
  --page: #fdfdfc; --ink: #1d1f21; --soft: #63686e; --rule: #e2e3e0; --panel: #f5f5f2;
  --accent: #1f5fa8; --right: #2f8f5b; --wrong: #c8443c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16181a; --ink: #e4e5e3; --soft: #9a9fa5; --rule: #303438; --panel: #1e2124;
  --accent: #74aef0; --right: #5cbf8a; --wrong: #e8766d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 28px 96px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 64px 0 6px; padding-top: 20px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 26px 0 6px; }
p { margin: 0 0 14px; max-width: 72ch; }
.soft, figcaption, .none, dt, .legend { color: var(--soft); }
.soft, figcaption, .none, .legend { font-size: 14px; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: 12px 14px; overflow-x: auto; margin: 14px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 14px 44px; margin: 26px 0 8px; }
.facts dt { font-size: 13px; } .facts dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 26px 36px; margin: 18px 0; }
figure { margin: 0; } figcaption { margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; } .dot { fill: var(--accent); }
.scatter { background: var(--panel); border-radius: 6px; } .scatter circle { fill-opacity: .82; }
.result { display: grid; grid-template-columns: minmax(0, 1.35fr) minmax(0, 1fr); gap: 10px 40px; align-items: start; margin: 14px 0 34px; }
@media (max-width: 820px) { .result { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 7px 0 7px 18px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 500; color: var(--soft); font-size: 13px; }
tr.part td { color: var(--soft); font-size: 14px; } tr.part td:first-child { padding-left: 14px; } tr.ours td { font-weight: 650; }
.protocol { margin: 0; font-size: 13px; line-height: 1.5; }
.protocol div { display: grid; grid-template-columns: 104px 1fr; gap: 10px; padding: 3px 0; }
.protocol dd { margin: 0; overflow-wrap: anywhere; }
.views { display: flex; flex-wrap: wrap; gap: 14px 26px; } .views div { display: flex; flex-wrap: wrap; gap: 4px; }
.views img { max-width: 100%; border-radius: 4px; }
.near { border-spacing: 0; font-size: 13px; width: auto; } .near td, .near th { border: 0; padding: 4px 22px 4px 0; text-align: left; }
.near tr > * { border-bottom: 1px solid var(--rule); }
.strip { display: flex; gap: 5px; align-items: center; } .strip img { width: 50px; height: 50px; border-radius: 3px; display: block; }
.pixel img { image-rendering: pixelated; }
.strip .wrong { border-bottom: 3px solid var(--wrong); } .strip .right { border-bottom: 3px solid var(--right); }
.strip span { padding-bottom: 2px; } .score { min-width: 30px; color: var(--soft); font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 12px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.alert { border-left: 4px solid var(--wrong); background: var(--panel); border-radius: 0 6px 6px 0; padding: 10px 16px;
  margin: 14px 0; max-width: none; }
img.grid { max-width: 100%; image-rendering: pixelated; }
details summary { cursor: pointer; color: var(--accent); margin-top: 10px; }
"""


def page(title: str, sections: list[str], script: str = "") -> str:
    """The page as UTF-8 text. Bytes of file names that are no text, as in a class of another encoding, become escapes."""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + f"\n</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )
    return text.encode(errors="backslashreplace").decode()


def section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>" + "\n".join(content) + "</section>"


def paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def figure(content: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def facts(pairs: list[tuple[str, str]]) -> str:
    return (
        '<dl class="facts">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs
        )
        + "</dl>"
    )


def picture(pixels: np.ndarray, label: str, largest: int = 88) -> str:
    """<img> of uint8 (3, height, width), made smaller if a side is over `largest`."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((largest, largest))
    return f'<img alt="{escape(label)}" title="{escape(label)}" src="{_source(image)}">'


def _source(image: Image.Image) -> str:
    """An <img>'s source that holds the picture itself: PNG for small ones, JPEG where PNG would be large."""
    small = image.width * image.height <= 128 * 128
    content = io.BytesIO()
    image.save(content, "PNG" if small else "JPEG", optimize=True, quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def picture_file(path: Path, label: str) -> str:
    """<img> of a picture in the run's folder, whole."""
    return (
        f'<img class="grid" alt="{escape(label)}" src="{_source(Image.open(path).convert("RGB"))}">'
    )


def legend(names: list[tuple[str, str]]) -> str:
    """Colours and what they stand for."""
    keys = (
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def table(head: list[str], lines: list[list[str]]) -> str:
    """Cells as they are given: escaped here."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{rows}</table></div>'


def views(path: Path, size: int, drawn: list[list[str]] | None = None) -> str:
    """The trainer's grid of views cut at its gaps of 2 pixels: the views of an image together, each with what was `drawn` for it.

    size: a view's side in pixels.
    """
    grid, pitch = Image.open(path).convert("RGB"), size + 2
    if (grid.width - 2) % pitch or (grid.height - 2) % pitch:
        return f'<div class="views"><img alt="training views" src="{_source(grid)}"></div>'
    shown, side = [], max(size, 64)
    for row, top in enumerate(range(2, grid.height, pitch)):
        cut = [
            grid.crop((left, top, left + size, top + size)) for left in range(2, grid.width, pitch)
        ]
        words = (
            drawn[row]
            if drawn and row < len(drawn) and len(drawn[row]) == len(cut)
            else ["view"] * len(cut)
        )
        pictures = (
            f'<img alt="view" title="{escape(text)}" width="{side}" src="{_source(view)}">'
            for view, text in zip(cut, words)
        )
        shown.append("<div>" + "".join(pictures) + "</div>")
    return f'<div class="views{" pixel" if size <= 64 else ""}">{"".join(shown)}</div>'


def result(found: dict[str, Any]) -> str:
    """One evaluation: its table, and beside it the protocol and what was chosen."""
    names = results.columns(found)
    heads = [found.get("measure", "accuracy, %"), *names]
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in heads) + "</tr>"]
    for row in found["rows"]:
        kind = (
            "part"
            if row["features"].startswith("random, ")
            else "ours"
            if row["features"] == "pretrained"
            else ""
        )
        cells = "".join(f"<td>{escape(results.number(row, name))}</td>" for name in names)
        lines.append(f'<tr class="{kind}"><td>{escape(row["features"])}</td>{cells}</tr>')
    about = {
        **found["protocol"],
        **{f"chosen for {row}": choice for row, choice in results.choices(found).items()},
    }
    protocol = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in about.items()
    )
    table = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return f'<h3>{escape(TITLES.get(found["name"], found["name"]))}</h3><div class="result">{table}<dl class="protocol">{protocol}</dl></div>'
