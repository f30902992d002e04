"""Upload an export to the Hugging Face Hub, after a check of every file."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ssl_pretrain.eval.exporting.export_folder import load
from ssl_pretrain.eval.exporting.reference import ARGUMENTS_FILE, read_arguments
from ssl_pretrain.system import durable_files

# HfHubHTTPError is derived from all errors of the HTTP client, whose package depends on the version
# of huggingface_hub: requests, httpx or httpx2.
CLIENT_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)


@dataclass(frozen=True)
class Upload:
    """Repository and files of an upload.

    Attributes:
        folder: Folder of the export.
        repository: Name on the Hub, such as user/backbone.
        is_private: True if only its owner may see a new repository.
        files: Size in bytes and SHA-256 of each file, by its path.
    """

    folder: Path
    repository: str
    is_private: bool
    files: dict[str, tuple[int, str]]

    @property
    def url(self) -> str:
        """Address of the repository."""
        return f"{huggingface_hub.constants.ENDPOINT}/{self.repository}"

    def describe(self) -> str:
        """Return the repository, each file's size and digest, the card's metadata and title."""
        visibility = "private" if self.is_private else "public"
        width = max(len(f"{size:,}") for size, _ in self.files.values())
        total = sum(size for size, _ in self.files.values())
        lines = [
            f"repository: {self.url} (a new one is {visibility})",
            f"files: {len(self.files)} with {total:,} bytes; size, SHA-256 and path of each",
            *(
                f"  {size:>{width},}  {digest}  {name}"
                for name, (size, digest) in self.files.items()
            ),
            "card: README.md",
            *(f"  {line}".rstrip() for line in _card_head(self.folder)),
        ]
        return "\n".join(lines)

    def send(self, token: str) -> str:
        """Create a missing repository, upload the files, and return the address of the commit.

        Raises:
            ValueError: If the Hub refuses the token or the repository, or cannot be reached.
        """
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(self.repository, private=self.is_private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=self.repository,
                folder_path=self.folder,
                allow_patterns=list(self.files),
                commit_message="Export of ssl_pretrain",
            )
        except CLIENT_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.repository}: the Hub did not accept the upload: {reason}; check the token"
                " (`hf auth whoami`), the name and the network, and run the same command again"
            ) from None
        return str(commit.commit_url)


def prepare(folder: Path, repository: str, is_private: bool) -> Upload:
    """Check every file of an export and describe its upload.

    Files that the export did not write are not uploaded.

    Raises:
        ValueError: If a file is missing or changed, the features differ from the exported ones, or
            the name of the repository is not possible.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"REPO: {repository!r} is not a name on the Hub: {error}") from None
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that eval.export wrote")
    expected = read_arguments(folder).get("files")
    if expected is None:
        raise ValueError(
            f"{folder}: was exported by an older version, which wrote no checksums; export again"
        )
    names = sorted([*expected, ARGUMENTS_FILE])
    actual = {
        name: durable_files.sha256(folder / name) for name in names if (folder / name).is_file()
    }
    if changed := sorted(name for name in expected if actual.get(name) != expected[name]):
        raise ValueError(
            f"{folder}: {', '.join(changed)} changed after the export or is missing. Nothing was"
            " uploaded; export again"
        )
    load(folder)
    files = {name: ((folder / name).stat().st_size, actual[name]) for name in names}
    return Upload(folder, repository, is_private, files)


def _card_head(folder: Path) -> list[str]:
    """Return the metadata and the title of the model card."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith("# ")]
    return lines[: titles[0] + 1] if titles else lines[:1]
