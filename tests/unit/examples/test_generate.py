"""examples/storyteller/generate.py: which texts are kept, and that a run continues where it was interrupted."""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIError, AsyncOpenAI

from examples.storyteller import generate
from examples.storyteller.generate import Collection, digest_of, reason_to_drop, request_of, without_last_sentence

STORY = " ".join(f"word{n}" for n in range(60)) + "."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STORY, None),
        ("Once. The end.", "length"),
        (" ".join(f"word{n}" for n in range(501)) + ".", "length"),
        ("The fox ran over the hill again and again. " * 8, "repeats"),
    ],
)
def test_texts_are_kept_for_what_they_are(text: str, reason: str | None) -> None:
    assert reason_to_drop(text) == reason


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("One. Two! Three", "One. Two!"),
        ('"Who?" she asked. "It is', '"Who?" she asked.'),
        ('He said: "No." Then\n', 'He said: "No."'),
        ("One. Two.", "One."),
        ("It was 3.5 miles", ""),
        ("", ""),
    ],
)
def test_a_text_that_was_cut_short_ends_with_a_whole_sentence(text: str, rest: str) -> None:
    assert without_last_sentence(text) == rest


def test_requests_are_many_and_always_the_same() -> None:
    asked = Counter(request_of(number) for number in range(2000))
    assert len(asked) > 1900 and request_of(17) == request_of(17)
    assert not any("{" in request for request in asked)


def test_equal_words_are_equal_texts() -> None:
    assert digest_of("The fox, asleep.") == digest_of("the  fox asleep!") != digest_of("the fox awake")


class Teacher:
    """Answers each request with a text of its seed; every third one is cut short, every fifth a copy.

    `num_short`: so many answers at first are of three words.
    """

    def __init__(self, fails_at: int | None = None, num_short: int = 0) -> None:
        self.num_short = num_short
        self.seeds: list[int] = []
        self.running = self.most_running = 0
        self.fails_at = fails_at

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        seed = body["seed"]
        if seed == self.fails_at:
            return httpx.Response(400, json={"error": {"message": "no more"}})
        self.seeds.append(seed)
        assert body["messages"] == [{"role": "user", "content": request_of(seed)}]
        copied = 0 if seed % 5 == 4 else seed
        text = f"It began {copied} years ago. " + " ".join(f"w{copied}n{place}" for place in range(60)) + "."
        text += f" Then the {copied}" * (seed % 3 == 2)
        text = "No, thank you." if len(self.seeds) <= self.num_short else text
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "length" if seed % 3 == 2 else "stop"
        usage = {"prompt_tokens": 5, "completion_tokens": 100, "total_tokens": 105}
        fields = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return httpx.Response(200, json={**fields, "choices": [choice], "usage": usage})


def write(file: Path, tokens: int, teacher: Teacher, concurrency: int = 4) -> Collection:
    collection = Collection.opened(file)
    options = argparse.Namespace(tokens=tokens, concurrency=concurrency, max_tokens=600)

    async def run() -> None:
        transport = httpx.AsyncClient(transport=httpx.MockTransport(teacher))
        async with AsyncOpenAI(base_url="http://x/v1", api_key="x", max_retries=0, http_client=transport) as client:
            await generate.write_texts(client, "m", collection, options)

    asyncio.run(run())
    return collection


def rows(file: Path) -> Iterator[dict]:
    return (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())


def test_an_interrupted_run_continues_and_keeps_no_text_twice(tmp_path: Path) -> None:
    file, unfinished = tmp_path / "stories" / "stories.jsonl", tmp_path / "stories" / "stories-unfinished.jsonl"
    first = Teacher()
    collection = write(file, 500, first)
    assert 500 <= collection.tokens <= 500 + 3 * 100 and 1 < first.most_running <= 4
    largest = max(row["number"] for row in (*rows(file), *rows(unfinished)))
    with file.open("a", encoding="utf-8") as opened:
        opened.write('{"number": 99, "tok')  # the process was killed while it wrote
    second = Teacher()
    write(file, 1500, second)
    numbers, others = ([row["number"] for row in rows(each)] for each in (file, unfinished))
    assert min(second.seeds) == largest + 1
    assert len({*numbers, *others}) == len(numbers) + len(others)
    assert all(n % 3 != 2 for n in numbers) and others and all(n % 3 == 2 for n in others)
    texts = [row["text"] for row in (*rows(file), *rows(unfinished))]
    assert len({digest_of(text) for text in texts}) == len(texts)
    for row in rows(file):
        user, assistant = row["messages"]
        assert user["content"] == request_of(row["number"]) and assistant["content"] == row["text"]
    for row in rows(unfinished):
        assert "messages" not in row and row["text"].endswith("n59.")
    asked = Teacher()
    assert write(file, 1500, asked).tokens >= 1500 and asked.seeds == []  # nothing is left to do


def test_only_many_texts_of_which_none_is_kept_end_a_run(tmp_path: Path) -> None:
    """More requests than that may run at once, before the first one is answered."""
    teacher = Teacher(num_short=generate.HOPELESS - 10)
    write(tmp_path / "some.jsonl", 500, teacher, concurrency=2 * generate.HOPELESS)
    assert len(list(rows(tmp_path / "some.jsonl"))) >= 2
    with pytest.raises(ValueError, match=r"m writes no text that is kept: 100 length\."):
        write(tmp_path / "none.jsonl", 500, Teacher(num_short=10_000), concurrency=2 * generate.HOPELESS)


def test_a_failed_request_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "stories.jsonl"
    with pytest.raises(APIError, match="no more"):
        write(file, 10_000, Teacher(fails_at=20))
    assert len(list(rows(file))) >= 10
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl, line 1 was not written by this program"):
        Collection.opened(tmp_path / "other.jsonl")
