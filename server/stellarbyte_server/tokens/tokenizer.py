"""Prompts to token ids in the HTTP process: the model's tokenizer and its chat template. Never imports torch.

Does not use transformers, whose tokenizers take seconds to import and load torch; templates render as with its
`apply_chat_template`.
"""

import functools
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.defaults
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Encoding, Tokenizer

from stellarbyte_server.tokens.detokenizer import make_detokenizer
from stellarbyte_server.tokens.reasoning_marks import find_marks
from stellarbyte_server.tokens.stand_in_tokenizer import make_stand_in_tokenizer
from stellarbyte_server.tokens.token_bytes import TokenBytes

logger = logging.getLogger("server.tokens")

DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"  # transformers' names of a model's chat templates
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Names reserved in every chat template; requests may set all others.
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
    | {"raise_exception", "strftime_now", "self", "super", "loop", "caller", "varargs", "kwargs"}
    | {*_SPECIAL_TOKENS, *jinja2.defaults.DEFAULT_NAMESPACE}
)


class ChatTemplateError(ValueError):
    """A chat template is missing, invalid, or refuses the messages; str() is one sentence for the user."""


class NoTokenizerError(ValueError):
    """A text cannot be encoded, because the model has no tokenizer; str() is one sentence for the user."""

    def __init__(self) -> None:
        super().__init__("This model has no tokenizer; give the prompt as token ids.")


class UnembeddableTokenError(ValueError):
    """A text contains a token without an embedding in the model; str() is one sentence for the user."""


class PromptTokenizer:
    """Converts texts and chats to token ids, and ids to text. Any thread may call it.

    With `is_stand_in`, for a model without a tokenizer, ids can be decoded, and encoding raises NoTokenizerError. Ids
    are below `vocab_size`; a text with a token beyond raises UnembeddableTokenError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_templates: "Mapping[str, ChatTemplate]",
        vocab_size: int,
        *,
        is_stand_in: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._is_stand_in = is_stand_in
        self._chat_templates = chat_templates
        self.token_bytes = TokenBytes(tokenizer)
        self.reasoning = None if is_stand_in else find_marks(tokenizer, self.chat_template_source, vocab_size)
        # An upper bound in characters. A stand-in refuses every text, so it needs no bound.
        self.longest_token = sys.maxsize if is_stand_in else max(map(len, tokenizer.get_vocab()), default=1)

    @property
    def chat_template_source(self) -> str | None:
        """The source of the template for chats with tools; None: no template."""
        template = self._chat_template(has_tools=True)
        return None if template is None else template.source

    def _chat_template(self, *, has_tools: bool) -> "ChatTemplate | None":
        """The template that transformers would choose."""
        default = self._chat_templates.get(DEFAULT_TEMPLATE)
        return self._chat_templates.get(TOOL_TEMPLATE, default) if has_tools else default

    @property
    def takes_system_messages(self) -> bool:
        """Whether the chat template shows messages by the system."""
        template = self._chat_template(has_tools=True)
        return template is None or template.takes_system

    def template_variables(self, *, has_tools: bool) -> frozenset[str]:
        """The variables that the template for chats with or without tools reads."""
        template = self._chat_template(has_tools=has_tools)
        return frozenset() if template is None else template.variables

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode a prompt, with the special tokens that the tokenizer adds, if `add_special_tokens`."""
        return self._encoding(text, add_special_tokens).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_special_tokens: bool = False, **options: Any
    ) -> list[int]:
        """Encode a chat rendered by `render_chat`, which takes the `options`.

        The template contains all special tokens; with `add_special_tokens` the tokenizer also adds its own.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """A chat's prompt by `ChatTemplate.render`, by default up to the assistant's answer; ChatTemplateError."""
        if self._is_stand_in:
            raise NoTokenizerError
        template = self._chat_template(has_tools=tools is not None)
        if template is None:
            raise ChatTemplateError(
                "This model has no chat template; start the server with --chat-template FILE or use /v1/completions."
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def starts(self, text: str, add_special_tokens: bool = True) -> list[int | None]:
        """For each token of `encode`, the place of its first character; None for added special tokens."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        places = accumulate((start for start, _ in encoding.offsets), max)  # a token of parts of a character goes back
        return [None if added else place for place, added in zip(places, encoding.special_tokens_mask, strict=True)]

    def encode_for_echo(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """As `encode`, with the number of characters before each token; added special tokens have no characters."""
        encoding = self._encoding(text, add_special_tokens)
        added = {i for i, is_added in enumerate(encoding.special_tokens_mask) if is_added}
        return encoding.ids, self._pieces(encoding.ids, added)[1]

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        if self._is_stand_in:
            raise NoTokenizerError
        # The library releases the GIL only for batches; "fast" omits offsets.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        last = max(encoding.ids, default=0)
        if last >= self._vocab_size:
            raise UnembeddableTokenError(
                f"The text contains the token {self.token_text(last)!r} (id {last}), but this model has embeddings"
                f" for only {self._vocab_size} tokens."
            )
        return encoding

    def decode_with_offsets(self, token_ids: Sequence[int], skip_special_tokens: bool) -> tuple[str, list[int]]:
        """The text of tokens, and the number of characters before each token."""
        special = self.token_bytes.special_ids if skip_special_tokens else frozenset[int]()
        hidden = {i for i, token_id in enumerate(token_ids) if token_id in special}
        return self._pieces(token_ids, hidden)

    def _pieces(self, token_ids: Sequence[int], hidden: set[int]) -> tuple[str, list[int]]:
        """Text and offsets of tokens, without the tokens in the places `hidden`."""
        detokenizer = make_detokenizer(self._tokenizer, skip_special_tokens=False)
        pieces: list[str] = []
        offsets: list[int] = []
        length = 0
        for i, token_id in enumerate(token_ids):
            offsets.append(length)
            if i not in hidden:
                pieces.append(detokenizer.push(token_id))
                length += len(pieces[-1])
        return "".join(pieces) + detokenizer.flush(), offsets

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens; invalid UTF-8 becomes U+FFFD, ids without a token become nothing."""
        return self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token with this text, if the model has an embedding for it."""
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None or token_id not in self.token_bytes.special_ids or token_id >= self._vocab_size:
            return None
        return token_id

    def token_text(self, token_id: int) -> str:
        """A token's spelling in the vocabulary ("Ġthe" for " the"); "" for an id without a token."""
        text = self._tokenizer.id_to_token(token_id)
        return "" if text is None else text


class ChatTemplate:
    """A model's Jinja template, in a sandbox. Any thread may render."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """ChatTemplateError if `source` is not a template."""
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
        self.source = source
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        self._special_tokens = dict(special_tokens)

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template shows system messages; others refuse or omit them."""
        content = "instructions"
        try:
            shown = self.render([{"role": "system", "content": content}, {"role": "user", "content": "question"}])
        except ChatTemplateError:
            return False
        return content in shown

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Render a chat, by default up to the assistant's answer; ChatTemplateError if the template refuses it.

        With `continue_final_message` the last message is the start of the answer, so the text ends with its content.
        Excludes `add_generation_prompt`. `variables` are further variables for the template.
        """
        if not continue_final_message:
            return self._render(messages, tools, add_generation_prompt, variables)
        if add_generation_prompt:
            raise ChatTemplateError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false."
            )
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise ChatTemplateError("continue_final_message needs a final message with text content.")
        content = messages[-1]["content"]
        mark = secrets.token_hex(16)  # in no message; a space after it shows whether the template trims contents
        marked = {**messages[-1], "content": f"{content}{mark} "}
        text = self._render([*messages[:-1], marked], tools, False, variables)
        end = text.rfind(mark)
        if end < 0 or content.strip() not in text[:end]:
            raise ChatTemplateError(
                "The model's chat template changes the final message, so continue_final_message cannot be used."
            )
        return text[:end] if text.startswith(mark + " ", end) else text[:end].rstrip()

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            return self._template.render(
                {**variables, **self._special_tokens, "messages": messages, "tools": tools, "documents": None},
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # A template is a program that the messages can make fail, so its own errors also count as refusals.
            raise ChatTemplateError(f"The chat template refuses these messages: {error}.") from error


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; serving renders its contents."""

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
    """The filter `tojson` without Jinja's HTML escapes, which would put &lt; into prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def load_prompt_tokenizer(
    model_path: Path, chat_template: str | None, vocab_size: int, *, may_stand_in: bool = False
) -> PromptTokenizer:
    """Load a model folder's tokenizer, with the template in the file `chat_template` or the folder's own.

    If the folder has none and `may_stand_in`, returns a stand-in of `vocab_size` ids that does not encode text.

    ValueError or OSError with one sentence if a file is missing or invalid.
    """
    tokenizer_file = model_path / "tokenizer.json"
    if not tokenizer_file.is_file():
        if may_stand_in:
            return PromptTokenizer(make_stand_in_tokenizer(vocab_size), {}, vocab_size, is_stand_in=True)
        raise ValueError(f"{tokenizer_file} is missing; serving needs a tokenizer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # batches of one, in the caller's thread and at its priority
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{tokenizer_file} cannot be read: {error}") from error
    config = read_json(model_path / "tokenizer_config.json")
    if chat_template is not None:
        try:
            sources = {DEFAULT_TEMPLATE: Path(chat_template).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template: {chat_template} cannot be read: {error}") from error
    else:
        sources = _own_templates(model_path, config)
        if sources and DEFAULT_TEMPLATE not in sources:
            names = ", ".join(sorted(sources))
            logger.warning("the model has chat templates (%s), but no default; --chat-template FILE gives one", names)
    tokens = _special_tokens(config)
    # Templates of other names are not used, so their errors do not matter.
    used = {name: source for name, source in sources.items() if name in (DEFAULT_TEMPLATE, TOOL_TEMPLATE)}
    templates = {name: ChatTemplate(source, tokens) for name, source in used.items()}
    return PromptTokenizer(tokenizer, templates, vocab_size)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, empty if the file is missing; ValueError if it is invalid."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object")
    return content


def _own_templates(model_path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's templates by name: those in files, else those in the tokenizer's configuration."""
    files = {file.stem: file for file in sorted((model_path / "additional_chat_templates").glob("*.jinja"))}
    if (file := model_path / "chat_template.jinja").is_file():
        files[DEFAULT_TEMPLATE] = file
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    given = config.get("chat_template")
    entries = given if isinstance(given, list) else [{"name": DEFAULT_TEMPLATE, "template": given}]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The template's variables bos_token, eos_token and so on."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens
