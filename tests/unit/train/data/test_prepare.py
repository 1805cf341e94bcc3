"""Texts to token shards: they hold the ids of a hand-made tokenizer, also after kills, and memory stays small."""

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.sources import Source
from stellarbyte.train.data import prepare as prepare_module
from stellarbyte.train.data.prepare import prepare
from stellarbyte.train.data.shard_writer import ShardWriter
from stellarbyte.train.data.shards import ShardIndex, Split, read_index
from stellarbyte.train.errors import TrainError
from tests.support.training.byte_tokenizer import EOS, document_ids_of, save_byte_tokenizer

TEXTS = [f"{number}: 床前明月光{EOS}" * (number % 7 + 1) for number in range(300)]
HELD_OUT = 0.2


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two files and a tokenizer."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines[:200]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[200:]).encode()))
    save_byte_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def settings(folder: Path, output: str = "out", **changed: object) -> Prepare:
    sources = [Source(files=[str(folder / name)], license=name) for name in ("a.jsonl", "b.jsonl.gz")]
    given = {"sources": sources, "held_out": HELD_OUT, "shard_tokens": 4000, **changed}
    return Prepare(output=folder / output, tokenizer=folder / "tokenizer", **given)


def is_held_out(text: str) -> bool:
    """By the definition: the first 8 bytes of the SHA-256 as a number below the share of 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < int(HELD_OUT * 2**64)


def documents_of(folder: Path, split: Split) -> list[list[int]]:
    """Read by numpy as the format says, without our code."""
    index = json.loads((folder / "index.json").read_text())
    documents = []
    for number, shard in enumerate(index["splits"][split]["shards"]):
        ids = np.fromfile(folder / f"{split}-{number:05}.tokens", "<u2" if index["dtype"] == "uint16" else "<u4")
        ends = np.fromfile(folder / f"{split}-{number:05}.ends", "<i8")
        assert (len(ids), len(ends)) == (shard["tokens"], shard["documents"])
        documents += [part.tolist() for part in np.split(ids, ends)[:-1]]
        assert ends[-1] == len(ids)
    return documents


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_shards_hold_every_document_with_its_tokens_on_its_side(texts: Path) -> None:
    index = prepare(settings(texts))
    sides: dict[Split, list[str]] = {
        "train": [text for text in TEXTS if not is_held_out(text)],
        "held_out": [text for text in TEXTS if is_held_out(text)],
    }
    assert min(map(len, sides.values())) > 30
    for split, expected in sides.items():
        assert documents_of(texts / "out", split) == [document_ids_of(text) for text in expected]
        counted = index.splits[split]
        assert counted.text_bytes == sum(len(text.encode()) for text in expected)
        assert (counted.documents, counted.tokens) == (len(expected), counted.text_bytes + 2 * len(expected))
    *full, _ = index.splits["train"].shards
    assert len(full) > 3
    assert all(4000 <= shard.tokens < 4000 + 300 for shard in full)
    assert [(source.license, source.files, source.documents) for source in index.sources] == [
        ("a.jsonl", 1, 200),
        ("b.jsonl.gz", 1, 100),
    ]
    assert (index.vocab_size, index.bos_token_id, index.eos_token_id, index.pad_token_id) == (260, 1, 2, 0)
    assert content_of(texts / "out" / "tokenizer") == content_of(texts / "tokenizer")
    assert read_index(texts / "out") == index


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary(vocab_size: int, dtype: str, texts: Path) -> None:
    save_byte_tokenizer(texts / "tokenizer", vocab_size=vocab_size)
    assert prepare(settings(texts, held_out=0)).dtype == dtype
    assert documents_of(texts / "out", "train") == [document_ids_of(text) for text in TEXTS]


def test_fingerprints_are_equal_exactly_when_the_tokens_are(texts: Path) -> None:
    first = prepare(settings(texts)).fingerprint
    (texts / "b.jsonl.gz").rename(texts / "c.jsonl.gz")
    moved = [Source(files=[f"{texts}/a.jsonl", f"{texts}/c.jsonl.gz"])]
    assert prepare(settings(texts, "moved", sources=moved)).fingerprint == first
    assert content_of(texts / "moved")["train-00000.tokens"] == content_of(texts / "out")["train-00000.tokens"]
    other_order = [Source(files=[f"{texts}/c.jsonl.gz", f"{texts}/a.jsonl"])]
    fingerprints = {
        first,
        prepare(settings(texts, "order", sources=other_order)).fingerprint,
        prepare(settings(texts, "side", sources=moved, held_out=0.3)).fingerprint,
        prepare(settings(texts, "part", sources=[Source(files=[f"{texts}/a.jsonl"])])).fingerprint,
    }
    save_byte_tokenizer(texts / "tokenizer", vocab_size=300)
    fingerprints.add(prepare(settings(texts, "tokenizer-2", sources=moved)).fingerprint)
    assert len(fingerprints) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.data import prepare, shard_writer

prepare._BATCH_DOCUMENTS, prepare._COMMIT_BYTES = 7, 1 << 11
place, left, settings = sys.argv[1], int(sys.argv[2]), Prepare.model_validate_json(sys.argv[3])

def killing(function, before):
    def run(*arguments):
        global left
        if before:
            left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if not before:
            left -= 1
        return result
    return run

if place == "rename":
    Path.replace = killing(Path.replace, before=True)
elif place == "flushed":
    shard_writer.ShardWriter.flush = killing(shard_writer.ShardWriter.flush, before=False)
on_progress = killing(lambda *_: None, before=True) if place == "batch" else None
prepare.prepare(settings, is_resumed=True, on_progress=on_progress)
"""


@pytest.mark.parametrize(
    ("place", "times"), [("batch", (3, 20, 11)), ("rename", (1, 3, 2, 12)), ("flushed", (2, 5, 9))]
)
def test_runs_that_were_killed_end_with_the_bytes_of_one_that_was_not(
    place: str, times: tuple[int, ...], texts: Path
) -> None:
    """kill -9 between batches, before the rename of the state, and after shards were written but not the state."""
    whole = settings(texts, "whole")
    prepare(whole)
    told = settings(texts, "killed").model_dump_json()
    for time in times:
        killed = subprocess.run([sys.executable, "-c", KILLED, place, str(time), told], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (texts / "killed" / "index.json").exists()
    if (texts / "killed" / "progress.json").exists():  # otherwise it was killed before anything was written
        with pytest.raises(TrainError, match="holds an unfinished run; continue it with --resume"):
            prepare(settings(texts, "killed"))
    read = []
    prepare(settings(texts, "killed"), is_resumed=True, on_progress=lambda *counts: read.append(counts))
    assert content_of(texts / "killed") == content_of(texts / "whole")
    sizes = sum((texts / name).stat().st_size for name in ("a.jsonl", "b.jsonl.gz"))
    assert read == sorted(read)
    assert read[-1][0] <= sizes
    assert read[-1][1] == len(TEXTS)


def interrupted(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_DOCUMENTS", 10)

    def stop(_read: int, documents: int, _tokens: int) -> None:
        if documents >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(texts), on_progress=stop)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz"])
def test_a_run_is_not_continued_with_other_texts(name: str, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(texts, monkeypatch)
    status = (texts / name).stat()
    os.utime(texts / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(TrainError, match=rf"{name} changed since .*out was begun; delete the folder and start again\."):
        prepare(settings(texts), is_resumed=True)


@pytest.mark.parametrize("changed", [{"held_out": 0.3}, {"shard_tokens": 1}])
def test_a_run_is_not_continued_with_other_settings(
    changed: dict[str, object], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(texts, monkeypatch)
    with pytest.raises(TrainError, match="was begun with other settings; delete it, or name another output"):
        prepare(settings(texts, **changed), is_resumed=True)
    prepare(settings(texts), is_resumed=True)
    with pytest.raises(TrainError, match="was prepared with other settings"):
        prepare(settings(texts, **changed), is_resumed=True)


def test_a_complete_folder_is_left_alone(texts: Path) -> None:
    index, before = prepare(settings(texts)), content_of(texts / "out")
    assert prepare(settings(texts), is_resumed=True) == index
    with pytest.raises(TrainError, match="is complete; delete it, or name another output"):
        prepare(settings(texts))
    assert content_of(texts / "out") == before


def test_other_files_are_not_touched(texts: Path) -> None:
    (texts / "out").mkdir()
    (texts / "out" / "thesis.txt").touch()
    with pytest.raises(TrainError, match="is not an empty folder"):
        prepare(settings(texts))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_two_processes_lock_each_other_out(is_resumed: bool, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused while the first writes, and both ways work when it has ended."""
    monkeypatch.setattr(prepare_module, "_BATCH_DOCUMENTS", 10)
    told = (settings(texts).model_dump_json(), is_resumed)
    second = (
        "import sys; from stellarbyte.train.config.prepare import Prepare; "
        "from stellarbyte.train.data.prepare import prepare; "
        "prepare(Prepare.model_validate_json(sys.argv[1]), is_resumed=sys.argv[2] == 'True')"
    )
    ended = []

    def start_second(_read: int, documents: int, _tokens: int) -> None:
        if documents >= 50 and not ended:
            command = [sys.executable, "-c", second, *map(str, told)]
            ended.append(subprocess.run(command, capture_output=True, text=True))

    index = prepare(settings(texts), on_progress=start_second)
    assert ended[0].returncode == 1
    assert ended[0].stderr.endswith(f"TrainError: Another process is preparing {texts / 'out'}.\n"), ended[0].stderr
    assert prepare(settings(texts), is_resumed=True) == index


def test_a_full_disk_is_one_sentence(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: ShardWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "flush", fail)
    with pytest.raises(TrainError, match=r"out could not be written: No space left on device\.$"):
        prepare(settings(texts))


def test_texts_that_are_all_blank(texts: Path) -> None:
    (texts / "blank.txt").write_text(" \n\t\n")
    with pytest.raises(TrainError, match="contain no document that is not blank"):
        prepare(settings(texts, sources=[Source(files=[str(texts / "blank.txt")])]))


def test_tokenizers_that_cannot_be_used(texts: Path) -> None:
    config = texts / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "eos_token": "</s>"}))
    with pytest.raises(TrainError, match=r"tokenizer_config\.json names no eos_token of the vocabulary\."):
        prepare(settings(texts))
    config.unlink()
    with pytest.raises(TrainError, match="does not exist or is not valid JSON; it names the eos_token"):
        prepare(settings(texts))
    (texts / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(TrainError, match=r"tokenizer\.json cannot be read: "):
        prepare(settings(texts))
    (texts / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(TrainError, match=r"tokenizer\.json does not exist; make it with stellarbyte train tokenizer"):
        prepare(settings(texts))


def test_a_folder_that_is_not_complete_or_was_cut_is_not_read(texts: Path) -> None:
    index: ShardIndex = prepare(settings(texts))
    file = texts / "out" / "train-00001.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    size = index.splits["train"].shards[1].tokens * 2
    with pytest.raises(TrainError, match=rf"train-00001\.tokens must have {size:,} bytes, as index\.json says"):
        read_index(texts / "out")
    (texts / "out" / "index.json").write_text('{"format": 2}')
    with pytest.raises(TrainError, match="was not written by this version"):
        read_index(texts / "out")
    with pytest.raises(TrainError, match=r"has no index\.json; make it with stellarbyte train prepare"):
        read_index(texts)


PEAK = """
import resource, sys
from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.data.prepare import prepare
prepare(Prepare.model_validate_json(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """Six times as much text (15 MB more) may take 6 MB more."""
    save_byte_tokenizer(tmp_path / "tokenizer")
    peaks = []
    for size in (3, 18):
        file = tmp_path / f"{size}.jsonl"
        with file.open("w") as opened:
            for number in range(size * 1000):
                opened.write(json.dumps({"text": f"{number:010}" * 100}) + "\n")
        sources = [Source(files=[str(file)])]
        told = settings(tmp_path, f"out-{size}", sources=sources, shard_tokens=1 << 22).model_dump_json()
        environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, told], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(int(ran.stdout) >> 10)
    assert peaks[1] - peaks[0] < 6, peaks
