"""Reads questions from a terminal: several lines, history, completion."""

import contextlib
import os
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import Completer
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

_STYLE = Style.from_dict(
    {
        "prompt": "ansicyan bold",
        "continuation": "ansibrightblack",
        "placeholder": "ansibrightblack",
        "completion-menu": "bg:default fg:default",
        "completion-menu.completion": "bg:default fg:ansicyan",
        "completion-menu.completion.current": "bg:ansicyan fg:ansiblack noreverse",
        "completion-menu.meta.completion": "bg:default fg:ansibrightblack",
        "completion-menu.meta.completion.current": "bg:default fg:default",
        "scrollbar.background": "bg:default",
        "scrollbar.button": "bg:default",
    }
)


def history_file() -> Path:
    """The file of past questions, readable by this user only; OSError if it cannot be created."""
    base = os.environ.get("XDG_STATE_HOME")
    folder = (Path(base) if base else Path.home() / ".local" / "state") / "stellarbyte"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / "chat-history"
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    file.chmod(0o600)  # it may have existed
    return file


class QuestionPrompt:
    """Enter sends; Alt+Enter, or a backslash before Enter, begins another line; pasted text stays one question."""

    def __init__(self, completer: Completer, label: Callable[[], str], history: Path | None) -> None:
        """`label`: the text before the question."""
        self._label = label
        self._is_leaving = False  # Ctrl-C was the last key
        self._session: PromptSession[str] = PromptSession(
            message=self._message,
            multiline=True,
            prompt_continuation=self._continuation,
            placeholder=self._placeholder,
            history=InMemoryHistory() if history is None else FileHistory(history),
            completer=completer,
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            key_bindings=self._keys(),
            style=_STYLE,
        )
        self._session.default_buffer.on_text_changed += self._stay

    async def read(self) -> str | None:
        """Read the next question; None if the user leaves."""
        self._is_leaving = False
        try:
            return await self._session.prompt_async(handle_sigint=False)
        except EOFError:
            return None

    @contextlib.contextmanager
    def typing_ahead(self) -> Iterator[None]:
        """Hide keys typed or pasted meanwhile and keep them for the next question.

        In a running event loop. Ctrl-C is a signal meanwhile and discards no keys.
        """
        keyboard, screen = self._session.input, self._session.output

        def keep() -> None:
            store_typeahead(keyboard, keyboard.read_keys())

        with _unechoed(keyboard.fileno()), keyboard.attach(keep):
            screen.enable_bracketed_paste()  # pasted lines are not sent
            screen.flush()
            try:
                yield
            finally:
                screen.disable_bracketed_paste()  # until the prompt enables it
                screen.flush()

    def _message(self) -> StyleAndTextTuples:
        return [("class:prompt", f"{self._label()}❯ ")]

    def _continuation(self, width: int, _line: int, _wraps: int) -> StyleAndTextTuples:
        return [("class:continuation", "… ".rjust(width))]

    def _placeholder(self) -> StyleAndTextTuples:
        return [("class:placeholder", "Ctrl-C again, or Ctrl-D, leaves" if self._is_leaving else "")]

    def _stay(self, _buffer: Buffer) -> None:
        self._is_leaving = False

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        in_question = has_focus(DEFAULT_BUFFER)  # not in the search of the history

        @keys.add("enter", filter=in_question)
        def _send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
                buffer.complete_state = None  # accept the completion, do not send
            elif buffer.document.char_before_cursor == "\\":
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.text = _as_unicode(buffer.text)
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=in_question)
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=in_question)
        def _clear(event: KeyPressEvent) -> None:
            if self._is_leaving:
                event.app.exit(exception=EOFError())
                return
            event.current_buffer.reset()
            self._is_leaving = True

        return keys


def _as_unicode(text: str) -> str:
    """Replace surrogates, by which the terminal's reader represents invalid UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


@contextlib.contextmanager
def _unechoed(terminal: int) -> Iterator[None]:
    """Read keys one by one without echo; Ctrl-C is still a signal and discards no keys."""
    before, quiet = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    quiet[0] &= ~termios.ICRNL  # Enter as in the prompt
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
