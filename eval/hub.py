"""Upload the folder of an export to the Hugging Face Hub."""

from pathlib import Path

import huggingface_hub

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.exporting import hub_upload
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

HELP = """Upload the folder of an export to the Hugging Face Hub.

Every file is compared with its checksum first, and the features with the exported ones. The
repository, the files with their sizes and digests, and the metadata and title of the model card are
printed. Files that the export did not write are not uploaded. The token comes from `hf auth login`
or HF_TOKEN. Without a token, nothing is uploaded.

    # print what would be uploaded, and upload it if there is a token
    python -m ssl_pretrain.eval.hub push runs/demo/export USER/NAME
    # print it only
    python -m ssl_pretrain.eval.hub push runs/demo/export USER/NAME --dry-run"""


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = ArgumentParser(program.usage_name("python -m ssl_pretrain.eval.hub"), description=HELP)
    add = parser.add_argument
    add("action", metavar="push", choices=["push"], help="what to do")
    add("folder", metavar="FOLDER", type=Path, help="folder that export wrote")
    add("repository", metavar="REPO", help="name on the Hub, such as USER/NAME")
    add("--public", action="store_true", help="make a new repository public (default: private)")
    add("--dry-run", action="store_true", help="upload nothing, even with a token")
    options = parser.parse_args(arguments)
    upload = hub_upload.prepare(options.folder, options.repository, not options.public)
    print(upload.describe())
    token = huggingface_hub.get_token()
    if options.dry_run:
        print("nothing was uploaded: --dry-run was given")
    elif not token:
        print(
            "nothing was uploaded: there is no token; log in with `hf auth login` or set HF_TOKEN,"
            " and run the same command again"
        )
    else:
        print(f"uploaded: {upload.send(token)}")


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.hub")
