"""Show all runs below a folder: state, progress, time left and best numbers.

Without an option, a live page is served on this machine. It sorts and filters the runs, opens the
page of each, and compares the runs that are selected.

    python -m ssl_pretrain.eval.run_list                          # all runs below runs/
    python -m ssl_pretrain.eval.run_list runs/sweep_lr --text     # a table in the terminal
    python -m ssl_pretrain.eval.run_list --output runs.html       # a page that needs no server
"""

import json
import shutil
import time
from pathlib import Path

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.html import run_list_page, run_list_server
from ssl_pretrain.eval.run_folders import RunFolders
from ssl_pretrain.eval.run_table import format_runs
from ssl_pretrain.schema import PORT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import durable_files, program


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.run_list"), description=__doc__
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("runs"), help="folder (default: runs)")
    add("--port", type=PORT, default=0, help="port of the live page (default: any free port)")
    add("--output", type=Path, metavar="FILE", help="write a page that needs no server, and exit")
    add("--text", action="store_true", help="print a table, and exit")
    add("--json", action="store_true", help="print the states as JSON, and exit")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder}: no such folder; give the folder that holds your runs")
    folders = RunFolders(options.folder)
    if options.json:
        print(json.dumps(run_list_page.rows(folders.read(), options.folder), indent=1))
    elif options.text:
        width = shutil.get_terminal_size((100, 24)).columns
        print(format_runs(folders.read(), width, time.time()))
    elif options.output:
        page = run_list_page.render_file(folders.read(), options.folder, options.output)
        durable_files.replace(options.output, page)
        print(f"runs: {options.output}")
    else:
        run_list_server.serve(folders, options.port)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.run_list")
