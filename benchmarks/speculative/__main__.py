"""Tokens per second of one stream with and without drafts, in turns on one engine.

    python -m benchmarks.speculative                          the demo model: JSON by a schema, an edit, random text
    python -m benchmarks.speculative --streams 8 --turns 5    eight requests at once
    python -m benchmarks.speculative --device cuda            on a GPU

Each task is answered in turns with `speculative` false and true; the answers must be equal. Times are from the first
token to the last one, so prompts do not count.
"""

import argparse
import random
import statistics
import time
from typing import Any

import msgspec
from tokenizers import Tokenizer

from benchmarks.support.record import write_result
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 4,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "first_name": {"type": "string", "maxLength": 20},
                    "family_name": {"type": "string", "maxLength": 20},
                    "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2020},
                    "is_still_alive": {"type": "boolean"},
                    "field_of_work": {"enum": ["mathematics", "physics", "literature", "music"]},
                },
                "required": ["first_name", "family_name", "year_of_birth", "is_still_alive", "field_of_work"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}
STORY = (
    "The harbour master kept a book of every ship that came in at night. He wrote the name, the hour and the colour of"
    " her lamps, and he never left a line empty. When the fog was thick he listened for the bells and guessed. His"
    " daughter read the book in winter, when nothing came but ice, and asked him why some names were written twice. "
)


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def tasks(tokenizer: Tokenizer, seed: int, num_words: int) -> dict[str, GenerationRequest]:
    """One request for each task."""
    chance = random.Random(seed)
    words = (STORY * (1 + num_words // 60)).split()[:num_words]
    place = chance.randrange(num_words // 3, 2 * num_words // 3)
    edited = " ".join([*words[:place], chance.choice(["green", "silver", "yesterday"]), *words[place + 1 :]])
    text = " ".join(words)

    def request(prompt: str, max_tokens: int, prediction: str = "", **sampling: Any) -> GenerationRequest:
        params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=not sampling.get("grammar"), **sampling)
        return GenerationRequest(
            request_id="",
            prompt_token_ids=tuple(tokenizer.encode(prompt).ids),
            sampling=params,
            prediction_token_ids=tuple(tokenizer.encode(prediction).ids),
        )

    length = len(tokenizer.encode(text).ids)
    # The demo model is too small to follow an instruction to edit. What it copies here is as an edited text is: one
    # that it has just read, but for a word.
    return {
        "json": request(
            chat("Name four scientists or artists, as JSON."), 400, temperature=0.0, grammar=json_grammar(SCHEMA)
        ),
        "edit": request(f"{text}\n\n{edited}\n\n{text}\n\n", length, temperature=0.0),
        "edit, predicted": request(f"{text}\n\n{edited}\n\n{text}\n\n", length, prediction=edited, temperature=0.0),
        "random": request(chat("Tell me a story about a lighthouse."), num_words, temperature=1.0),
    }


def run(core: EngineCore, request: GenerationRequest, num_streams: int, name: str) -> tuple[float, list[list[int]]]:
    """Tokens per second of all streams from the first token to the last, and the answers' tokens."""
    answers: dict[str, list[int]] = {}
    for number in range(num_streams):
        request_id = f"{name} {number}"
        answers[request_id] = []
        sampling = msgspec.structs.replace(request.sampling, return_token_ids=True, choice=number)
        core.submit(msgspec.structs.replace(request, request_id=request_id, sampling=sampling))
    open_ids, num_tokens, started_s = set(answers), 0, 0.0
    while open_ids:
        core.take_replies()
        if not core.has_work:
            time.sleep(0.001)  # the grammar is being compiled
            continue
        for delta in core.step():
            if not isinstance(delta, Delta):
                continue
            if all(answers.values()):
                started_s = started_s or time.perf_counter()
                num_tokens += delta.num_tokens
            answers[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                open_ids.discard(delta.request_id)
    return num_tokens / (time.perf_counter() - started_s), list(answers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--words", type=int, default=300, help="words of the text to edit, and tokens of random text")
    parser.add_argument("--tasks", nargs="+", default=["json", "edit", "edit, predicted", "random"])
    options = parser.parse_args()
    settings = EngineSettings(
        model=options.model,
        device=options.device,
        quantization=options.quantization,
        enable_prefix_caching=True,
        speculative="ngram",
    )
    core, info = build_core(settings)
    while core.prepare():  # a GPU's kernels
        time.sleep(0.005)
    tokenizer = Tokenizer.from_file(str(resolve_model(options.model) / "tokenizer.json"))
    figures: dict[str, Any] = {"streams": options.streams, "device": info.device, "quantization": info.quantization}
    for name in options.tasks:
        rates: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(options.turns):
            request = tasks(tokenizer, turn, options.words)[name]
            answers = []
            for drafts in (False, True) if turn % 2 else (True, False):
                each = msgspec.structs.replace(request, speculative=drafts)
                rate, tokens = run(core, each, options.streams, f"{name} {turn} {drafts}")
                rates[drafts].append(rate)
                answers.append(tokens)
            if answers[0] != answers[1]:
                print(f"{name}, turn {turn}: the answers differ (a near tie)")
        without, with_drafts = (statistics.median(rates[drafts]) for drafts in (False, True))
        ratio = statistics.median([b / a for a, b in zip(rates[False], rates[True], strict=True)])
        figures[name] = {"tok_s_without": without, "tok_s_with": with_drafts, "ratio": ratio}
        print(f"{name:16} {without:8.1f} tok/s without, {with_drafts:8.1f} with drafts: {ratio:.2f} times")
    totals = core.drafts.totals if core.drafts is not None else None
    if totals is not None:
        figures["draft_tokens"], figures["accepted_tokens"] = totals.num_draft_tokens, totals.num_accepted_tokens
        print(f"{totals.num_accepted_tokens} of {totals.num_draft_tokens} drafted tokens accepted")
    write_result("speculative", figures)


if __name__ == "__main__":
    main()
