"""Turns the engine's deltas into fragments of a choice, and fragments into the whole choice.

A streamed choice sends its fragments and an unstreamed one their concatenation, so both have the same content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from stellarbyte_server.api.answers.addressed_calls import AddressedCallParser
from stellarbyte_server.api.answers.logprobs import (
    ShownToken,
    TokenAligner,
    chat_logprobs,
    joined_logprobs,
    legacy_logprobs,
    prompt_logprobs,
)
from stellarbyte_server.api.answers.tool_calls import CallDeltas, joined_calls, joined_function_call
from stellarbyte_server.api.answers.tool_parser import Content, Piece, ToolCallParser
from stellarbyte_server.protocol.messages import Delta, TokenLogprob
from stellarbyte_server.tokens.token_bytes import TokenBytes

Kind = Literal["completion", "chat"]


class PromptEcho(NamedTuple):
    """The prompt, repeated at the start of an answer."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int] = ()  # characters of the text before each token, if log-probabilities are requested


@dataclass(frozen=True, kw_only=True)
class ChoiceForm:
    """The contents of a choice in addition to its text."""

    kind: Kind
    logprobs: int | None = None  # number of alternatives for each token; None: no log-probabilities
    echo: PromptEcho | None = None
    prompt_logprobs: int | None = None  # number of alternatives for each token of the prompt, apart from the text
    prompt_token_ids: Sequence[int] | None = None  # shown together with the answer's token ids; None: neither
    with_tools: bool = False
    are_functions: bool = False  # calls are shown as function_call, the deprecated form
    shows_reasoning: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the deltas' text and reasoning are passed on unparsed, and nothing else."""
        of_prompt = (self.echo, self.prompt_logprobs, self.prompt_token_ids)
        return self.logprobs is None and of_prompt == (None, None, None) and not self.with_tools


@dataclass(kw_only=True, slots=True)
class Fragment:
    """A part of a choice; the last part has a finish reason."""

    text: str = ""
    reasoning: str = ""  # before the text
    calls: Sequence[dict[str, Any]] = ()  # deltas of tool calls
    function_call: dict[str, Any] | None = None  # delta of a call in the deprecated form
    pieces: Sequence[Piece] | None = None  # text and calls in their order; None: no tools
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None  # of an unstreamed answer
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # with finish_reason: the stop string, or the id of the stop token
    schema_violation: str | None = None  # with finish_reason

    @property
    def call_fields(self) -> dict[str, Any]:
        """The deltas of calls, as fields of a chunk's delta."""
        if self.function_call is not None:
            return {"function_call": self.function_call}
        return {"tool_calls": self.calls} if self.calls else {}

    @property
    def is_empty(self) -> bool:
        has_ids = bool(self.token_ids or self.prompt_token_ids)
        return not (self.text or self.reasoning or self.call_fields or has_ids or self.logprobs)

    @property
    def is_text(self) -> bool:
        """Whether the fragment has no content other than text."""
        return (
            not self.reasoning
            and not self.call_fields
            and self.logprobs is None
            and self.token_ids is None
            and self.prompt_token_ids is None
        )


class ChoiceReader:
    """Reads the deltas of one choice, in order."""

    def __init__(
        self,
        form: ChoiceForm,
        token_bytes: TokenBytes,
        parser: ToolCallParser | AddressedCallParser | None = None,
    ) -> None:
        self._form = form
        self._token_bytes = token_bytes
        self._parser = parser
        self._deltas = CallDeltas()
        self._called = False
        self._started = False
        self._reasoned = False
        self._aligner = None if form.logprobs is None else TokenAligner()

    @property
    def prompt_token_ids(self) -> Sequence[int] | None:
        """The prompt's token ids, if they are shown."""
        return self._form.prompt_token_ids

    def read(self, delta: Delta) -> Fragment:
        fragment = Fragment(text=delta.text, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
        if delta.reasoning or delta.num_reasoning_tokens:
            self._reasoned = True
            fragment.reasoning = delta.reasoning if self._form.shows_reasoning else ""
        if self._form.is_plain:
            return fragment
        if not self._started:
            self._started = True
            self._begin(fragment, delta)
        if self._aligner is not None:
            self._add_logprobs(self._aligner, fragment, delta)
        if self._form.prompt_token_ids is not None:
            fragment.token_ids = list(delta.token_ids)
        if isinstance(self._parser, AddressedCallParser):
            self._parser.address(delta.recipients)
        if self._parser is not None:
            self._parse(self._parser, fragment)
        return fragment

    def whole(self, index: int, fragments: Sequence[Fragment]) -> dict[str, Any]:
        """The choice of an unstreamed answer, from all its fragments."""
        text = "".join([fragment.text for fragment in fragments])
        choice: dict[str, Any] = {"index": index}
        if self._form.kind == "chat":
            calls: dict[str, Any] = {}
            if tool_calls := joined_calls([call for fragment in fragments for call in fragment.calls]):
                calls = {"tool_calls": tool_calls}
            if function_calls := [each.function_call for each in fragments if each.function_call is not None]:
                calls = {"function_call": joined_function_call(function_calls)}
            content = text if text or not (calls or self._reasoned) else None
            thought = reasoning_fields("".join([fragment.reasoning for fragment in fragments]))
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
            choice["message"] = message | thought | calls
        else:
            choice["text"] = text
        choice["logprobs"] = None
        if self._form.logprobs is not None:
            parts = [fragment.logprobs for fragment in fragments if fragment.logprobs is not None]
            choice["logprobs"] = joined_logprobs(parts if parts else [self._shaped([])])
        choice["finish_reason"] = fragments[-1].finish_reason
        choice["stop_reason"] = fragments[-1].stop_reason
        if fragments[-1].schema_violation is not None:
            choice["schema_violation"] = fragments[-1].schema_violation
        if fragments[-1].token_ids is not None:
            choice["token_ids"] = [token_id for fragment in fragments for token_id in fragment.token_ids or ()]
        if self._form.kind == "completion":  # a chat has one prompt and shows it outside its choices
            choice |= prompt_fields(fragments[0])
        return choice

    def _begin(self, fragment: Fragment, delta: Delta) -> None:
        """Add the prompt's text, log-probabilities and token ids to the first fragment, where requested."""
        echo = self._form.echo
        if echo is not None:
            fragment.text = echo.text + fragment.text
            if self._aligner is not None:
                shown = [_with_top(logprob, self._form.logprobs) for logprob in delta.prompt_logprobs]
                self._aligner.add(map(ShownToken, echo.token_ids, [None, *shown], echo.offsets))
        if self._form.prompt_logprobs is not None:
            num_top = self._form.prompt_logprobs
            fragment.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, num_top, self._token_bytes)
        if self._form.prompt_token_ids is not None:
            fragment.prompt_token_ids = list(self._form.prompt_token_ids)

    def _add_logprobs(self, aligner: TokenAligner, fragment: Fragment, delta: Delta) -> None:
        start = 0 if self._form.echo is None else len(self._form.echo.text)
        aligner.add(
            ShownToken(logprob.token_id, logprob, start + offset)
            for logprob, offset in zip(delta.logprobs, delta.offsets, strict=True)
        )
        shown = aligner.show(fragment.text, delta.finish_reason)
        if not shown:
            return
        fragment.logprobs = self._shaped(shown)

    def _shaped(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        if self._form.kind == "chat":
            return chat_logprobs(tokens, self._token_bytes)
        return legacy_logprobs(tokens, self._token_bytes)

    def _parse(self, parser: ToolCallParser | AddressedCallParser, fragment: Fragment) -> None:
        """Move the calls from the fragment's text to its calls."""
        pieces = parser.push(fragment.text)
        if fragment.finish_reason is not None:
            pieces += parser.flush()
        fragment.pieces = pieces
        fragment.text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        deltas = self._deltas.of([piece for piece in pieces if not isinstance(piece, Content)])
        if self._form.are_functions:  # at most one
            fragment.function_call = deltas[0]["function"] if deltas else None
        else:
            fragment.calls = deltas
        self._called = self._called or bool(deltas)
        if self._called and fragment.finish_reason == "stop":
            fragment.finish_reason = "function_call" if self._form.are_functions else "tool_calls"


def prompt_fields(first: Fragment) -> dict[str, Any]:
    """The prompt's fields in the first fragment, for a completion's choice or a whole chat."""
    fields = {"prompt_token_ids": first.prompt_token_ids, "prompt_logprobs": first.prompt_logprobs}
    return {name: value for name, value in fields.items() if value is not None}


def _with_top(logprob: TokenLogprob, num_top: int | None) -> TokenLogprob:
    """With no more alternatives than these: prompt_logprobs may have asked for more."""
    return logprob if len(logprob.top) == num_top else msgspec.structs.replace(logprob, top=logprob.top[:num_top])


def reasoning_fields(reasoning: str) -> dict[str, str]:
    """The reasoning of a message or delta, under both names that clients read; no fields without reasoning."""
    return {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
