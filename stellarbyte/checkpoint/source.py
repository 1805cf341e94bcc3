"""Finds models by the users' names: "demo", a path, or a name on the Hugging Face Hub.

Models in other formats are converted once, into the user's cache. A conversion is identified by a hash of its source:
of small files by their content, of large ones by size, time of change, first and last MiB. The time is ignored in the
Hub's cache, where the files' names are hashes of their content.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stellarbyte.checkpoint.demo import DEMO, DEMO_NAME, find_demo_gguf
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.hugging_face.hub import HUB_NAME, SMALL_FILES, download
from stellarbyte.checkpoint.progress import Progress
from stellarbyte.checkpoint.safetensors_file import INDEX_FILE, read_json, weight_files
from stellarbyte.checkpoint.staging import partial_folders
from stellarbyte.config import ByteModelConfig
from stellarbyte.user_cache import cache_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # increase it when the converter's output changes: users' models are then converted again
SMALL_BYTES = 32 * 2**20
SAMPLE_BYTES = 2**20


def find_source(name: str, *, needs_weights: bool = True) -> Path:
    """The folder or file of a model, downloaded if necessary. An existing path takes precedence over the Hub.

    Raises:
        CheckpointError: the path or model does not exist, or cannot be downloaded.
    """
    if name == DEMO:
        return find_demo_gguf()
    path = Path(name)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{name} does not exist.")
    return download(name, needs_weights=needs_weights)


def resolve_model(name: str, progress: Progress | None = None, *, needs_weights: bool = True) -> Path:
    """The checkpoint folder of a model, converted first if necessary; safe in several processes at once.

    Without `needs_weights`, it may also be a folder in Hugging Face's format, and weights may be absent.

    Raises:
        CheckpointError: as `find_source` and `convert`.
    """
    try:
        cache = cache_folder()
    except RuntimeError as error:
        raise CheckpointError("There is no home folder for converted models; set STELLARBYTE_CACHE.") from error
    if name == DEMO:
        target = cache / f"{DEMO_NAME}-v{FORMAT_VERSION}"
        return target if _is_converted(target) else _convert_once(find_demo_gguf(), target, progress)
    source = find_source(name, needs_weights=needs_weights)
    if not needs_weights or _is_checkpoint(source):
        return source
    key = _identity(source)
    known = next(filter(_is_converted, sorted((cache / "models").glob(f"*-{key}"))), None)
    return _convert_once(source, cache / "models" / f"{_label(name)}-{key}", progress) if known is None else known


def _is_converted(target: Path) -> bool:
    """Whether a conversion exists: it appears complete, so one file is enough to check."""
    return (target / "config.json").is_file()


def _is_checkpoint(source: Path) -> bool:
    file = source / "config.json"
    return file.is_file() and read_json(file).get("model_type") == ByteModelConfig.model_type


def _label(name: str) -> str:
    """The readable part of a conversion's name."""
    path = Path(name)
    if path.exists():
        label = path.resolve().name.removesuffix(".gguf")
    else:
        label = name.partition("@")[0].replace("/", "--")
    return re.sub(r"[^\w.-]+", "-", label)[:80].strip(".-") or "model"


def _identity(source: Path) -> str:
    """The hash that identifies a source's conversion: 16 hexadecimal digits."""
    parts = [[FORMAT_VERSION, ""]]
    for file in [source] if source.is_file() else _files(source):
        parts.append([file.relative_to(source).as_posix() if file != source else "", _fingerprint(file)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """The files of a folder that a conversion reads."""
    files = [file for pattern in (*SMALL_FILES, INDEX_FILE) for file in sorted(folder.glob(pattern)) if file.is_file()]
    try:
        return [*files, *weight_files(folder)]
    except CheckpointError:  # the conversion will raise it
        return files


def _fingerprint(file: Path) -> list[object]:
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size <= SMALL_BYTES:
                return [size, hashlib.file_digest(stream, "sha256").hexdigest()]
            ends = stream.read(SAMPLE_BYTES)
            stream.seek(-SAMPLE_BYTES, 2)
            ends += stream.read(SAMPLE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    blob = file.resolve()
    change: object = blob.name if file.is_symlink() and blob.parent.name == "blobs" else file.stat().st_mtime_ns
    return [size, change, hashlib.sha256(ends).hexdigest()]


def _convert_once(source: Path, target: Path, progress: Progress | None) -> Path:
    """Convert into the cache, unless another process has done so in the meantime."""
    with _sole_writer(target):
        if _is_converted(target):
            return target
        for remains in partial_folders(target):  # of killed processes
            shutil.rmtree(remains, ignore_errors=True)
        logger.info("converting %s into %s, once", source, target)
        from stellarbyte.checkpoint.convert import convert  # no other start needs it

        return convert(source, target, progress=progress)


@contextmanager
def _sole_writer(target: Path) -> Iterator[None]:
    """Wait until no other process converts into `target`; the system releases the lock of a killed process."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("waiting for another process that makes %s", target)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()
