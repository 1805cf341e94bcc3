"""Prompts to token ids in the HTTP process: the model's tokenizer and its chat template. Never imports torch.

transformers is not used here, because importing its tokenizers takes seconds and loads torch; templates render as its
`apply_chat_template` renders them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """A chat template is missing, is no template, or refuses the messages; str() is one sentence for the user."""


class PromptTokenizer:
    """Turns text and chats into token ids. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, chat_template: "ChatTemplate | None") -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """A prompt as the tokenizer makes it, with the first token it adds, if it adds one."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A chat up to where the assistant answers; ChatTemplateError. The template writes all special tokens."""
        if self._chat_template is None:
            raise ChatTemplateError(
                "This model has no chat template; start the server with --chat-template FILE or use /v1/completions."
            )
        return self._tokenizer.encode(self._chat_template.render(messages), add_special_tokens=False).ids


class ChatTemplate:
    """A Jinja template as models bring it, in a sandbox. Any thread may render."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """ChatTemplateError when `source` is no template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The chat template cannot be read: {error}.") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat as text, ready for the assistant's answer; ChatTemplateError when the template refuses it."""
        try:
            return self._template.render(
                **{**self._special_tokens, "messages": messages, "tools": None, "documents": None},
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # A template is a program that a user's messages run through, so its own mistakes count as refusals too.
            raise ChatTemplateError(f"The chat template refuses these messages: {error}.") from error


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks what the assistant wrote, for training; when serving it only shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would put &lt; into prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def load_prompt_tokenizer(model_path: Path, chat_template: str | None) -> PromptTokenizer:
    """The tokenizer of a model folder, with the template in the file `chat_template` or the folder's own.

    ValueError or OSError with one sentence when a file is missing or broken.
    """
    tokenizer_file = model_path / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ValueError(f"{tokenizer_file} is missing; the model needs a tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{tokenizer_file} cannot be read: {error}") from error
    config = read_json(model_path / "tokenizer_config.json")
    source: str | None
    if chat_template is not None:
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template: {chat_template} cannot be read: {error}") from error
    else:
        source = _own_template(model_path, config)
    template = None if source is None else ChatTemplate(source, _special_tokens(config))
    return PromptTokenizer(tokenizer, template)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is none; ValueError when it is broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _own_template(model_path: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's template: its own file, else the one in the tokenizer's configuration (of several the default)."""
    file = model_path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables bos_token, eos_token … a template may use."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens
