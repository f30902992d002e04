"""Hooks of the docs site: the home page, pages made from notebooks, and equations.

mkdocs calls the functions whose names begin with `on_`. `mkdocs.yml` names this file.
"""

import base64
import os
import re
from pathlib import Path, PurePosixPath

import griffe
import nbformat
from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ssl_pretrain.command import option_specs, subcommands
from ssl_pretrain.system import program


class ExampleSections(griffe.Extension):
    """Show the `Example:` section of a docstring as code. griffe only knows `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")


COMMANDS = "<!-- commands -->"  # replaced by the help of every sub-command
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render ```math blocks, which GitHub renders too, as MathML, which needs no script."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _equation}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README as the home page, and one page per notebook."""
    readme = (Path(config.docs_dir).parent / "README.md").read_text()
    readme = readme.replace("](docs/", "](").replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=readme))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for generated in _notebook_files(notebook, config):
            files.append(generated)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links fit the site.

    Links to notebooks lead to the pages made from them. Links to files of the repository that are
    not on the site become plain text.
    """
    folder = PurePosixPath(page.file.src_uri).parent

    def adapt_link(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        if target.endswith(".ipynb"):
            page_of_notebook = PurePosixPath(target).with_suffix(".md")
            is_download = str(folder / page_of_notebook) == page.file.src_uri
            return match[0] if is_download else f"[{text}]({page_of_notebook})"
        leaves_docs = _leaves_docs(folder / target)
        is_top_file = (
            page.file.src_uri == "index.md" and (Path(config.docs_dir).parent / target).exists()
        )
        return text if leaves_docs or is_top_file else match[0]

    markdown = LINK.sub(adapt_link, markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    return markdown


def _commands() -> str:
    """Return a section per sub-command of `ssl-pretrain`, with its help."""
    os.environ["COLUMNS"] = "88"
    specs = option_specs.read_specs()
    sections = []
    for group, commands in subcommands.GROUPS.items():
        sections.append(f"## {group.capitalize()}")
        for name, command in commands.items():
            parser = option_specs.build_parser(specs[name], f"{program.SCRIPT} {name}")
            text = parser.format_help().replace(f"{program.name()} ", f"{program.SCRIPT} ")
            sections.append(f"### {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.")
            sections.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(sections)


def _leaves_docs(path: PurePosixPath) -> bool:
    """Return True if a path relative to docs/ lies outside that folder."""
    depth = 0
    for name in path.parts:
        depth += -1 if name == ".." else name != "."
        if depth < 0:
            return True
    return False


def _equation(source: str, *_arguments: object, **_options: object) -> str:
    """Return the HTML of a LaTeX equation, as a formatter of pymdownx.superfences."""
    return f'<div class="equation">{converter.convert(source.strip(), display="block")}</div>'


def _notebook_files(notebook: File, config: MkDocsConfig) -> list[File]:
    """Return the page of a notebook, with its outputs, and the pictures on it."""
    name = PurePosixPath(notebook.src_uri).with_suffix("")
    pictures: list[File] = []
    blocks = [f"[Download this page as a notebook]({name.name}.ipynb)"]
    for cell in nbformat.read(notebook.abs_src_path, as_version=4).cells:
        if cell.cell_type == "markdown":
            blocks.append(cell.source)
            continue
        blocks.append(f"```python\n{cell.source}\n```")
        text = ""
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                uri = f"{name}_{len(pictures)}.png"
                content = base64.b64decode(data["image/png"])
                pictures.append(File.generated(config, uri, content=content))
                blocks.append(f"![]({PurePosixPath(uri).name})")
            else:
                text += output.get("text") or data.get("text/plain", "")
        if text:
            blocks.append(f"```text\n{text.rstrip()}\n```")
    title, *rest = blocks[1:2], blocks[0], *blocks[2:]
    page = "\n\n".join([*title, *rest]) + "\n"
    return [File.generated(config, f"{name}.md", content=page), *pictures]
