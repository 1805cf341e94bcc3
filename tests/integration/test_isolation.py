"""Many clients that come and go at random: nobody gets a word of somebody else's answer."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.integration.conftest import MODEL_NAME
from tests.integration.test_disconnect import wait_until_idle

WORDS = "apple river stone cloud tiger piano lemon bread chair house horse music paper snow train water".split()


def read_some(url: str, word: str, chance: random.Random) -> tuple[str, bool]:
    """Stream a completion that repeats `word`, leave after a random number of events: (text, read to the end)."""
    body = {"model": MODEL_NAME, "prompt": f" {word}" * 12, "max_tokens": 24, "temperature": 0, "stream": True}
    events_wanted = chance.choice([1, 3, 8, 1000])
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=120) as response:
        for count, line in enumerate(filter(None, response.iter_lines())):
            if line == "data: [DONE]":
                return text, True
            if count >= events_wanted:
                break
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text, False


def test_sixteen_clients_that_come_and_go_never_get_each_others_text(demo_server) -> None:
    def client(number: int) -> list[tuple[str, str, bool]]:
        chance = random.Random(number)
        return [(WORDS[number], *read_some(demo_server.url, WORDS[number], chance)) for _ in range(6)]

    with ThreadPoolExecutor(16) as clients:
        answers = [answer for answers in clients.map(client, range(16)) for answer in answers]
    expected = {word: f" {word}" * 24 for word in WORDS}
    for word, text, complete in answers:
        assert expected[word].startswith(text), f"{word} got {text!r}"
        assert not complete or text == expected[word]
    assert sum(complete for _, _, complete in answers) > 10
    assert sum(not complete and text != "" for _, text, complete in answers) > 10
    wait_until_idle(demo_server)
