"""Turn the errors of object stores into messages with a remedy, and tell which ones may pass."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from ssl_pretrain.data.images import UnreachableSource
from ssl_pretrain.system.exit_status import LostProcessError
from ssl_pretrain.system.optional_packages import install_hint

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PROTOCOLS = (*PACKAGES, "http", "https")
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}
# Names of the exceptions that botocore, google-auth and huggingface_hub raise without credentials.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
    *("DefaultCredentialsError", "LocalTokenNotFoundError"),
}
# Names of the exceptions of botocore, huggingface_hub and aiohttp for an address of the wrong form.
_INVALID = {"ParamValidationError", "HFValidationError", "InvalidURL", "InvalidUrlClientError"}
_PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)


class StoreOutage(UnreachableSource, LostProcessError):
    """Error for a store that does not answer. The same command may succeed later."""


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, such as "s3"."""
    return url.partition("://")[0].lower()


def printable_url(url: str) -> str:
    """Return a URL without the user, the password and the signature that it may contain."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def missing_package_error(url: str, package: str = "") -> UnreachableSource:
    """Return the error for a package that reads this kind of URL and is not installed."""
    protocol = protocol_of(url)
    package = package or PACKAGES.get(protocol, "aiohttp")
    extra = _EXTRAS.get(protocol, "remote")
    return UnreachableSource(
        f"data.root: {protocol}:// is read by the package {package}, which is not installed; "
        f"{install_hint(extra)}"
    )


def check_has_host(url: str) -> None:
    """Raise UnreachableSource if a URL lacks the bucket or the server.

    Args:
        url: Address of an object or a folder.
    """
    if protocol_of(url) in _PROTOCOLS and not urlsplit(url).netloc:
        raise UnreachableSource(
            f"data.root: {url} names no bucket or server; give one, as in "
            f"{protocol_of(url)}://NAME/train.tar"
        )


def unknown_protocol_error(protocol: str) -> UnreachableSource:
    """Return the error for a protocol that no package reads."""
    return UnreachableSource(
        f"data.root: {protocol}:// is unknown; give a path, or a URL that begins with s3://, "
        "gs://, hf:// or https://"
    )


def unset_option_error(protocol: str, error: TypeError) -> UnreachableSource:
    """Return the error for a file system that has no default for an option."""
    return UnreachableSource(
        f"data.root: {protocol}:// needs options ({error}); set them for fsspec, as in "
        f"FSSPEC_{protocol.upper()}_HOST, or give a URL that begins with s3://, gs://, hf:// or "
        "https://"
    )


def no_range_error(url: str, num_arrived: int, num_bytes: int) -> UnreachableSource:
    """Return the error for a server that sends a whole object for a range of it."""
    return UnreachableSource(
        f"data.root: the server of {printable_url(url)} sent {num_arrived:,} bytes for a range of "
        f"{num_bytes:,}, so it does not support ranges; use another server, or download the shards"
    )


def permanent_error(url: str, error: Exception) -> Exception | None:
    """Return the error to raise if another attempt would fail too, else None.

    Args:
        url: Address of the object.
        error: Error of the file system.
    """
    name, protocol = printable_url(url), protocol_of(url)
    causes = list(_causes(error))
    status = next(filter(None, map(_http_status, causes)), 0)
    variables = _CREDENTIALS.get(protocol, "")
    remedy = f"set {variables}" if variables else "give a URL that needs no login"
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in causes):
        return UnreachableSource(
            f"data.root: {name} needs credentials, and none were found; {remedy}"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return UnreachableSource(
            f"data.root: access to {name} is denied; check that the credentials may read it "
            f"({remedy})"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return UnreachableSource(
            f"data.root: {name} does not exist; check the name and the credentials, because some "
            "stores answer like this without permission"
        )
    if type(error) is ValueError or any(type(cause).__name__ in _INVALID for cause in causes):
        return UnreachableSource(
            f"data.root: {name} is not a valid address: {_text(error)}; correct it"
        )
    if status == 416:
        return changed_error(url, "it has become shorter")
    if isinstance(error, (*_PROGRAMMING_ERRORS, UnreachableSource)):
        return error
    return None


def changed_error(url: str, reason: str) -> UnreachableSource:
    """Return the error for an object that differs from the one that was indexed."""
    return UnreachableSource(
        f"data.root: {printable_url(url)} has changed since its index was made: {reason}; restore "
        "the object, or start a new run, which makes the index again"
    )


def outage_error(url: str, error: Exception, num_attempts: int, seconds: float) -> StoreOutage:
    """Return the error for an object that could not be read in any attempt."""
    return StoreOutage(
        f"data.root: {printable_url(url)} could not be read in {num_attempts} attempts within "
        f"{seconds:.0f} s, the last one with {describe(error)}; check the network and the server, "
        "then repeat the command to continue"
    )


def describe(error: Exception) -> str:
    """Return the type and the beginning of an error, without signatures of URLs."""
    text = _text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: Exception) -> str:
    return re.sub(r"\?\S+", "", " ".join(str(error).split()))[:200].rstrip(".")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_status(error: BaseException) -> int:
    """Return the HTTP status of an error of aiohttp, botocore or requests, or 0."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        status = getattr(response, "status_code", status)
    return status if isinstance(status, int) else 0
