"""`stellarbyte train`: from texts to shards, a model, a chat model and an adapter, each by its command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stellarbyte.checkpoint.native import load_model
from stellarbyte.cli.main import main
from stellarbyte.lora import load_adapter
from stellarbyte.train.tokenizer.stages import CHAT_TEMPLATE
from tests.support.training.byte_tokenizer import byte_tokenizer

pytest.importorskip("accelerate")
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。 The moon is bright. "
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TRAIN = {"batch_tokens": 512, "micro_batch": 4, "lr": 0.01, "warmup": 2}
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" if n % 2 else "no"}]}
    for n in range(40)
]


def write(folder: Path, name: str, content: dict[str, Any]) -> str:
    file = folder / name
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, chats, and the pretrained model in `base`."""
    folder = tmp_path_factory.mktemp("made")
    byte_tokenizer(template=CHAT_TEMPLATE).save_pretrained(folder / "tokenizer")
    texts = "".join(json.dumps({"text": POEM * (1 + n % 3) + str(n)}) + "\n" for n in range(60))
    (folder / "texts.jsonl").write_text(texts, encoding="utf-8")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    settings = {
        "output": str(folder / "shards"),
        "tokenizer": str(folder / "tokenizer"),
        "sources": [{"files": [str(folder / "texts.jsonl")], "license": "MIT"}],
        "held_out": 0.2,
    }
    assert main(["train", "prepare", write(folder, "prepare.yaml", settings)]) == 0
    run = {
        "run": {"dir": str(folder / "base")},
        "model": SHAPE | {"sliding_window": 32, "sink_tokens": 4},
        "data": {"shards": str(folder / "shards"), "sequence": 128},
        "train": TRAIN | {"epochs": 6, "evaluate_every": 10},
    }
    assert main(["train", "pretrain", write(folder, "pretrain.yaml", run)]) == 0
    return folder


def test_a_model_from_texts_has_learned_them(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(made / "base" / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["licenses"] == ["MIT"]
    assert found["training"]["held_out"]["eval_bits_per_byte"] < 1.5  # 8 before the first step
    assert main(["generate", str(made / "base" / "model"), "床前明月光", "--raw", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.startswith("，疑是")


def test_check_tells_what_a_run_would_do_and_writes_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(made.rglob("*"))
    assert (
        main(["train", "check", str(made / "pretrain.yaml"), "--set", "run.dir=other", "--set", "train.epochs=2"]) == 0
    )
    assert sorted(made.rglob("*")) == before and not Path("other").exists()
    shown = " ".join(capsys.readouterr().out.split())
    state = json.loads((made / "base" / "model" / "training.json").read_text(encoding="utf-8"))
    steps = state["steps"] // 3
    assert f"steps {steps:,}, {steps * 512:,} tokens" in shown
    for part in ("batch 512 tokens in 4 rows", "a step on one rank of CPU", "GiB at the peak", "time"):
        assert part in shown, part


def test_sft_and_lora_learn_answers(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {
        "run": {"dir": str(made / "chat"), "plots": False},
        "model": {"path": str(made / "base" / "model")},
        "data": {"chats": [str(made / "chats.jsonl")], "sequence": 128, "held_out": 0.2, "license": "CC0-1.0"},
        "train": TRAIN | {"epochs": 20},
    }
    assert main(["train", "sft", write(made, "sft.yaml", run)]) == 0
    record = json.loads((made / "chat" / "model" / "training.json").read_text(encoding="utf-8"))
    assert record["licenses"] == ["CC0-1.0"] and record["base"] == run["model"]["path"]
    assert record["held_out"]["eval_loss"] < 1.0  # yes or no, and the end token
    run["run"]["dir"], run["lora"] = str(made / "adapted"), {"r": 4, "alpha": 8}
    assert main(["train", "lora", write(made, "lora.yaml", run)]) == 0
    adapter = made / "adapted" / "adapter"
    model = load_adapter(load_model(made / "base" / "model"), adapter)
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)
    prompt = tokenizer.apply_chat_template(CHATS[0]["messages"][:1], add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(answer, skip_special_tokens=True) in ("yes", "no")
    capsys.readouterr()
    assert main(["train", "lora", str(made / "lora.yaml")]) == 1
    assert "adapter is not empty" in capsys.readouterr().err
