"""Short stories and chats, written by the model of a running server; JSON lines to train on.

    stellarbyte serve &                                                          # the demo model, Apache-2.0
    python examples/storyteller/generate.py --tokens 10000000                    # writes data/stories/stories.jsonl

Every text has a number, which decides its request, its seed and its temperature: no two requests are the same. A run
that was interrupted continues after the largest number in the files. A text is kept if it has a usual length, repeats
little, and is not there yet. One that was cut short loses its last sentence and goes into FILE-unfinished.jsonl,
without its request: to learn words from, but not where an answer ends. Its words are those of the model, and so is its
licence.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

HEROES = (
    "an old lighthouse keeper|a curious fox|a girl who repairs clocks|a shy dragon|twin brothers|a travelling "
    "baker|a robot gardener|a lost puppy|a young sailor|a librarian|a tiny ghost|a brave mouse|a king without a "
    "castle|a beekeeper|a blind painter|a clever crow|a boy with a kite|a retired wizard|a snowman|a postwoman|a "
    "whale|two rival cooks|a shepherd|a night watchman|a tailor|an astronaut|a talking tree|a musician|a cat who "
    "cannot purr|a grandmother"
).split("|")
PLACES = (
    "on a foggy island|in a mountain village|at the bottom of a lake|in a busy harbour|in a city of bridges|in "
    "the desert|on the moon|in an old theatre|at a railway station|in a winter forest|on a river boat|in a school"
    " at night|in a garden of glass|at the edge of the map|in a quiet museum|under a stone bridge|in a market at "
    "dawn|on a farm|in a tower|by the sea"
).split("|")
THINGS = (
    "a broken compass|a letter without an address|a silver key|a storm|a missing song|a seed that never sleeps|a "
    "map drawn by hand|a borrowed coat|an empty chair|a race|a promise|a red umbrella|a secret door|a stubborn "
    "goat|a jar of stars|a forgotten birthday|a bell|a loaf of bread|a mirror|a long walk home|a wish|a mistake|a"
    " stranger|a lantern"
).split("|")
MOODS = "a happy|a sad|a funny|a mysterious|a gentle|an exciting|a strange|a quiet|a hopeful|a scary".split("|")
ASKED = (
    "Write {mood} short story about {hero} {place} and {thing}.",
    "Tell me {mood} story: {hero}, {place}, {thing}.",
    "Write a story for children about {hero} who finds {thing} {place}.",
    "Describe a day in the life of {hero} {place}, with {thing}.",
    "Write a short dialogue between {hero} and {other} about {thing}.",
    "Explain to {hero} in a few sentences why {thing} matters {place}.",
)
MIN_WORDS, MAX_WORDS = 40, 500
HOPELESS = 100  # texts, if none of them is kept
MAX_REPEATED = 0.2  # of the sequences of four words
_WORD = re.compile(r"[\w']+")
_CLOSING = "\"'”’*)"
_END = re.compile(rf"[.!?][{_CLOSING}]*(?=\s)")


def request_of(number: int) -> str:
    """The request with this number; the same at every run."""
    chosen = random.Random(number)
    hero, other = chosen.sample(HEROES, 2)
    fields = {"mood": chosen.choice(MOODS), "hero": hero, "other": other}
    return chosen.choice(ASKED).format(place=chosen.choice(PLACES), thing=chosen.choice(THINGS), **fields)


def without_last_sentence(text: str) -> str:
    """The text up to the end of the last sentence that another one follows; empty if there is none."""
    ends = list(_END.finditer(text))
    return text[: ends[-1].end()] if ends else ""


def reason_to_drop(text: str) -> str | None:
    """Why a text is not learned from: length, repeats; None: it is."""
    words = _WORD.findall(text.lower())
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return "length"
    sequences = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    repeated = sum(count - 1 for count in sequences.values()) / max(1, len(words) - 3)
    return "repeats" if repeated > MAX_REPEATED else None


def digest_of(text: str) -> str:
    """Equal for texts that differ in spaces, letters' case and punctuation only."""
    return hashlib.sha256(" ".join(_WORD.findall(text.lower())).encode()).hexdigest()[:32]


@dataclass
class Collection:
    """The files of texts, and what was counted in this run and the runs before it."""

    file: Path
    next_number: int = 0
    tokens: int = 0  # of the kept texts
    counts: Counter[str] = field(default_factory=Counter)
    digests: set[str] = field(default_factory=set)

    @property
    def unfinished_file(self) -> Path:
        return self.file.with_stem(f"{self.file.stem}-unfinished")

    @classmethod
    def opened(cls, file: Path) -> "Collection":
        """Continue the files, without last lines that were cut short. ValueError: this program did not write them."""
        found = cls(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        found._read(file, "kept")
        found._read(found.unfinished_file, "unfinished")
        return found

    def _read(self, file: Path, kind: str) -> None:
        if not file.exists():
            return
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        for line_number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.next_number = max(self.next_number, row["number"] + 1)
                self.tokens += row["tokens"]
                self.digests.add(digest_of(row["text"]))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{file}, line {line_number} was not written by this program.") from error
            self.counts[kind] += 1
        file.write_bytes(whole)

    def add(self, number: int, request: str, answer: str, *, tokens: int, has_ended: bool) -> None:
        """Append the text, or count why it was dropped."""
        text = answer.strip()
        is_whole = has_ended and text[-1:] in tuple(f".!?{_CLOSING}")
        if not is_whole:
            text = without_last_sentence(text)
        reason, digest = reason_to_drop(text), digest_of(text)
        if reason is None and digest in self.digests:
            reason = "duplicate"
        self.counts[reason or ("kept" if is_whole else "unfinished")] += 1
        if reason is not None:
            return
        self.digests.add(digest)
        self.tokens += tokens
        row: dict[str, Any] = {"number": number, "tokens": tokens, "text": text}
        if is_whole:
            row["messages"] = [{"role": "user", "content": request}, {"role": "assistant", "content": text}]
        with (self.file if is_whole else self.unfinished_file).open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")


async def write_texts(client: AsyncOpenAI, model: str, collection: Collection, options: argparse.Namespace) -> None:
    """Keep `options.concurrency` requests running until enough tokens are kept.

    Raises:
        APIError: a request failed.
        ValueError: of the first texts none was kept.
    """
    started_s, before = time.monotonic(), collection.tokens

    async def work() -> None:
        while collection.tokens < options.tokens:
            number = collection.next_number
            collection.next_number += 1
            await _write_one(client, model, collection, number, options.max_tokens)
            if collection.tokens == 0 and collection.counts.total() >= HOPELESS:
                raise ValueError(f"{model} writes no text that is kept: {_shown(collection.counts)}.")
            if number % 500 == 0:
                speed = (collection.tokens - before) / (time.monotonic() - started_s)
                print(
                    f"{collection.tokens:,} tokens kept, {speed:,.0f} a second, {_shown(collection.counts)}", flush=True
                )

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(options.concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _write_one(client: AsyncOpenAI, model: str, collection: Collection, number: int, max_tokens: int) -> None:
    request = request_of(number)
    answer: Any = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": request}],
        seed=number,
        temperature=0.7 + 0.1 * (number % 5),
        top_p=0.95,
        max_tokens=max_tokens,
    )
    choice = answer.choices[0]
    tokens, has_ended = answer.usage.completion_tokens, choice.finish_reason == "stop"
    collection.add(number, request, choice.message.content or "", tokens=tokens, has_ended=has_ended)


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


async def run(options: argparse.Namespace) -> None:
    collection = Collection.opened(options.out)
    async with AsyncOpenAI(base_url=f"{options.url}/v1", api_key=options.api_key, timeout=600, max_retries=3) as client:
        model = options.model
        if model is None:
            model = (await client.models.list()).data[0].id
        await write_texts(client, model, collection, options)
    print(f"{options.out}: {collection.tokens:,} tokens of {model}; {_shown(collection.counts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server; default: %(default)s")
    parser.add_argument("--api-key", default="unused", help="of the server, if it wants one")
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="to keep in all; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=600, help="of an answer; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("data/stories/stories.jsonl"), help="default: %(default)s")
    try:
        asyncio.run(run(parser.parse_args()))
    except (APIError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
