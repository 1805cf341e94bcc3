"""A sample of texts that is bounded by bytes, and the same in every run."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator

from stellarbyte.train.data.files import SourceFile
from stellarbyte.train.data.sources import DocumentReader

PART_CHARACTERS = 1 << 15  # a long document counts as several
_REPORT_SHARE = 1 / 32  # of the parts; tokens are not learned from them


def parts(files: Iterable[SourceFile], *, of_report: bool) -> Iterator[tuple[str, bytes]]:
    """Kind and UTF-8 of parts of documents: those to learn from, or those to report on."""
    for file in files:
        with DocumentReader(file) as reader:
            for document in reader:
                for start in range(0, len(document.text), PART_CHARACTERS):
                    part = document.text[start : start + PART_CHARACTERS].encode()
                    if (_rank(part, b"report") < _REPORT_SHARE) == of_report:
                        yield file.source.kind, part


def sample(texts: Iterable[bytes], max_bytes: int) -> list[str]:
    """Of at most `max_bytes`: all texts, or those with the lowest hashes, so each is as likely as any other.

    Copies of a text have one hash; all of them or none are in the sample, as far as there is room. The order is that
    of the hashes. Holds one text more than the sample.
    """
    kept: list[tuple[float, bytes]] = []  # a heap, the highest rank first
    num_bytes = 0
    for text in texts:
        heapq.heappush(kept, (-_rank(text, b"sample"), text))
        num_bytes += len(text)
        while num_bytes > max_bytes:
            num_bytes -= len(heapq.heappop(kept)[1])
    return [text.decode() for _, text in sorted(kept, reverse=True)]


def _rank(text: bytes, purpose: bytes) -> float:
    """A number in [0, 1) that looks random; ranks for two purposes do not depend on each other."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6, person=purpose).digest(), "little") / 2.0**48
