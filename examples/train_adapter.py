"""Trains a LoRA adapter on questions and answers, on a CPU in minutes. Knows nothing of the server.

    python examples/train_adapter.py pirate --out adapters/pirate

Each line of the data is a JSON object {"question": ..., "answer": ...}. The result is a folder in PEFT's format.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from stellarbyte import ByteTransformer, LoRAConfig
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora import apply_lora_to_model, save_adapter

# B examples, T tokens, A tokens of the batch's longest answer, V vocabulary

DATA = Path(__file__).parent / "data"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
WARMUP_STEPS = 5
NO_LABEL = -100


class Example(NamedTuple):
    question: str
    ids: list[int]  # the chat as the server sends it, the answer, the end token
    num_answer: int  # tokens of the answer, with the end token


def chat_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def read_examples(file: Path, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """ValueError, of one sentence, when there is no file or a line is not a question and its answer."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name a file of questions and answers with --data.")
    examples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question, answer = str(row["question"]), str(row["answer"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{file}, line {number} is not {{"question": ..., "answer": ...}}.') from error
        answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append(Example(question, chat_ids(tokenizer, question) + answer_ids, len(answer_ids)))
    if len(examples) < 2:
        raise ValueError(f"{file} holds fewer than 2 examples; one is kept to test with.")
    return examples


def answer_losses(model: ByteTransformer, batch: Sequence[Example]) -> torch.Tensor:
    """The loss of every token of the answers, one after the other.

    Padding goes to the left, so that all answers end together and the head runs over their positions only.
    """
    length, longest_answer = max(len(ids) for _, ids, _ in batch), max(num_answer for *_, num_answer in batch)
    ids_BT, mask_BT = torch.zeros(2, len(batch), length, dtype=torch.long)
    labels_BA = torch.full((len(batch), longest_answer), NO_LABEL)
    for row, (_, ids, num_answer) in enumerate(batch):
        ids_BT[row, -len(ids) :] = torch.tensor(ids)
        mask_BT[row, -len(ids) :] = 1
        labels_BA[row, -num_answer:] = torch.tensor(ids[-num_answer:])
    outputs = model(ids_BT, attention_mask=mask_BT, logits_to_keep=longest_answer + 1, use_cache=False)
    logits_BAV = outputs.logits[:, :-1]  # each position predicts the next; the last has none
    is_answer = labels_BA != NO_LABEL
    return F.cross_entropy(logits_BAV[is_answer].float(), labels_BA[is_answer], reduction="none")


def batches(examples: Sequence[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Examples of similar lengths, without end; every pass over all of them groups and orders them anew."""
    while True:
        ordered = sorted(rng.sample(examples, len(examples)), key=lambda example: len(example.ids))
        starts = range(0, len(ordered), BATCH_SIZE)
        for start in rng.sample(starts, len(starts)):
            yield ordered[start : start + BATCH_SIZE]


def train(model: ByteTransformer, examples: Sequence[Example], num_steps: int, rng: random.Random) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(islice(batches(examples, rng), num_steps), start=1):
        share = min(step / WARMUP_STEPS, 1) * (num_steps + 1 - step) / num_steps  # first up, then down
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        loss = answer_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=1)
        optimizer.step()
        if step % 5 == 0 or step == num_steps:
            print(f"step {step}/{num_steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def mean_loss(model: ByteTransformer, examples: Sequence[Example]) -> float:
    starts = range(0, len(examples), BATCH_SIZE)
    return torch.cat([answer_losses(model, examples[start : start + BATCH_SIZE]) for start in starts]).mean().item()


def greedy_answer(model: ByteTransformer, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    prompt = torch.tensor([chat_ids(tokenizer, question)])
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    return tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)


def run(options: argparse.Namespace) -> None:
    if options.steps < 1:
        raise ValueError(f"--steps ({options.steps}) must be at least 1.")
    folder = Path("adapters", options.name) if options.out is None else options.out
    folder.parent.mkdir(parents=True, exist_ok=True)  # if it cannot be made, better now than after the training
    path = resolve_model(options.model)
    torch.manual_seed(options.seed)  # where the adapter starts
    config = LoRAConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGET_MODULES)
    model = apply_lora_to_model(load_model(path), config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)

    rng = random.Random(options.seed)
    examples = read_examples(DATA / f"{options.name}.jsonl" if options.data is None else options.data, tokenizer)
    rng.shuffle(examples)
    num_held_out = max(len(examples) // 10, 1)
    held_out, training = examples[:num_held_out], examples[num_held_out:]
    print(f"held-out loss before: {mean_loss(model, held_out):.3f}", flush=True)
    train(model, training, options.steps, rng)
    print(f"held-out loss after: {mean_loss(model, held_out):.3f}")
    print(f"question: {held_out[0].question}\nanswer: {greedy_answer(model, tokenizer, held_out[0].question)}")
    save_adapter(model, folder)
    print(f"wrote {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter on questions and answers.")
    parser.add_argument("name", metavar="NAME", help="pirate, json, or a name of your own with --data")
    parser.add_argument("--data", type=Path, metavar="FILE", help="default: examples/data/NAME.jsonl")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: adapters/NAME")
    parser.add_argument("--model", default="demo", metavar="PATH", help="checkpoint folder, or demo (default)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of 8 examples; default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
