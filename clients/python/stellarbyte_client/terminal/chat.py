"""`stellarbyte chat`: a conversation at a terminal, or one answer for a pipe."""

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from stellarbyte_client import Model, StellarByteError
from stellarbyte_client.terminal.answer_view import AnswerView
from stellarbyte_client.terminal.connection import (
    CommandFailed,
    Connection,
    check_model,
    default_model,
    models_of,
    refusals_explained,
)
from stellarbyte_client.terminal.conversation import Answer, Conversation, Ending, Turn
from stellarbyte_client.terminal.markdown import THEME, printable
from stellarbyte_client.terminal.question_prompt import QuestionPrompt, history_file
from stellarbyte_client.terminal.slash_commands import Rating, SlashCommands

if TYPE_CHECKING:
    from stellarbyte_client.terminal.answers import Asker

_FRAME_S = 0.05
_LEAST_TIMED_S = 0.02  # shorter answers came in one piece
_MOST_DRAWING = 0.2  # share of time: long blocks are redrawn less often


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    connection: Connection
    prompt: str | None = None  # one question
    model: str | None = None  # None: the served model
    system: str | None = None
    adapter_scale: float | None = None
    sampling: dict[str, object]  # of conversation.FIELDS
    is_plain: bool = False
    is_quiet: bool = False
    keeps_history: bool = True


def chat(settings: ChatSettings) -> None:
    """Run a chat until the user leaves; with a prompt, or without a terminal, print one answer. StellarByteError."""
    if settings.prompt is not None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        question = _piped() if settings.prompt is None else settings.prompt
        if not question.strip():
            raise CommandFailed("The question is empty; give it as PROMPT or on standard input.")
        _answer_once(settings, question.strip())
    else:
        asyncio.run(_Chat(settings).run())


def _piped() -> str:
    """All of standard input; invalid UTF-8 becomes replacement characters."""
    return sys.stdin.buffer.read().decode(errors="replace")


def _answer_once(settings: ChatSettings, question: str) -> None:
    """Print one answer. Blocking calls come before the event loop, in which only a second Ctrl-C would end them."""
    with settings.connection.client() as client:
        conversation = _begin(settings, models_of(client))
    if settings.adapter_scale is not None and conversation.acting_scale is None:
        raise CommandFailed("--adapter-scale needs an adapter; give its name as --model.")
    asker = _new_asker(settings.connection)
    answer = Answer()
    write = _write_printable if sys.stdout.isatty() else _write
    asyncio.run(asker.ask(conversation.request(question), answer, on_text=write))
    if answer.text and not answer.text.endswith("\n"):
        _write("\n")
    if answer.problem is not None:
        raise CommandFailed(answer.problem)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_printable(text: str) -> None:
    _write(printable(text))


def _begin(settings: ChatSettings, models: Sequence[Model]) -> Conversation:
    """A conversation with these settings; CommandFailed if the server does not have the model."""
    default = default_model(models)
    conversation = Conversation(
        base_model=default.parent or default.id,
        model=default.id if settings.model is None else settings.model,
        system=settings.system,
        adapter_scale=settings.adapter_scale,
        sampling=dict(settings.sampling),
    )
    check_model(conversation.model, models)
    return conversation


def _new_asker(connection: Connection) -> "Asker":
    from stellarbyte_client.terminal.answers import Asker  # takes half a second, during which the user can type

    return Asker(connection)


class _Chat:
    def __init__(self, settings: ChatSettings) -> None:
        self._settings = settings
        self._console = Console(theme=THEME, highlight=False, markup=False, emoji=False)
        self._client = settings.connection.client()
        models = models_of(self._client)
        self._conversation = _begin(settings, models)
        self._commands = SlashCommands(self._conversation, models)
        self._greet(models)
        self._prompt = QuestionPrompt(self._commands, self._label, self._history())
        self._refreshing: threading.Thread | None = None
        self._asking: asyncio.Task[None] | None = None

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._stop)
        self._asker = asyncio.create_task(asyncio.to_thread(_new_asker, self._settings.connection))
        while True:
            self._refresh_models()
            line = await self._prompt.read()
            if line is None:
                return
            question, retried = line.strip(), None
            if question:
                self._console.print()
            if line.startswith("/"):
                try:
                    outcome = self._commands.run(line)
                except CommandFailed as error:
                    self._complain(str(error))
                    continue
                if outcome.is_end:
                    return
                self._note(outcome.text)
                if outcome.rating is not None:
                    await self._rate(outcome.rating)
                retried = outcome.retried
                question = "" if retried is None else retried.question
            if question:
                await self._ask(question, retried)

    async def _rate(self, rating: Rating) -> None:
        send = partial(self._client.rate, rating.answer_id, rating.rating, answer=rating.better)
        try:
            await asyncio.to_thread(_explained, send)
        except StellarByteError as error:
            self._complain(str(error))
        else:
            self._note(f"Rated as {rating.rating}.")

    def _stop(self) -> None:
        """Handle Ctrl-C outside the prompt. One just after the end of an answer has no effect."""
        if self._asking is not None:
            self._asking.cancel()

    def _refresh_models(self) -> None:
        """Start refreshing the names for /adapter, without waiting for the server."""

        def refresh() -> None:
            with contextlib.suppress(StellarByteError):
                self._commands.models = models_of(self._client)

        if self._refreshing is None or not self._refreshing.is_alive():
            self._refreshing = threading.Thread(target=refresh, daemon=True)
            self._refreshing.start()

    async def _ask(self, question: str, retried: Turn | None) -> None:
        answer = Answer()
        asking = asyncio.create_task(self._answer(question, answer))
        self._asking = asking
        try:
            with self._prompt.typing_ahead(), AnswerView(self._console, is_plain=self._settings.is_plain) as view:
                drawing_s = 0.0
                while not asking.done():
                    await asyncio.wait({asking}, timeout=max(_FRAME_S, drawing_s / _MOST_DRAWING))
                    started_s = time.perf_counter()
                    view.show(answer.text, answer.reasoning)
                    drawing_s = time.perf_counter() - started_s
                view.finish(answer.text, answer.reasoning)
        finally:
            asking.cancel()
        if asking.cancelled():
            answer.ending = Ending.STOPPED
        else:
            asking.result()
        self._conversation.add(question, answer, in_place_of=retried)
        self._report(answer)

    async def _answer(self, question: str, answer: Answer) -> None:
        asker = await asyncio.shield(self._asker)
        await asker.ask(self._conversation.request(question), answer)

    def _report(self, answer: Answer) -> None:
        if answer.text or answer.reasoning:
            self._console.print()
        if answer.problem is not None:
            kept = " The part that came is kept; /retry asks again." if answer.text else " /retry asks again."
            self._complain(answer.problem + kept)
        elif not self._settings.is_quiet or answer.ending is not Ending.COMPLETE:
            self._note(_figures(answer, is_quiet=self._settings.is_quiet))

    def _label(self) -> str:
        conversation = self._conversation
        if conversation.model == conversation.base_model:
            return ""
        scale = "" if conversation.acting_scale is None else f" × {conversation.acting_scale:g}"
        return f"{conversation.model}{scale} "

    def _greet(self, models: Sequence[Model]) -> None:
        adapters = sum(model.parent is not None for model in models)
        count = f" with {adapters} {'adapter' if adapters == 1 else 'adapters'}" if adapters else ""
        base_model, url = self._conversation.base_model, self._settings.connection.base_url
        self._console.print(Text.assemble((printable(base_model), "bold"), f"{count} at {url}; /help lists commands\n"))

    def _history(self) -> Path | None:
        if not self._settings.keeps_history:
            return None
        try:
            return history_file()
        except OSError as error:
            self._note(f"Questions are not stored: {error.filename} cannot be written.")
            return None

    def _note(self, text: str) -> None:
        if text:
            self._console.print(Text(printable(text) + "\n", style="dim"))

    def _complain(self, text: str) -> None:
        self._console.print(Text(printable(text) + "\n", style="red"))


def _explained(send: Callable[[], object]) -> None:
    with refusals_explained():
        send()


def _figures(answer: Answer, *, is_quiet: bool) -> str:
    parts = [] if answer.ending is Ending.COMPLETE else [answer.ending.value]
    usage = answer.usage
    if usage is not None and not is_quiet:
        parts.append(f"{usage.completion_tokens} {'token' if usage.completion_tokens == 1 else 'tokens'}")
        if answer.streaming_s > _LEAST_TIMED_S:
            parts.append(f"{(usage.completion_tokens - 1) / answer.streaming_s:.1f} tokens/s")
    if answer.ttft_s is not None and not is_quiet:
        parts.append(f"first after {answer.ttft_s:.2f} s")
    if usage is not None and not is_quiet:
        parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
        if usage.evicted_tokens:
            parts.append(f"{usage.evicted_tokens} evicted")
    return " · ".join(parts)
