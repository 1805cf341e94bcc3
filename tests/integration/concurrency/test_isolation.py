"""Many clients that come and go at random: nobody gets a word of somebody else's answer."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.support.models.references import MODEL_NAME
from tests.support.over_http import wait_until_idle

NUM_CLIENTS = 16
MAX_TOKENS = 24  # no more than the references have


def read_some(url: str, prompt: str, chance: random.Random) -> tuple[str, bool]:
    """Stream a greedy completion, leave after a random number of events: (text, read to the end)."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
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


def test_sixteen_clients_that_come_and_go_never_get_each_others_text(demo_server, tokenizer, references) -> None:
    def client(number: int) -> list[tuple[int, str, bool]]:
        chance = random.Random(number)
        asked = number % len(references)
        return [(asked, *read_some(demo_server.url, references[asked].prompt, chance)) for _ in range(5)]

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        answers = [answer for answers in clients.map(client, range(NUM_CLIENTS)) for answer in answers]
    expected = [tokenizer.decode(reference.token_ids[:MAX_TOKENS]) for reference in references]
    for number, text, complete in answers:
        assert expected[number].startswith(text), f"{references[number].prompt!r} got {text!r}"
        assert not complete or text == expected[number]
    assert sum(complete for _, _, complete in answers) > 10
    assert sum(not complete and text != "" for _, text, complete in answers) > 10
    wait_until_idle(demo_server)
