"""From texts to a served model, as examples/ has it: every stage's minutes, speed, losses, and what the server answers.

    python -m benchmarks.training.story poet          data/poems must be there: examples/poet/poems.py
    python -m benchmarks.training.story storyteller   data/stories must be there: examples/storyteller/generate.py

--small trains a model of less than half a million parameters on a part of the texts, for two CPU cores. --until STAGE
ends early; stages that are done are not done again, so a story can be run in parts.

The commands are printed before they run. What a stage has found stands in runs/story-NAME.json until all are done, and
then in a result of benchmarks/results.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.support.record import ROOT, write_result
from benchmarks.training import long_text
from examples.poet.poems import QUATRAIN, clauses, form_of
from stellarbyte.checkpoint.info import describe, read_record
from stellarbyte.checkpoint.native import open_checkpoint
from tests.support.servers.server_process import REAL, ServerProcess, running

TRAINING_LENGTH, SMALL_LENGTH = 512, 128
ANSWERS, SMALL_ANSWERS = 64, 4  # of which the share in the adapter's form is counted
SMALL: dict[str, dict[str, list[str]]] = {
    "poet": {
        "tokenizer": [
            "stages=[{vocabulary: 4096}]",
            "sample_bytes=2097152",
            "sources=[{files: [data/poems/ci.jsonl.gz], kind: ci, license: MIT}]",
        ],
        "prepare": ["sources=[{files: [data/poems/ci.jsonl.gz], kind: ci, license: MIT}]", "held_out=0.05"],
        "pretrain": [
            *("model.preset=tiny-1m", "train.batch_tokens=4096", "train.micro_batch=32", "train.epochs=0.4"),
            *("train.warmup=20", "train.precision=fp32", "train.compile=false", "data.workers=0"),
            *("model.sliding_window=64", f"data.sequence={SMALL_LENGTH}"),
        ],
        "sft": [
            *("train.batch_tokens=4096", "train.micro_batch=16", "train.epochs=0.25", "train.lr=0.003"),
            *("train.precision=fp32", "train.evaluate_every=null", "data.workers=0", "data.sequence=256"),
            "data.chats=[data/poems/ci-chats.jsonl.gz]",
        ],
        "lora": [
            *("train.batch_tokens=4096", "train.micro_batch=16", "train.epochs=0.04", "train.warmup=2"),
            *("train.precision=fp32", "data.sequence=256"),
        ],
    },
    "storyteller": {
        "tokenizer": ["stages=[{vocabulary: 2048}]", "sample_bytes=2097152"],
        "prepare": ["held_out=0.05"],
        "pretrain": [
            *("model.preset=tiny-1m", "train.batch_tokens=4096", "train.micro_batch=32", "train.warmup=10"),
            *("train.precision=fp32", "train.compile=false", "data.workers=0"),
            *("model.sliding_window=64", f"data.sequence={SMALL_LENGTH}"),
        ],
        "sft": [
            *("train.batch_tokens=8192", "train.micro_batch=8", "train.precision=fp32", "data.workers=0"),
            "train.lr=0.002",
        ],
        "lora": ["train.precision=fp32"],
    },
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """Attributes: adapter: its name; requests: for samples; asked: for the share of answers that `is_in_form`."""

    adapter: str
    requests: tuple[str, ...]
    asked: tuple[str, ...] = ()
    is_in_form: Callable[[str], bool] | None = None
    has_long_documents: bool = False
    opening: str = ""  # of a text that is written on


STORIES = {
    "poet": Story(
        adapter="quatrain",
        requests=(
            "写一首关于月的诗。",
            "写一首关于送别的七言绝句。",
            "写一首题为《登樓》的诗。",
            "写一首五言律诗，第一句是“空山新雨後”。",
            "写一首词，词牌是浣溪沙。",
            "仿李白，写一首诗。",
        ),
        asked=("写一首关于月的诗。", "写一首关于秋的诗。", "写一首关于梅的诗。", "写一首关于江的诗。"),
        is_in_form=lambda text: form_of(text) == QUATRAIN,
        has_long_documents=True,
        opening="陸游\n\n",
    ),
    "storyteller": Story(
        adapter="storyteller-pirate",
        requests=(
            "Write a funny short story about a curious fox in a mountain village and a broken compass.",
            "Tell me a sad story: a snowman, under a stone bridge, a promise.",
            "Write a story for children about a whale who finds a lantern by the sea.",
        ),
    ),
}


class Runner:
    """One story at one size: `name` is that of its folders."""

    def __init__(self, story: str, *, small: bool) -> None:
        self.story, self.small = story, small
        self.settings = STORIES[story]
        self.name = f"{story}-small" if small else story
        self.adapter = Path("adapters") / (self.settings.adapter + ("-small" if small else ""))
        self.base = Path("runs") / self.name / "model"
        self.chat = Path("runs") / f"{self.name}-chat" / "model"
        self.notes = Path("runs") / f"story-{self.name}.json"
        self.found: dict[str, Any] = json.loads(self.notes.read_text("utf-8")) if self.notes.exists() else {}

    def stages(self) -> dict[str, Callable[[], dict[str, Any]]]:
        stages = {
            name: lambda name=name: self.train(name) for name in ("tokenizer", "prepare", "pretrain", "sft", "lora")
        }
        stages["chat"] = self.ask
        if self.settings.has_long_documents:
            stages["long"] = self.write_long
        return stages

    def run(self, until: str | None) -> bool:
        """Whether all stages are done."""
        for name, stage in self.stages().items():
            if name not in self.found:
                started_s = time.monotonic()
                found = stage()
                self.found[name] = {"minutes": round((time.monotonic() - started_s) / 60, 2), **found}
                self.notes.parent.mkdir(exist_ok=True)
                self.notes.write_text(json.dumps(self.found, ensure_ascii=False, indent=1) + "\n", "utf-8")
                print(f"{name}: {self.found[name]['minutes']} minutes", flush=True)
            if name == until:
                return False
        return True

    def overrides(self, command: str) -> list[str]:
        return self._folders(command) + SMALL[self.story][command] if self.small else []

    def train(self, command: str) -> dict[str, Any]:
        """Run `stellarbyte train` and return what it has noted."""
        arguments = ["train", command, f"examples/{self.story}/{command}.yaml"]
        arguments += [part for override in self.overrides(command) for part in ("--set", override)]
        print(f"$ stellarbyte {shlex.join(arguments)}", flush=True)
        subprocess.run([sys.executable, "-m", "stellarbyte.cli.main", *arguments], cwd=ROOT, check=True)
        match command:
            case "tokenizer":
                return {"report": json.loads((Path("tokenizers") / self.name / "report.json").read_text("utf-8"))}
            case "prepare":
                return {"splits": json.loads((Path("data") / self.name / "index.json").read_text("utf-8"))["splits"]}
        return self._record({"pretrain": self.base, "sft": self.chat, "lora": self.adapter}[command])

    def _folders(self, command: str) -> list[str]:
        """The folders of the small model, so that it stands beside the large one."""
        tokenizer, shards = f"tokenizer=tokenizers/{self.name}", f"data/{self.name}"
        match command:
            case "tokenizer":
                return [f"output=tokenizers/{self.name}"]
            case "prepare":
                return [tokenizer, f"output={shards}"]
            case "pretrain":
                return [f"run.dir={self.base.parent}", f"data.shards={shards}"]
            case "sft":
                return [f"run.dir={self.chat.parent}", f"model.path={self.base}"]
        return [f"run.dir=runs/{self.adapter.name}", f"run.output={self.adapter}", f"model.path={self.chat}"]

    def _record(self, folder: Path) -> dict[str, Any]:
        record = read_record(folder)
        assert record is not None, f"{folder} has no training.json"
        names = ("tokens", "steps", "epochs", "loss", "tokens_per_s", "held_out")
        parameters = describe(open_checkpoint(folder)).num_parameters if folder != self.adapter else None
        return {"parameters": parameters, **{name: getattr(record, name) for name in names}}

    def ask(self) -> dict[str, Any]:
        """Samples of the chat model and its adapter, and how many answers of each are in the adapter's form."""
        count = SMALL_ANSWERS if self.small else ANSWERS
        with _serving(self.chat, "--lora-modules", f"{self.adapter.name}={self.adapter.resolve()}") as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600)
            base = client.models.list().data[0].id
            samples = [
                {"model": model, "request": request, "answer": _answer(client, model, request, seed)}
                for model in (base, self.adapter.name)
                for seed, request in enumerate(self.settings.requests)
            ]
            for sample in samples:
                print(f"\n[{sample['model']}] {sample['request']}\n{sample['answer']}")
            shares = {}
            if self.settings.is_in_form is not None:
                for model in (base, self.adapter.name):
                    asked = [self.settings.asked[seed % len(self.settings.asked)] for seed in range(count)]
                    answers = [_answer(client, model, request, seed) for seed, request in enumerate(asked)]
                    in_form = sum(map(self.settings.is_in_form, answers))
                    shares["adapter" if model == self.adapter.name else "model"] = in_form / count
                print(f"answers in the adapter's form: {shares}")
        return {"samples": samples, "in_form": shares}

    def write_long(self) -> dict[str, Any]:
        """Perplexity by position, and a text of eight training lengths, from a cache that holds two of them."""
        training_length = SMALL_LENGTH if self.small else TRAINING_LENGTH
        length = 8 * training_length
        with _serving(self.base, *long_text.cache_flags(self.base, length)) as server:
            shards = Path("data") / self.name
            sizes = {"training_length": training_length, "multiple": 8, "most": 64}
            perplexity = long_text.measure(self.base, shards, server.url, **sizes)
            client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600)
            answer = client.completions.create(
                model=client.models.list().data[0].id,
                prompt=self.settings.opening,
                max_tokens=length,
                temperature=0.8,
                seed=1,
                extra_body={"context_overflow": "slide", "ignore_eos": True},
            )
        print("\n".join(long_text.lines(perplexity)))
        text = answer.choices[0].text
        quarters = regular_poems(text)
        print(f"{answer.usage.completion_tokens} tokens, poems by quarter of the text: {quarters}\n{text[-300:]}")
        return {"perplexity": perplexity, "tokens": answer.usage.completion_tokens, "quarters": quarters, "text": text}


def regular_poems(text: str) -> list[dict[str, int]]:
    """By quarter of a scroll: its poems, and those whose clauses are all of one length. Cut poems do not count."""
    counts = [{"poems": 0, "regular": 0} for _ in range(4)]
    place = 0
    for number, poem in enumerate(parts := text.split("\n\n")):
        if 0 < number < len(parts) - 1:
            quarter = counts[4 * place // max(1, len(text))]
            quarter["poems"] += 1
            quarter["regular"] += len({len(clause) for clause in clauses(poem)}) == 1
        place += len(poem) + 2
    return counts


@contextlib.contextmanager
def _serving(model: Path, *flags: str) -> Iterator[ServerProcess]:
    print(f"$ stellarbyte serve --model {model} {shlex.join(flags)}", flush=True)
    with running(REAL, "--model", str(model.resolve()), *flags) as server:
        yield server


def _answer(client: OpenAI, model: str, request: str, seed: int) -> str:
    messages: Any = [{"role": "user", "content": request}]
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0.7, seed=seed, max_tokens=400, extra_body={"top_p": 0.9}
    )
    return (answer.choices[0].message.content or "").strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("story", choices=STORIES)
    parser.add_argument("--small", action="store_true", help="for two CPU cores")
    parser.add_argument("--until", metavar="STAGE", help="the last stage of this run")
    options = parser.parse_args()
    runner = Runner(options.story, small=options.small)
    if options.until not in (None, *runner.stages()):
        parser.error(f"--until {options.until} must be one of {', '.join(runner.stages())}")
    if runner.run(options.until):
        write_result(f"story-{runner.name}", runner.found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
