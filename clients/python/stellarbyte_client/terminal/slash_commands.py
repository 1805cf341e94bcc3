"""Commands of a chat: /help, /adapter and so on. They change a conversation and print nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from stellarbyte_client import Model
from stellarbyte_client.terminal.connection import CommandFailed, check_model
from stellarbyte_client.terminal.conversation import FIELDS, Conversation, Ending, Turn, finite

KEYS = """\
Enter          sends the question
Alt+Enter, \\   begin another line (\\ before Enter); pasted text stays one question
Up, Down       earlier questions; Ctrl-R searches them
Ctrl-C         stops an answer; clears the line; twice, or Ctrl-D, leaves"""


@dataclass(frozen=True)
class Rating:
    """A judgement of an answer, for the server."""

    answer_id: str
    rating: Literal["good", "bad"]
    better: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    text: str = ""  # to show
    retried: Turn | None = None  # removed turn, to ask again
    rating: Rating | None = None  # to send
    is_end: bool = False  # of the chat


@dataclass(frozen=True)
class _Command:
    argument: str  # as in /help
    help: str
    run: Callable[[str], Outcome]
    complete: Callable[[str], Iterable[str]] = lambda _: ()  # completions of the argument


class SlashCommands(Completer):
    """The commands of one chat, and their completion. `models`: the server's last known ones."""

    def __init__(self, conversation: Conversation, models: Sequence[Model]) -> None:
        self.models = models
        self._conversation = conversation
        self._commands = {
            "help": _Command("", "show this", self._help),
            "adapter": _Command("[NAME]", "who answers; without NAME: list adapters", self._adapter, self._names),
            "scale": _Command("X", "how strongly the adapter acts, 0 to 8", self._scale),
            "system": _Command("[TEXT]", "set the system message; without TEXT: none", self._system),
            "set": _Command("[FIELD [VALUE]]", "sampling; without VALUE: the default", self._set, self._fields),
            "retry": _Command("", "ask the last question again in place of its answer", self._retry),
            "good": _Command("", "rate the last answer as good, for the operator to learn from", self._good),
            "bad": _Command("[ANSWER]", "rate it as bad; with a better ANSWER, if you like", self._bad),
            "clear": _Command("", "forget the conversation, keep the settings", self._clear),
            "save": _Command("FILE", "save the conversation as Markdown, or as JSON if FILE ends in .json", self._save),
            "save!": _Command("FILE", "the same, in place of a FILE that exists", self._save_over),
            "usage": _Command("", "tokens of this chat", self._usage),
            "exit": _Command("", "leave", lambda _: Outcome(is_end=True)),
        }  # fmt: skip

    def run(self, line: str) -> Outcome:
        """Execute a line that begins with a slash; CommandFailed on failure."""
        name, _, argument = line.removeprefix("/").partition(" ")
        command = self._commands.get(name.strip())
        if command is None:
            raise CommandFailed(
                f"There is no command /{name.strip()}; /help lists them. A space before it makes it a question."
            )
        argument = argument.strip()
        if argument and not command.argument:
            raise CommandFailed(f"/{name} takes no argument.")
        if not argument and command.argument and not command.argument.startswith("["):
            raise CommandFailed(f"/{name} needs {command.argument}: {command.help}.")
        return command.run(argument)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for known, command in self._commands.items():
                if known.startswith(name):
                    yield Completion(known, -len(name), display=f"/{known}", display_meta=command.help)
        elif name in ("save", "save!"):
            yield from PathCompleter(expanduser=True).get_completions(Document(argument), complete_event)
        elif name in self._commands:
            for choice in self._commands[name].complete(argument):
                if choice.startswith(argument):
                    yield Completion(choice, -len(argument))

    def _help(self, _: str) -> Outcome:
        heads = [f"/{name} {command.argument}".rstrip() for name, command in self._commands.items()]
        width = max(map(len, heads)) + 2
        helps = [command.help for command in self._commands.values()]
        lines = [head.ljust(width) + help for head, help in zip(heads, helps, strict=True)]
        return Outcome("\n".join(lines) + f"\n\n{KEYS}")

    def _names(self, _: str) -> Iterable[str]:
        return [model.id for model in self.models]

    def _adapter(self, name: str) -> Outcome:
        conversation = self._conversation
        if not name:
            marks = {conversation.model: "●"}
            return Outcome("\n".join(f"{marks.get(known, ' ')} {known}" for known in self._names("")))
        check_model(name, self.models)
        conversation.model = name
        return Outcome(f"{name} answers from now on.")

    def _scale(self, text: str) -> Outcome:
        try:
            self._conversation.adapter_scale = finite(text)
        except ValueError:
            raise CommandFailed(f"The scale must be a number from 0 to 8; {text!r} is not.") from None
        if self._conversation.acting_scale is None:
            return Outcome("The scale applies once an adapter is selected with /adapter.")
        return Outcome(f"{self._conversation.model} acts with scale {self._conversation.adapter_scale:g} from now on.")

    def _system(self, text: str) -> Outcome:
        self._conversation.system = text or None
        return Outcome("System message set." if text else "System message removed.")

    def _fields(self, argument: str) -> Iterable[str]:
        if argument.startswith("context_overflow "):
            return ["context_overflow error", "context_overflow slide"]
        return FIELDS

    def _set(self, argument: str) -> Outcome:
        sampling = self._conversation.sampling
        if not argument:
            width = max(map(len, FIELDS)) + 2
            return Outcome("\n".join(f"{name:{width}}{sampling.get(name, 'default')}" for name in FIELDS))
        name, _, text = argument.partition(" ")
        if name not in FIELDS:
            raise CommandFailed(f"There is no field {name!r}; fields are {', '.join(FIELDS)}.")
        if not text:
            sampling.pop(name, None)
            return Outcome(f"{name} is the default again.")
        try:
            sampling[name] = FIELDS[name].read(text.strip())
        except ValueError:
            raise CommandFailed(f"{name} must be {FIELDS[name].kind}; {text.strip()!r} is not.") from None
        return Outcome(f"{name} is {sampling[name]} from now on.")

    def _retry(self, _: str) -> Outcome:
        if not self._conversation.turns:
            raise CommandFailed("There is no question to ask again.")
        return Outcome(retried=self._conversation.turns.pop())

    def _good(self, _: str) -> Outcome:
        return Outcome(rating=Rating(self._last_answer_id(), "good"))

    def _bad(self, better: str) -> Outcome:
        return Outcome(rating=Rating(self._last_answer_id(), "bad", better or None))

    def _last_answer_id(self) -> str:
        answer = self._conversation.turns[-1].answer if self._conversation.turns else None
        if answer is None or answer.id is None or answer.ending not in (Ending.COMPLETE, Ending.LENGTH):
            raise CommandFailed("There is no complete answer to rate.")
        return answer.id

    def _clear(self, _: str) -> Outcome:
        self._conversation.turns.clear()
        return Outcome("Conversation cleared; settings kept.")

    def _save(self, name: str) -> Outcome:
        return self._write(name, "x")

    def _save_over(self, name: str) -> Outcome:
        return self._write(name, "w")

    def _write(self, name: str, mode: str) -> Outcome:
        path = Path(name).expanduser()
        if path.suffix not in (".json", ".md", ".markdown"):
            raise CommandFailed(f"The file's name must end in .md or .json; {name!r} does not.")
        if not any(turn.answer.text for turn in self._conversation.turns):
            raise CommandFailed("There is nothing to save yet.")
        text = self._conversation.as_json() if path.suffix == ".json" else self._conversation.as_markdown()
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise CommandFailed(f"{path} already exists; /save! {name} replaces it.") from None
        except OSError as error:
            raise CommandFailed(f"{path} cannot be written: {error.strerror}.") from None
        return Outcome(f"Saved as {path}.")

    def _usage(self, _: str) -> Outcome:
        usage, count = self._conversation.usage, self._conversation.num_answers
        lines = [
            f"{count} {'answer' if count == 1 else 'answers'}, {usage.completion_tokens} tokens",
            f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached",
        ]
        if usage.evicted_tokens:
            lines.append(f"{usage.evicted_tokens} tokens evicted")
        last = self._conversation.turns[-1].answer.usage if self._conversation.turns else None
        if last is not None:
            limit = self.models[0].max_model_len  # the same for adapters
            context = last.prompt_tokens + last.completion_tokens - last.evicted_tokens
            lines.append(f"The conversation takes {context} of the context's {limit} tokens.")
        return Outcome("\n".join(lines))
