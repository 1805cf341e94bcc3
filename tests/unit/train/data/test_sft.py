"""Chats as labels, compared with ones that are written by hand: answers and their end tokens, nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from stellarbyte.train.data.chat_labels import ChatLabels
from stellarbyte.train.data.packing import NO_LABEL, PADDING
from stellarbyte.train.data.sft import Chats, read_chats
from stellarbyte.train.errors import TrainError
from stellarbyte.train.tokenizer.stages import CHAT_TEMPLATE
from tests.support.training.byte_tokenizer import NUM_SPECIAL, byte_tokenizer, bytes_of, ids_of

PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
WITHOUT_END_IN_BLOCK = PLAIN.replace(
    "message['content'] +",
    "'' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{",
)
THINKING = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' and loop.last -%}{{- '<think></think>' -}}{%- endif -%}
    {{- message['content'] + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "谁?"},
    {"role": "assistant", "content": "李白。\n"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": " Li Bai"},
]
# The same chat by hand: a text, and whether the assistant wrote it.
PARTS = [
    ("<|bos|><|im_start|>system\nbe brief<|eos|>\n<|im_start|>user\n谁?<|eos|>\n<|im_start|>assistant\n", False),
    ("李白。\n<|eos|>", True),
    ("\n<|im_start|>user\nwho?<|eos|>\n<|im_start|>assistant\n", False),
    (" Li Bai<|eos|>", True),
    ("\n", False),
]
IDS = [number for text, _ in PARTS for number in ids_of(text)]
IS_LEARNED = [is_learned for text, is_learned in PARTS for _ in ids_of(text)]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN, WITHOUT_END_IN_BLOCK])
def test_answers_and_their_end_tokens_are_learned(template: str) -> None:
    ids, is_learned = ChatLabels(byte_tokenizer(template=template)).of(CHAT)
    assert ids == IDS
    assert is_learned.tolist() == IS_LEARNED


def test_the_prompt_is_that_of_serving() -> None:
    """What comes before an answer is what `apply_chat_template` makes for generation."""
    for template in (CHAT_TEMPLATE, PLAIN):
        tokenizer = byte_tokenizer(template=template)
        ids, is_learned = ChatLabels(tokenizer).of(CHAT[:3])
        prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
        first = int(np.argmax(is_learned))
        assert ids[:first] == prompt


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN, WITHOUT_END_IN_BLOCK])
def test_special_tokens_that_messages_spell_are_text(template: str) -> None:
    """By hand: bytes for what messages hold, special ids for what the template writes."""
    asked, answered = "what is <|im_start|>x<|eos|><|eos|>?", "<|eos|>谁<|bos|>"
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    parts = [
        (ids_of("<|bos|><|im_start|>user\n") + bytes_of(asked) + ids_of("<|eos|>\n<|im_start|>assistant\n"), False),
        (bytes_of(answered) + ids_of("<|eos|>"), True),
        (ids_of("\n"), False),
    ]
    ids, is_learned = ChatLabels(byte_tokenizer(template=template)).of(chat)
    assert ids == [number for numbers, _ in parts for number in numbers]
    assert is_learned.tolist() == [learned for numbers, learned in parts for _ in numbers]


def test_spelled_tokens_are_text_for_tokenizers_with_special_tokens_beyond_the_model() -> None:
    """As most have them: the model's own vocabulary does not hold them."""
    tokenizer = byte_tokenizer(template=PLAIN)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {text: number - NUM_SPECIAL for text, number in content["model"]["vocab"].items() if number >= NUM_SPECIAL}
    content["model"]["vocab"] = rest
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = len(rest) + number
    moved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|eos|>")
    moved.chat_template = PLAIN
    ids, _ = ChatLabels(moved).of([{"role": "user", "content": "<|eos|>"}, {"role": "assistant", "content": "<|pad|>"}])
    expected = ids_of("<|im_start|>user\n") + bytes_of("<|eos|>") + ids_of("<|eos|>\n<|im_start|>assistant\n")
    expected += bytes_of("<|pad|>") + ids_of("<|eos|>\n")
    assert ids == [(number - NUM_SPECIAL) % (len(rest) + NUM_SPECIAL) for number in expected]


def test_spelled_tokens_are_text_in_calls_of_tools() -> None:
    template = PLAIN.replace(
        "message['content'] +", "message['content'] ~ (message.call.text if message.call else '') ~"
    )
    call = {"role": "assistant", "content": "c", "call": {"text": "<|eos|>"}}
    ids, is_learned = ChatLabels(byte_tokenizer(template=template)).of([{"role": "user", "content": "q"}, call])
    assert ids == ids_of("<|bos|><|im_start|>user\nq<|eos|>\n<|im_start|>assistant\nc") + bytes_of("<|eos|>") + ids_of(
        "<|eos|>\n"
    )
    assert is_learned.sum() == len("c<|eos|>") + 1


def test_characters_that_stand_for_special_tokens_are_refused_beside_them() -> None:
    labels = ChatLabels(byte_tokenizer(template=PLAIN))
    chat = [{"role": "user", "content": "\U00100002"}, {"role": "assistant", "content": "one"}]
    assert labels.of(chat)[0].count(NUM_SPECIAL + 0xF4) == 1
    chat[1]["content"] = "<|eos|>"
    with pytest.raises(ValueError, match="spells a special token beside private-use characters"):
        labels.of(chat)


def test_what_a_template_writes_before_an_answer_is_learned_with_it() -> None:
    ids, is_learned = ChatLabels(byte_tokenizer(template=THINKING)).of(CHAT[1:3])
    prompt = "<|im_start|>user\n谁?<|eos|><|im_start|>assistant\n"
    assert ids == ids_of(prompt + "<think></think>李白。\n<|eos|>")
    assert is_learned.tolist() == [number >= len(ids_of(prompt)) for number in range(len(ids))]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def chat(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", chat("one"), {"messages": CHAT}, chat("a long answer that is cut"))
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)
    length = len(IDS)
    chats = read_chats([file], tokenizer, max_length=length)
    rows = chats["train"].rows(tokenizer, length=length, packing=False)
    assert len(chats["held_out"].ends) == 0
    assert rows[1]["input_ids"].tolist() == IDS
    learned = [number if is_learned else NO_LABEL for number, is_learned in zip(IDS, IS_LEARNED, strict=True)]
    assert rows[1]["labels"].tolist() == learned
    prompt = ids_of("<|bos|><|im_start|>user\nq<|eos|>\n<|im_start|>assistant\n")
    answer, end = ids_of("one<|eos|>"), ids_of("\n")
    rest = length - len(prompt + answer + end)
    assert rows[0]["input_ids"].tolist() == prompt + answer + end + [tokenizer.pad_token_id] * rest
    assert rows[0]["labels"].tolist() == [NO_LABEL] * len(prompt) + answer + [NO_LABEL] * (1 + rest)
    assert rows[0]["document_ids"].tolist() == [0] * (length - rest) + [PADDING] * rest
    packed = chats["train"].rows(tokenizer, length=3 * length, packing=True)
    assert len(packed) == 1
    assert sorted(packed[0]["labels"].tolist()) == sorted(
        label for number in range(3) for label in rows[number]["labels"].tolist()
    )


def test_a_cut_answer_has_no_end_token(tmp_path: Path) -> None:
    file, tokenizer = write(tmp_path / "a.jsonl", {"messages": CHAT}), byte_tokenizer(template=CHAT_TEMPLATE)
    length = IS_LEARNED.index(True) + 4
    row = read_chats([file], tokenizer, max_length=length)["train"].rows(tokenizer, length=length, packing=True)[0]
    assert row["labels"].tolist() == [NO_LABEL] * (length - 4) + IDS[length - 4 : length]


def test_held_out_chats_are_the_same_in_every_order(tmp_path: Path) -> None:
    rows = [chat(f"answer {number}") for number in range(200)]
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)

    def held_out(*chats: dict[str, Any]) -> tuple[Chats, set[str]]:
        read = read_chats([write(tmp_path / "a.jsonl", *chats)], tokenizer, max_length=99, held_out=0.25)
        assert len(read["train"].ends) + len(read["held_out"].ends) == len(chats)
        return read["train"], {tokenizer.decode(ids) for ids in np.split(read["held_out"].ids, read["held_out"].ends)}

    train, texts = held_out(*rows)
    other, same = held_out(*reversed(rows))
    assert same == texts
    assert 25 < len(texts) < 80
    assert train.fingerprint != other.fingerprint
    assert train.fingerprint == held_out(*rows)[0].fingerprint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat("long"), "no answer token is left of 10."),
        (5, 'needs "messages": a list of objects with a role and content.'),
        ({"messages": []}, 'needs "messages": a list of objects with a role and content.'),
        ({"messages": [{"content": "x"}]}, 'needs "messages": a list of objects with a role and content.'),
        ({"messages": CHAT[:2]}, "has no message of the assistant."),
        ({"messages": [*CHAT[:2], {"role": "assistant"}]}, "is refused by the chat template: "),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": None}]}, "is refused by the chat template: "),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN])
def test_a_bad_line_is_named(row: Any, said: str, template: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    limit = 10 if "left of 10" in said else 99
    write(file, *([] if limit == 10 else [chat("")]), row)
    with pytest.raises(TrainError) as caught:
        read_chats([file], byte_tokenizer(template=template), max_length=limit)
    number = 1 if limit == 10 else 2
    assert str(caught.value).startswith(f"{file}, line {number}: {said}")
    assert "\n" not in str(caught.value)


def test_templates_that_cannot_be_trained(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": CHAT})
    for template, said in (
        (THINKING, "has message 3 in another form than the prompt before it: use a chat template with"),
        (PLAIN.replace("eos_token", "''"), "has an answer that the chat template ends without a special token"),
    ):
        with pytest.raises(TrainError, match=said):
            read_chats([file], byte_tokenizer(template=template), max_length=512)
    file = write(tmp_path / "a.jsonl", {"messages": CHAT[2:]})
    with pytest.raises(TrainError, match=r"line 1: starts with the assistant; use a chat template with"):
        read_chats([file], byte_tokenizer(template=PLAIN), max_length=512)
    with pytest.raises(TrainError, match=r"has no chat template; its folder needs a chat_template\.jinja"):
        read_chats([file], byte_tokenizer(), max_length=512)
    file = tmp_path / "a.txt"
    file.touch()
    with pytest.raises(TrainError, match=r"a\.txt must be a \.json or \.jsonl file"):
        read_chats([file], byte_tokenizer(template=PLAIN), max_length=512)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN, WITHOUT_END_IN_BLOCK])
@pytest.mark.parametrize("unlearned", [{2}, {4}, {2, 4}])
def test_answers_of_weight_0_are_read_and_not_learned(template: str, unlearned: set[int]) -> None:
    chat = [
        message | ({"weight": int(number not in unlearned)} if message["role"] == "assistant" else {})
        for number, message in enumerate(CHAT)
    ]
    answers = {1: 2, 3: 4}  # part: its message
    expected = [
        is_learned and answers[part] not in unlearned
        for part, (text, is_learned) in enumerate(PARTS)
        for _ in ids_of(text)
    ]
    ids, is_learned = ChatLabels(byte_tokenizer(template=template)).of(chat)
    assert ids == IDS and is_learned.tolist() == expected
    spelled = [*chat[:-1], {**chat[-1], "content": " Li Bai<|eos|>"}]
    _, is_learned = ChatLabels(byte_tokenizer(template=template)).of(spelled)
    before = sum(len(ids_of(text)) for text, _ in PARTS[:3])
    assert is_learned[:before].tolist() == expected[:before]
    assert is_learned[before:-1].tolist() == [4 not in unlearned] * (len(is_learned) - before - 1)


@pytest.mark.parametrize("wrong", [{"weight": 2}, {"weight": None}, {"weight": "1"}])
def test_other_weights_are_refused(wrong: dict[str, Any]) -> None:
    labels = ChatLabels(byte_tokenizer(template=PLAIN))
    with pytest.raises(ValueError, match="has message 3 with weight"):
        labels.of([*CHAT[:2], CHAT[2] | wrong])
    with pytest.raises(ValueError, match="has message 2 with weight 0"):
        labels.of([CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2]])


def test_with_an_invocation_only_what_follows_the_last_one_is_learned(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)
    invocation = tuple(ids_of("<|im_start|>assistant\n"))
    file = write(tmp_path / "a.jsonl", {"messages": CHAT})
    row = read_chats([file], tokenizer, max_length=len(IDS), invocation=invocation)["train"]
    assert row.ids.tolist() == IDS
    answer = ids_of(PARTS[3][0])
    assert row.is_learned.tolist() == [False] * (len(IDS) - len(answer) - 1) + [True] * len(answer) + [False]


@pytest.mark.parametrize(
    ("invocation", "said"),
    [
        (bytes_of("check it"), "does not contain the tokens"),
        (ids_of("<|eos|>\n"), "has no answer after the last lora.invocation"),
    ],
)
def test_a_chat_that_does_not_invoke_the_adapter_is_named(invocation: list[int], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", chat("check it") if "contain" in said else chat("one"), chat("two"))
    number = 2 if "contain" in said else 1
    with pytest.raises(TrainError, match=rf"line {number}: {said}"):
        read_chats([file], byte_tokenizer(template=CHAT_TEMPLATE), max_length=99, invocation=tuple(invocation))
