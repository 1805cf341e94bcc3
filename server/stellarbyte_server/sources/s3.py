"""Adapters in S3 and stores with its API. Address, region and credentials are boto3's (AWS_ENDPOINT_URL …)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stellarbyte_server.config.adapter_source import AdapterSource
from stellarbyte_server.sources.outcome import FetchError
from stellarbyte_server.sources.remote import FILES, RemoteAdapter

_CHUNK_BYTES = 2**20
_ABSENT = ("404", "NoSuchKey", "NoSuchBucket")
_FORBIDDEN = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_CHANGED = ("412", "PreconditionFailed")


def find(source: AdapterSource) -> RemoteAdapter:
    """The adapter, in the current version of its two objects; FetchError."""
    bucket, prefix = source.path[0], "/".join(source.path[1:])
    client = _client()
    tags: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name in FILES:
        with _in_words(f"s3://{bucket}/{prefix}/{name}"):
            head = client.head_object(Bucket=bucket, Key=f"{prefix}/{name}")
            tags[name], sizes[name] = head["ETag"], head["ContentLength"]

    def download(name: str, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        with _in_words(f"s3://{bucket}/{prefix}/{name}"), open(folder / name, "wb") as file:
            content = client.get_object(Bucket=bucket, Key=f"{prefix}/{name}", IfMatch=tags[name])
            for chunk in content["Body"].iter_chunks(_CHUNK_BYTES):
                file.write(chunk)
        return folder / name

    version = hashlib.sha256("\n".join(tags[name] for name in FILES).encode()).hexdigest()[:16]
    return RemoteAdapter(version=version, sizes=sizes, download=download)


def _client() -> Any:
    """boto3's client; FetchError without boto3 or a region."""
    try:
        import boto3  # of the extra `s3`
        from botocore.config import Config
    except ImportError:
        message = "Adapters in S3 need boto3 on the server: pip install 'stellarbyte[s3]'."
        raise FetchError(400, message) from None
    limits = Config(connect_timeout=10, read_timeout=30, retries={"total_max_attempts": 3})
    with _in_words("S3"):
        return boto3.Session().client("s3", config=limits)


@contextmanager
def _in_words(address: str) -> Iterator[None]:
    """Errors of boto3 as FetchError."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _refused(address, str(error.response.get("Error", {}).get("Code", ""))) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.NoAuthTokenError):
        message = "The server has no credentials for S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        raise FetchError(403, message) from None
    except exceptions.ParamValidationError:
        raise FetchError(400, f"{address} is not a name that S3 allows.") from None
    except (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError):
        raise FetchError(504, f"S3 does not answer in time for {address}.") from None
    except exceptions.BotoCoreError as error:
        raise FetchError(502, f"{address} cannot be read from S3 ({type(error).__name__}).") from None


def _refused(address: str, code: str) -> FetchError:
    if code in _ABSENT:
        return FetchError(404, f"S3 has no {address}.")
    if code in _FORBIDDEN:
        return FetchError(403, f"The server may not read {address}, or it does not exist ({code}).")
    if code in _CHANGED:
        return FetchError(502, f"{address} changed while it was read; try again.")
    return FetchError(502, f"S3 refuses {address} ({code:.80}).")
