"""Answers that greedy decoding gives token for token. Oracle: transformers' generate."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from stellarbyte.checkpoint.native import load_model
from stellarbyte.lora import LoRAConfig, apply_lora_to_model
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.data.packing import Batch, collate, packed_row
from stellarbyte.train.errors import TrainError
from stellarbyte.train.job import exact_match as exact_match_module
from stellarbyte.train.job.exact_match import exact_match
from tests.support.tuning.chat_model import make_chat_model

CPU = torch.device("cpu")
LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ByteTransformer:
    return load_model(make_chat_model(tmp_path_factory.mktemp("exact") / "model"), dtype=torch.float32).eval()


def generated(model: ByteTransformer, prompt: Sequence[int], number: int) -> list[int]:
    """Without the end token, which may come early."""
    ids = model.generate(torch.tensor([list(prompt)]), max_new_tokens=number, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


def row(parts: Sequence[tuple[Sequence[int], bool]]) -> Batch:
    """Of token ids that are learned or not, with padding."""
    ids = np.array([token for tokens, _ in parts for token in tokens])
    is_learned = np.array([learned for tokens, learned in parts for _ in tokens])
    return packed_row([(ids, np.where(is_learned, ids, -100))], LENGTH, 0)


def test_an_activated_adapter_acts_as_in_generate(model: ByteTransformer) -> None:
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    apply_lora_to_model(model, LoRAConfig(r=4, target_modules=("q_proj", "down_proj"), alora_invocation_tokens=(9, 7)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    prompts = [[10, 20, 9, 7, 30], [40, 9, 7], [60, 9, 7, 70, 80]]
    answers = [generated(model, prompt, 6) for prompt in prompts]
    rows = [row([(prompt, False), (answer, True)]) for prompt, answer in zip(prompts, answers, strict=True)]
    assert exact_match(model, [collate(rows[:2]), collate(rows[2:])], CPU) == 1.0
    assert answers != [generated(model, [each for each in prompt if each not in (9, 7)], 6) for prompt in prompts]


@pytest.mark.parametrize("chunk", [1 << 26, 272 * 3])
def test_a_row_counts_if_generate_gives_each_answer(
    model: ByteTransformer, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(exact_match_module, "CHUNK_ELEMENTS", chunk)
    prompts = [[10, 20, 30], [40, 50], [60, 70, 80, 90], [5, 6, 7]]
    answers = [generated(model, prompt, 6) for prompt in prompts]
    rows = [row([(prompt, False), (answer, True)]) for prompt, answer in zip(prompts, answers, strict=True)]
    history = [*prompts[0], *answers[0], 33, 44]
    second = generated(model, history, 4)
    rows.append(row([(prompts[0], False), (answers[0], True), ([33, 44], False), (second, True)]))
    batches = [collate(rows[:2]), collate(rows[2:])]
    assert exact_match(model, batches, CPU) == 1.0
    for place in (0, 3, 5):  # any wrong token of an answer
        wrong = list(answers[1])
        wrong[place] = (wrong[place] + 1) % 272
        rows[1] = row([(prompts[1], False), (wrong, True)])
        assert exact_match(model, [collate(rows[:2]), collate(rows[2:])], CPU) == 0.8
    first = [*answers[0][:-1], (answers[0][-1] + 1) % 272]  # of two answers, the first is wrong
    rows[4] = row([(prompts[0], False), (first, True), ([33, 44], False), (generated(model, history, 4), True)])
    assert exact_match(model, [collate(rows)], CPU) == 0.6


def test_rows_without_an_answer_are_left_out(model: ByteTransformer) -> None:
    prompt = [10, 20, 30]
    rows = [row([(prompt, False)]), row([(prompt, False), (generated(model, prompt, 3), True)])]
    assert exact_match(model, [collate(rows)], CPU) == 1.0
    with pytest.raises(TrainError, match="no answer to compare"):
        exact_match(model, [collate(rows[:1])], CPU)
