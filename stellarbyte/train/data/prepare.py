"""Texts to token shards: in one pass, in memory that does not grow, and continued after a kill."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.data.encoding import DocumentEncoder
from stellarbyte.train.data.files import SourceFile, files_of
from stellarbyte.train.data.folder_lock import LOCK, sole_writer
from stellarbyte.train.data.shard_writer import ShardWriter
from stellarbyte.train.data.shards import (
    INDEX,
    SPLITS,
    ShardIndex,
    SourceRecord,
    Split,
    SplitIndex,
    partial_of,
    read_index,
    sha256_of,
    write_json,
)
from stellarbyte.train.data.sources import Document, DocumentReader
from stellarbyte.train.errors import TrainError

PROGRESS = "progress.json"  # how far an incomplete folder is
_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 1 << 20  # encoded at once
_COMMIT_BYTES = 1 << 26  # of text that is read again after a kill

OnProgress = Callable[[int, int, int], None]  # bytes of files read, documents, tokens


def prepare(settings: Prepare, *, is_resumed: bool = False, on_progress: OnProgress | None = None) -> ShardIndex:
    """Write the shards of all documents to `settings.output`. TrainError for texts and folders that cannot be used.

    With `is_resumed`, a run that was killed continues, and the result has the bytes of one that was not; without one,
    it starts. If the folder is complete, nothing is written.
    """
    encoder, files = DocumentEncoder(settings.tokenizer), files_of(settings.sources)
    told = _settings_hash(settings, files, encoder)
    output = settings.output
    if (output / INDEX).is_file():
        return _complete(output, told, is_resumed)
    _refuse_foreign(output)
    with sole_writer(output, "preparing"):
        if (output / INDEX).is_file():  # another process has just finished
            return _complete(output, told, is_resumed)
        state = _read_state(output, told, files) if is_resumed else None
        if state is None:
            if (output / PROGRESS).is_file():
                raise TrainError(f"{output} holds an unfinished run; continue it with --resume, or delete the folder.")
            state = _new_state(told, files, len(settings.sources))
        try:
            preparation = _Preparation(settings, encoder, files, state)
            preparation.run(on_progress or (lambda *_: None))
            return preparation.finish()
        except OSError as error:
            raise TrainError(f"{output} could not be written: {error.strerror or error}.") from error


def _complete(output: Path, told: str, is_resumed: bool) -> ShardIndex:
    index = read_index(output)
    if not is_resumed:
        raise TrainError(f"{output} is complete; delete it, or name another output.")
    if index.settings_sha256 != told:
        raise TrainError(f"{output} was prepared with other settings; delete it, or name another output.")
    (output / PROGRESS).unlink(missing_ok=True)
    return index


def _refuse_foreign(output: Path) -> None:
    if not output.exists() or (output / PROGRESS).is_file():
        return
    # A run that was killed before its first state was whole has left a part of that.
    if not (output.is_dir() and set(output.iterdir()) <= {output / LOCK, partial_of(output / PROGRESS)}):
        raise TrainError(f"{output} is not an empty folder; name one that does not exist yet.")


def _settings_hash(settings: Prepare, files: list[SourceFile], encoder: DocumentEncoder) -> str:
    told = settings.model_dump_json(exclude={"output", "tokenizer"})
    return sha256_of(part.encode() for part in (told, encoder.sha256, *(str(file.path) for file in files)))


def _stamps(files: list[SourceFile]) -> list[list[int]]:
    return [[(status := file.path.stat()).st_size, status.st_mtime_ns] for file in files]


def _new_state(told: str, files: list[SourceFile], num_sources: int) -> dict[str, Any]:
    return {
        "settings": told,
        "files": _stamps(files),
        "file": 0,  # the next document is document number `document` of this file
        "document": 0,
        "chain": bytes(32).hex(),
        "text_bytes": dict.fromkeys(SPLITS, 0),
        "sources": [[0, 0] for _ in range(num_sources)],  # documents, bytes
        "shards": {split: [] for split in SPLITS},
    }


def _read_state(output: Path, told: str, files: list[SourceFile]) -> dict[str, Any] | None:
    """The state of the run to continue; None: there is none."""
    try:
        state: dict[str, Any] = json.loads((output / PROGRESS).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(f"{output / PROGRESS} cannot be read; delete {output} and start again.") from error
    if state["settings"] != told:
        raise TrainError(f"{output} was begun with other settings; delete it, or name another output.")
    for file, then, now in zip(files, state["files"], _stamps(files), strict=True):
        if then != now:
            raise TrainError(f"{file.path} changed since {output} was begun; delete the folder and start again.")
    return state


class _Preparation:
    def __init__(
        self, settings: Prepare, encoder: DocumentEncoder, files: list[SourceFile], state: dict[str, Any]
    ) -> None:
        self._settings, self._encoder, self._files, self._state = settings, encoder, files, state
        self._chain = bytes.fromhex(state["chain"])
        self._uncommitted_bytes = 0
        self._writers: dict[Split, ShardWriter] = {
            split: ShardWriter(settings.output, split, encoder.dtype, settings.shard_tokens, state["shards"][split])
            for split in SPLITS
        }
        self._position = 0  # bytes of all files that were read

    def run(self, on_progress: OnProgress) -> None:
        self._commit()  # so that a kill before the first real one leaves a run to continue
        for batch in self._batches():
            self._write(batch)
            num_documents = sum(documents for documents, _ in self._state["sources"])
            on_progress(self._position, num_documents, sum(writer.num_tokens for writer in self._writers.values()))
            if self._uncommitted_bytes >= _COMMIT_BYTES:
                self._commit()
        self._commit()

    def _batches(self) -> Iterator[list[tuple[int, Document]]]:
        """Documents to encode at once, with the numbers of their sources. The state is that after the batch."""
        batch: list[tuple[int, Document]] = []
        num_bytes = 0
        for file, document in self._documents():
            batch.append((file.source_number, document))
            num_bytes += len(document.utf8)
            if len(batch) >= _BATCH_DOCUMENTS or num_bytes >= _BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
        if batch:
            yield batch

    def _documents(self) -> Iterator[tuple[SourceFile, Document]]:
        state, before = self._state, sum(size for size, _ in self._state["files"][: self._state["file"]])
        for number in range(state["file"], len(self._files)):
            skipped = state["document"] if number == state["file"] else 0
            with DocumentReader(self._files[number]) as reader:
                for count, document in enumerate(reader, start=1):
                    if count > skipped:
                        state["file"], state["document"] = number, count
                        self._position = before + reader.position
                        yield self._files[number], document
            before += state["files"][number][0]
        self._position = before

    def _write(self, batch: list[tuple[int, Document]]) -> None:
        for (number, document), ids in zip(batch, self._encoder.encode([each.text for _, each in batch]), strict=True):
            digest = hashlib.sha256(document.utf8).digest()
            self._chain = hashlib.sha256(self._chain + digest).digest()
            split = split_of(digest, self._settings.held_out)
            self._writers[split].append(ids)
            size = len(document.utf8)
            self._state["text_bytes"][split] += size
            counts = self._state["sources"][number]
            counts[0] += 1
            counts[1] += size
            self._uncommitted_bytes += size

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        self._state["chain"] = self._chain.hex()
        write_json(self._settings.output / PROGRESS, self._state)
        self._uncommitted_bytes = 0

    def finish(self) -> ShardIndex:
        output, encoder, settings = self._settings.output, self._encoder, self._settings
        for writer in self._writers.values():
            writer.close()
        if not any(writer.num_documents for writer in self._writers.values()):
            raise TrainError("The sources contain no document that is not blank.")
        (output / "tokenizer").mkdir(exist_ok=True)
        for file in encoder.files:
            shutil.copyfile(file, output / "tokenizer" / file.name)
        made_of = ("1", encoder.sha256, self._chain.hex(), repr(settings.held_out), str(settings.shard_tokens))
        index = ShardIndex(
            format=1,
            fingerprint=sha256_of(part.encode() for part in made_of),
            settings_sha256=self._state["settings"],
            dtype="uint16" if encoder.dtype.itemsize == 2 else "uint32",
            vocab_size=encoder.vocab_size,
            bos_token_id=encoder.bos_token_id,
            eos_token_id=encoder.eos_token_id,
            pad_token_id=encoder.pad_token_id,
            tokenizer_sha256=encoder.sha256,
            held_out=settings.held_out,
            sources=[self._record(number) for number in range(len(settings.sources))],
            splits={split: self._split(split) for split in SPLITS},
        )
        write_json(output / INDEX, index.model_dump(mode="json"))
        (output / PROGRESS).unlink()
        return index

    def _record(self, number: int) -> SourceRecord:
        source, (documents, size) = self._settings.sources[number], self._state["sources"][number]
        num_files = sum(file.source_number == number for file in self._files)
        return SourceRecord(
            kind=source.kind, license=source.license, files=num_files, documents=documents, text_bytes=size
        )

    def _split(self, split: Split) -> SplitIndex:
        writer = self._writers[split]
        return SplitIndex(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=self._state["text_bytes"][split],
            shards=writer.shards,
        )


def split_of(digest: bytes, held_out: float) -> Split:
    """The side of a document with this SHA-256: the same in every run, and for every copy of it."""
    return "held_out" if int.from_bytes(digest[:8], "little") < held_out * 2.0**64 else "train"
