"""Adapters on the Hugging Face Hub. Address, token and proxies are huggingface_hub's (HF_ENDPOINT, HF_TOKEN …)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

from stellarbyte_server.config.adapter_source import AdapterSource
from stellarbyte_server.sources.outcome import FetchError
from stellarbyte_server.sources.remote import FILES, RemoteAdapter

CALL_LIMIT_S = 30.0
_TOKEN_ADVICE = "the server's HF_TOKEN gives access"


def find(source: AdapterSource) -> RemoteAdapter:
    """The adapter, at the current commit of its revision; FetchError."""
    repository = "/".join(source.path)
    with _in_words(source):
        revision = "main" if source.version is None else source.version
        info = HfApi().model_info(repository, revision=revision, timeout=CALL_LIMIT_S)
        commit = info.sha
        # --adapter-source may not allow the repository's new name.
        if info.id.casefold() != repository.casefold():
            raise FetchError(403, f"The repository {repository} is now called {info.id}; load it by that name.")
        if commit is None:
            raise FetchError(502, f"The Hub names no commit of {source}.")
        sizes = {name: _size(repository, name, commit) for name in FILES}

    def download(name: str, folder: Path) -> Path:
        with _in_words(source):
            return Path(hf_hub_download(repository, name, revision=commit, local_dir=folder))

    return RemoteAdapter(version=commit, sizes=sizes, download=download)


def _size(repository: str, name: str, commit: str) -> int:
    try:
        size = get_hf_file_metadata(hf_hub_url(repository, name, revision=commit), timeout=CALL_LIMIT_S).size
    except errors.RemoteEntryNotFoundError:
        raise FetchError(404, f"The repository {repository} has no file {name}.") from None
    return 0 if size is None else size  # the download itself is bounded


@contextmanager
def _in_words(source: AdapterSource) -> Iterator[None]:
    """Errors of the Hub and of the connection as FetchError."""
    repository = "/".join(source.path)
    try:
        yield
    except errors.GatedRepoError:
        raise FetchError(403, f"The repository {repository} is gated: accept its terms; {_TOKEN_ADVICE}.") from None
    except errors.RepositoryNotFoundError:
        raise FetchError(
            404, f"The Hub has no repository {repository}, or keeps it private ({_TOKEN_ADVICE})."
        ) from None
    except errors.RevisionNotFoundError:
        message = f"The repository {repository} has no revision {source.version!r}: no such branch, tag or commit."
        raise FetchError(404, message) from None
    except errors.HFValidationError:
        raise FetchError(400, f"{repository!r} is not a name that the Hub allows.") from None
    except errors.OfflineModeIsEnabled:
        raise FetchError(502, "The server may not access the Hub, because HF_HUB_OFFLINE is set.") from None
    except errors.HfHubHTTPError as error:
        raise _refused(source, error.response.status_code) from None
    except httpx.HTTPStatusError as error:
        raise _refused(source, error.response.status_code) from None
    except httpx.TimeoutException:
        raise FetchError(504, f"{constants.ENDPOINT} does not answer in time.") from None
    except (httpx.TransportError, errors.LocalEntryNotFoundError):
        raise FetchError(502, f"{constants.ENDPOINT} cannot be reached, or closed the connection.") from None


def _refused(source: AdapterSource, status: int) -> FetchError:
    if status in (401, 403):
        return FetchError(403, f"The server may not read {source} ({_TOKEN_ADVICE}).")
    return FetchError(502, f"{constants.ENDPOINT} answers with the status {status}.")
