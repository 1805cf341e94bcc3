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
    """The texts with the lowest hashes, up to the first that would exceed `max_bytes`, in the order of the hashes.

    So every text is as likely as any other, and the order in which they come does not matter. Holds one text more than
    the sample.
    """
    kept: list[tuple[float, bytes]] = []  # a heap, the highest rank first
    num_bytes, limit = 0, 1.0  # texts of the rank `limit` did not fit
    for text in texts:
        rank = _rank(text, b"sample")
        if rank >= limit:
            continue
        heapq.heappush(kept, (-rank, text))
        num_bytes += len(text)
        while num_bytes > max_bytes:
            negative, dropped = heapq.heappop(kept)
            num_bytes -= len(dropped)
            limit = -negative
    return [text.decode() for _, text in sorted(kept, reverse=True)]


def _rank(text: bytes, purpose: bytes) -> float:
    """A number in [0, 1) that looks random; ranks for two purposes do not depend on each other."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6, person=purpose).digest(), "little") / 2.0**48
