"""Continues the merges of byte-level BPE on counted pieces, by the rules of tokenizers' BpeTrainer.

The most frequent pair of neighbours becomes a token, then the next. Of equally frequent pairs, the one with the lower
ids comes first. Counts are Python's integers, so none overflows.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

Pair = tuple[int, int]


def continue_merges(
    words: Iterable[tuple[Sequence[int], int]], tokens: Sequence[str], size: int, min_frequency: int
) -> tuple[list[str], list[Pair]]:
    """New tokens, so that there are `size` or as many as the words give, and the new merges.

    Args:
        words: pieces as ids of the tokens so far, and how often each occurs.
        tokens: the spelling of every id so far.

    Merges may be more than tokens: two merges can spell the same token.
    """
    spelled = list(tokens)
    id_of = {token: number for number, token in enumerate(spelled)}
    corpus = _Corpus(words)
    heap = [(-count, pair) for pair, count in corpus.counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(spelled) < size:
        negative, pair = heapq.heappop(heap)
        count = corpus.counts[pair]
        if count != -negative:  # it changed since
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < min_frequency:
            break
        token = spelled[pair[0]] + spelled[pair[1]]
        if token not in id_of:
            id_of[token] = len(spelled)
            spelled.append(token)
        merges.append(pair)
        for formed in corpus.merge(pair, id_of[token]):
            heapq.heappush(heap, (-corpus.counts[formed], formed))
    return spelled[len(tokens) :], merges


class _Corpus:
    """Words in which pairs become tokens.

    Attributes:
        counts: of every pair.
    """

    def __init__(self, words: Iterable[tuple[Sequence[int], int]]) -> None:
        self.counts: defaultdict[Pair, int] = defaultdict(int)
        self._words: list[list[int]] = []
        self._frequencies: list[int] = []
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have, or once had, the pair
        for ids, frequency in words:
            if len(ids) < 2:
                continue
            for pair in itertools.pairwise(ids):
                self.counts[pair] += frequency
                self._where[pair].add(len(self._words))
            self._words.append(list(ids))
            self._frequencies.append(frequency)

    def merge(self, pair: Pair, token: int) -> set[Pair]:
        """Replace the pair everywhere, from left to right. Returns the pairs that occur more often than before."""
        changes: defaultdict[Pair, int] = defaultdict(int)
        grown: set[Pair] = set()
        for number in self._where.pop(pair):
            word, frequency = self._words[number], self._frequencies[number]
            merged = _replaced(word, pair, token)
            if len(merged) == len(word):
                continue
            for old in itertools.pairwise(word):
                changes[old] -= frequency
            for new in itertools.pairwise(merged):
                changes[new] += frequency
                if token in new:
                    self._where[new].add(number)
                    grown.add(new)
            self._words[number] = merged
        for changed, change in changes.items():
            self.counts[changed] += change
        return {each for each in grown if self.counts[each] > 0}


def _replaced(word: list[int], pair: Pair, token: int) -> list[int]:
    merged: list[int] = []
    at = 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            merged.append(token)
            at += 2
        else:
            merged.append(word[at])
            at += 1
    return merged
