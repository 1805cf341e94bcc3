"""A converted tokenizer is the one that AutoTokenizer makes of the source: ids, flags, special tokens, templates."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.hugging_face import tokenizer as tokenizer_module
from stellarbyte.checkpoint.hugging_face.tokenizer import read_tokenizer
from stellarbyte_server.tokens.tokenizer import ChatTemplateError, load_prompt_tokenizer
from tests.support.models.hugging_face import BOS, CHAT_TEMPLATE, END, START, tiny_tokenizer

VOCABULARY = 300
TEXT = f"the capital <tool>of</tool>{START}France {END}"
CHAT = [{"role": "user", "content": "Où est la gare ?"}]
WITH_TOKENS = "{{ bos_token }}{{ eos_token }}{{ pad_token }}" + CHAT_TEMPLATE
SPECIAL = {"bos_token": BOS, "eos_token": END, "pad_token": END}


def added(text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, "special": special, **flags}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with three special tokens, as its file alone says."""
    source = tmp_path / "source"
    source.mkdir()
    tiny_tokenizer(VOCABULARY).save(str(source / "tokenizer.json"))
    write(source, "config.json", model_type="llama")
    write(source, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=WITH_TOKENS)
    return source


def write(folder: Path, name: str, **content: Any) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | content))


def converted(folder: Path) -> Path:
    target = folder.parent / "target"
    target.mkdir()
    read_tokenizer(folder).write(target)
    return target


def flags_differ(folder: Path) -> None:
    """The file says that it is special, the configuration that it is not; and the other way round."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(text) for text in ("<tool>", "</tool>", START)]
    flags = [added("<tool>", special=True), added("</tool>", special=False), added(START, special=False)]
    write(folder, "tokenizer_config.json", added_tokens_decoder=dict(zip(ids, flags, strict=True)))


PLACES: dict[str, Callable[[Path], object]] = {
    "in tokenizer_config.json": lambda folder: write(folder, "tokenizer_config.json", **SPECIAL),
    "in special_tokens_map.json": lambda folder: write(folder, "special_tokens_map.json", **SPECIAL),
    "in special_tokens_map.json with flags": lambda folder: write(
        folder, "special_tokens_map.json", **{name: added(text, special=True) for name, text in SPECIAL.items()}
    ),
    "additional ones": lambda folder: write(
        folder, "special_tokens_map.json", additional_special_tokens=["<tool>", "</tool>"], **SPECIAL
    ),
    "in added_tokens_decoder": lambda folder: write(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder={290: added("<tool>", special=True), 291: added("</tool>", special=False)},
        **SPECIAL,
    ),
    "in added_tokens.json": lambda folder: write(folder, "added_tokens.json", **{"<tool>": 290, "</tool>": 291}),
    "flags that differ": flags_differ,
    "a first token that is added": lambda folder: write(
        folder, "tokenizer_config.json", add_bos_token=True, add_eos_token=True, **SPECIAL
    ),
    "a class that rebuilds": lambda folder: write(
        folder, "tokenizer_config.json", tokenizer_class="Qwen2TokenizerFast", **SPECIAL
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_ids_flags_and_template_are_autotokenizers(place: str, folder: Path):
    PLACES[place](folder)
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    target = converted(folder)
    ours, again = load_prompt_tokenizer(target, None, VOCABULARY), AutoTokenizer.from_pretrained(target)
    assert ours.encode(TEXT) == again(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert again.added_tokens_decoder == expected.added_tokens_decoder
    special = {token_id for token_id, token in expected.added_tokens_decoder.items() if token.special}
    # Until it is saved, the tokenizers package hides a token that was special before its flag was taken away.
    ids = [token_id for token_id in expected(TEXT)["input_ids"] if token_id != 1 or token_id in special]
    plain = {"clean_up_tokenization_spaces": False, "skip_special_tokens": True}
    assert ours.decode(ids, skip_special_tokens=True) == again.decode(ids, **plain) == expected.decode(ids, **plain)
    assert ours.token_bytes.special_ids == special
    assert again.special_tokens_map == expected.special_tokens_map
    rendered = expected.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == rendered
    assert read_tokenizer(folder).eos_token_id == expected.eos_token_id


def templates_in_a_list(folder: Path) -> None:
    named = {"default": "plain", "tool_use": "tools", "rag": "{% broken"}
    entries = [{"name": name, "template": template} for name, template in named.items()]
    write(folder, "tokenizer_config.json", chat_template=entries)


def templates_in_files(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


@pytest.mark.parametrize("place", [templates_in_a_list, templates_in_files])
@pytest.mark.parametrize("is_converted", [False, True])
def test_a_chat_with_tools_has_the_template_for_them(place: Callable[[Path], None], is_converted: bool, folder: Path):
    place(folder)
    expected = AutoTokenizer.from_pretrained(folder)
    ours = load_prompt_tokenizer(converted(folder) if is_converted else folder, None, VOCABULARY)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    for tools, text in ((None, "plain"), ([tool], "tools")):
        assert expected.apply_chat_template(CHAT, tools=tools, tokenize=False) == text
        assert ours.encode_chat(CHAT, tools=tools) == ours.encode(text)
    assert ours.chat_template_source == "tools"


def test_templates_without_a_default_are_kept_and_named_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder, "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "tools"}])
    target = converted(folder)
    ours = load_prompt_tokenizer(target, None, VOCABULARY)
    assert len(caplog.messages) == 2 and all("tool_use" in message for message in caplog.messages)
    assert ours.encode_chat(CHAT, tools=[]) == ours.encode("tools")
    with pytest.raises(ChatTemplateError, match="--chat-template FILE"):
        ours.encode_chat(CHAT)


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "x" * 300])
def test_the_name_of_a_template_does_not_lead_out_of_the_folder(name: str, folder: Path):
    write(folder, "tokenizer_config.json", chat_template=[{"name": name, "template": "x"}])
    with pytest.raises(CheckpointError, match="cannot be stored as a file"):
        read_tokenizer(folder)


@pytest.fixture
def sentencepiece_folder(folder: Path) -> Path:
    """A folder as Llama 2's was first: tokenizer.model alone."""
    (folder / "tokenizer.json").unlink()
    words = "the capital of France is Paris and the river of Paris is the Seine; 12 or 345 boats".split()
    sentences = [" ".join(words[start:] + words[:start]) for start in range(len(words))] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True)
    return folder


def test_a_sentencepiece_model_is_converted(sentencepiece_folder: Path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    expected = AutoTokenizer.from_pretrained(sentencepiece_folder, local_files_only=True)
    ours = load_prompt_tokenizer(converted(sentencepiece_folder), None, VOCABULARY)
    for text in ("the capital of Paris", "12 boats", "Où ? 東京 🚉"):
        assert ours.encode(text) == expected(text)["input_ids"] == [1, *model.encode(text)]
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("absent", ["sentencepiece", "google.protobuf"])
def test_without_its_packages_one_line_says_what_to_install(
    absent: str, sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    is_installed = tokenizer_module._is_installed
    monkeypatch.setattr(tokenizer_module, "_is_installed", lambda package: package != absent and is_installed(package))
    with pytest.raises(CheckpointError, match=r"only as tokenizer\.model.*pip install sentencepiece protobuf\.$"):
        read_tokenizer(sentencepiece_folder)
    assert not is_installed("google.no_such_package") and not is_installed("no.such.package")


def test_a_broken_sentencepiece_model_is_one_line(sentencepiece_folder: Path):
    (sentencepiece_folder / "tokenizer.model").write_bytes(b"\x00\xff" * 50)
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read") as caught:
        read_tokenizer(sentencepiece_folder)
    assert "\n" not in str(caught.value)
