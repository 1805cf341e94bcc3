"""A native model from nothing over a real socket: trained by the commands, served with an adapter, asked at any length.

XPos, a sliding window and sinks, in rows of 64 tokens; texts of 512.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml

from benchmarks.training import long_text
from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.native import load_model
from stellarbyte.cli.main import main
from stellarbyte.lora import load_adapter
from stellarbyte.train.tokenizer.stages import CHAT_TEMPLATE
from tests.support.clients.openai_client import lenient, strict_client
from tests.support.servers.server_process import REAL, running
from tests.support.training.byte_tokenizer import byte_tokenizer

pytest.importorskip("accelerate")
TRAINING_LENGTH, LENGTH = 64, 512
LINES = ("the moon is up", "rain on the roof", "a long way home", "snow in the hills", "old wine, new cup")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
NATIVE = {"use_xpos": True, "qk_norm": True, "sliding_window": 32, "sink_tokens": 4, "max_position_embeddings": 128}
QUESTION = [{"role": "user", "content": "Which line?"}]
ANSWER = "rain on the roof"
NEAR = 1e-3  # logits nearer than this may change places


@dataclass
class Trained:
    folder: Path
    client: openai.OpenAI
    url: str

    @property
    def model(self) -> Path:
        return self.folder / "base" / "model"


def poem(seed: int) -> str:
    """Lines in a random order: their first letters cannot be foreseen, and nothing else depends on the place."""
    chosen = random.Random(seed)
    return "\n".join(chosen.choice(LINES) for _ in range(60))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("trained")
    byte_tokenizer(template=CHAT_TEMPLATE).save_pretrained(folder / "tokenizer")
    texts = [json.dumps({"text": poem(seed)}) for seed in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    chat = {"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}
    (folder / "chats.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    train = {"batch_tokens": 1024, "micro_batch": 16, "lr": 0.01, "warmup": 5}
    files: dict[str, dict[str, Any]] = {
        "prepare": {
            "output": str(folder / "shards"),
            "tokenizer": str(folder / "tokenizer"),
            "sources": [{"files": [str(folder / "texts.jsonl")], "license": "CC0-1.0"}],
            "held_out": 0.1,
        },
        "pretrain": {
            "run": {"dir": str(folder / "base"), "plots": False},
            "model": SHAPE | NATIVE,
            "data": {"shards": str(folder / "shards"), "sequence": TRAINING_LENGTH},
            "train": train | {"epochs": 3},
        },
        "lora": {
            "run": {"dir": str(folder / "run"), "output": str(folder / "adapters" / "answers"), "plots": False},
            "model": {"path": str(folder / "base" / "model")},
            "data": {"chats": [str(folder / "chats.jsonl")], "sequence": TRAINING_LENGTH},
            "train": train | {"batch_tokens": 64, "micro_batch": 1, "epochs": 40},
        },
    }
    for name, content in files.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        assert main(["train", name, str(file)]) == 0
    assert not (folder / "run" / "adapter").exists()
    flags = [*long_text.cache_flags(folder / "base" / "model", LENGTH), "--max-num-batched-tokens", "32"]
    with running(
        REAL, "--model", str(folder / "base" / "model"), "--adapter-dir", str(folder / "adapters"), *flags
    ) as server:
        yield Trained(folder, lenient(strict_client(server.url)), server.url)


def largest_gap(model: ByteTransformer, prompt: list[int], answer: list[int]) -> float:
    """By how much the library prefers another token than the one that was answered, at the worst place."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits_TV.max(dim=-1).values - logits_TV[range(len(answer)), answer]).max().item()


def test_greedy_tokens_are_the_librarys_far_beyond_the_training_length(trained: Trained) -> None:
    """With a KV cache that holds a quarter of the text."""
    answer = trained.client.completions.create(
        model="model",
        prompt="the moon",
        max_tokens=LENGTH,
        temperature=0,
        extra_body={"context_overflow": "slide", "ignore_eos": True, "return_token_ids": True},
    )
    choice = answer.choices[0]
    assert len(choice.token_ids) == LENGTH and answer.usage.evicted_tokens > 400
    assert largest_gap(load_model(trained.model), choice.prompt_token_ids, choice.token_ids) < NEAR
    lines = choice.text.split("\n")[1:-1]
    assert len(lines) > 20 and set(lines) <= set(LINES)


def test_perplexity_does_not_grow_beyond_the_training_length(trained: Trained) -> None:
    """Between one of five lines by its first letter, and certainty within a line: about 5^(1/16) for each token."""
    sizes = {"training_length": TRAINING_LENGTH, "multiple": LENGTH // TRAINING_LENGTH, "most": 4}
    found = long_text.measure(trained.model, trained.folder / "shards", trained.url, **sizes)
    assert [bucket["tokens"] for bucket in found["library"]] == list(range(32, LENGTH + 1, 32))
    assert found["documents"] == 4 and found["largest_difference"] < 1e-4
    assert abs(found["cost_of_position"]) < 0.02
    late = [bucket["loss"] for bucket in found["library"][-8:]]
    assert sum(late) / 8 < 2 * math.log(len(LINES)) / 16


def test_losses_by_position_are_those_of_one_dense_pass(trained: Trained) -> None:
    (document,) = long_text.long_documents(trained.folder / "shards", 200, 1)
    model = load_model(trained.model)
    with torch.inference_mode():
        logprobs_TV = model(torch.from_numpy(document)[None]).logits[0].double().log_softmax(-1)
    expected = -logprobs_TV[range(199), document[1:]]
    found = torch.from_numpy(long_text.library_losses(model, [document], torch.device("cpu"), bucket=32)[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    buckets = long_text.by_position(found.numpy()[None], 32)
    assert buckets[0]["loss"] == pytest.approx(expected[:32].mean().item(), abs=1e-4)
    assert buckets[-1]["tokens"] == 199
    with pytest.raises(ValueError, match="holds out no document of 4000 tokens"):
        long_text.long_documents(trained.folder / "shards", 4000, 1)


def test_info_says_how_the_model_was_trained(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trained.model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    record = json.loads((trained.model / "training.json").read_text(encoding="utf-8"))
    assert f"pretrain, {record['steps']:,} steps" in shown and f"{record['tokens_per_s']:,.0f} tokens/s" in shown
    assert "licences: CC0-1.0" in shown and "XPos" in shown and record["tokens_per_s"] > 0


def test_an_adapter_trained_on_it_answers_as_the_library_does(trained: Trained) -> None:
    answers = {}
    for name in ("model", "answers"):
        options = {"return_token_ids": True}
        answer = trained.client.chat.completions.create(
            model=name, messages=QUESTION, temperature=0, max_tokens=30, extra_body=options
        )
        answers[name] = answer.choices[0]
    assert answers["answers"].message.content == ANSWER != answers["model"].message.content
    assert answers["answers"].finish_reason == "stop"
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    adapted = load_adapter(load_model(trained.model), trained.folder / "adapters" / "answers")
    assert largest_gap(adapted, prompt, list(answers["answers"].token_ids)) < NEAR
