"""The files of a job: one example per line. All lines are checked before anything is trained.

An example is {"messages": [...], "tools": [...]}, or {"prompt": "...", "completion": "..."}: a question and its answer.
Only answers are learned; "weight": 0 leaves one out.
"""

from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import msgspec

from stellarbyte_server.batch.files import write_all
from stellarbyte_server.batch.input_lines import lines_of

MAX_EXAMPLES = 100_000
MAX_LINE_BYTES = 2**20
MAX_PROBLEMS = 100  # reported to the user
_FIELDS = {"messages", "tools"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = {
    "system": {"content", "name"},
    "developer": {"content", "name"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "weight", "tool_calls", "refusal"},
    "tool": {"content", "tool_call_id"},
}


class Problem(NamedTuple):
    line: int | None  # from 1
    message: str  # a sentence

    @property
    def sentence(self) -> str:
        return self.message[:1].upper() + self.message[1:]

    @property
    def shown(self) -> str:
        return self.sentence if self.line is None else f"Line {self.line}: {self.message}"


def in_one_sentence(file_id: str, problems: Sequence[Problem]) -> str:
    """The first of a file's problems, and the number of the others."""
    more = len(problems) - 1
    others = f" ({more} more {'line is' if more == 1 else 'lines are'} wrong, too.)" if more else ""
    return f"{file_id}: {problems[0].shown}{others}"


class Unusable(ValueError):
    """An example cannot be used; str() continues "Line 3: "."""


class Template(NamedTuple):
    """What the model's chat template shows."""

    shows_tools: bool
    shows_calls: bool


def check_examples(file: BinaryIO, normalized: BinaryIO, template: Template) -> tuple[int, list[Problem]]:
    """The number of examples, and what is wrong with them.

    Each is written to `normalized` as a chat with texts for contents, in the line that it has in the file.
    """
    num_examples, last = 0, 0
    problems: list[Problem] = []
    for number, _, text in lines_of(file, MAX_LINE_BYTES):
        if len(problems) >= MAX_PROBLEMS:
            break
        if num_examples >= MAX_EXAMPLES:
            problems.append(Problem(number, f"The file has more than {MAX_EXAMPLES} examples."))
            break
        try:
            example = _example(text, template)
        except Unusable as error:
            problems.append(Problem(number, str(error)))
            continue
        write_all(normalized, b"\n" * (number - last - 1) + msgspec.json.encode(example) + b"\n")
        num_examples, last = num_examples + 1, number
    if not (num_examples or problems):
        problems.append(Problem(None, "The file has no examples."))
    return num_examples, problems


def _example(text: bytes | None, template: Template) -> dict[str, Any]:
    if text is None:
        raise Unusable(f"the line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        record = msgspec.json.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable(f"the line is not valid UTF-8: byte {text[error.start]:#04x}.") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unusable(f"the line is not valid JSON: {' '.join(str(error).split())}.") from None
    if not isinstance(record, dict):
        raise Unusable("the line must be a JSON object.")
    if record.keys() & {"prompt", "completion"} and "messages" not in record:
        record = _of_completion(record)
    for field in record:
        if field not in _FIELDS:
            raise Unusable(f"the field {field!r:.80} is unknown; an example has 'messages', and may have 'tools'.")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Unusable("the field 'messages' must be a list with at least one message.")
    tools = _checked_tools(record.get("tools"), template)
    checked = [_checked_message(message, f"messages[{index}]", template) for index, message in enumerate(messages)]
    _check_calls_and_results(checked)
    answers = [message for message in checked if message["role"] == "assistant"]
    if checked[-1]["role"] != "assistant":
        raise Unusable("the last message must be the assistant's.")
    if not any(answer.get("weight", 1) for answer in answers):
        raise Unusable("every answer has weight 0, so there is nothing to learn.")
    return {"messages": checked} if tools is None else {"messages": checked, "tools": tools}


def _of_completion(record: dict[str, Any]) -> dict[str, Any]:
    for field in ("prompt", "completion"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise Unusable(f"the field {field!r} must be a text that is not empty.")
    others = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
    question, answer = (
        {"role": role, "content": record[field]} for role, field in (("user", "prompt"), ("assistant", "completion"))
    )
    return {"messages": [question, answer], **others}


def _checked_message(message: Any, place: str, template: Template) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Unusable(f"{place} must be an object.")
    role = message.get("role")
    if role not in _ROLES:
        raise Unusable(f"{place}.role must be one of {', '.join(_ROLES)}.")
    known = _MESSAGE_FIELDS[role]
    for field in message:
        if field != "role" and field not in known:
            raise Unusable(f"{place}.{field:.80} is not a field of a message with the role {role}.")
    calls = _checked_calls(message.get("tool_calls"), f"{place}.tool_calls", template)
    checked: dict[str, Any] = {
        "role": role,
        "content": _content(message.get("content"), place, may_be_null=bool(calls)),
    }
    if calls:
        checked["tool_calls"] = calls
    if message.get("name") is not None:
        checked["name"] = _text(message["name"], f"{place}.name")
    if message.get("refusal") is not None:
        raise Unusable(f"{place}.refusal must be null; write the refusal as content.")
    if role == "tool":
        checked["tool_call_id"] = _text(message.get("tool_call_id"), f"{place}.tool_call_id")
    if message.get("weight") is not None:
        if type(message["weight"]) not in (int, float) or message["weight"] not in (0, 1):
            raise Unusable(f"{place}.weight must be 0 or 1.")
        checked["weight"] = int(message["weight"])
    return checked


def _content(content: Any, place: str, *, may_be_null: bool) -> str:
    """A text, or text parts as one text."""
    if content is None and may_be_null:
        return ""
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            is_text = isinstance(part, dict) and part.get("type") == "text" and part.keys() == {"type", "text"}
            if not is_text or not isinstance(part["text"], str):
                raise Unusable(f"{place}.content[{index}] must be a text part; other kinds are not supported.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not (content or may_be_null):
        raise Unusable(f"{place}.content must be a text that is not empty.")
    return content


def _checked_calls(calls: Any, place: str, template: Template) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Unusable(f"{place} must be a list.")
    if calls and not template.shows_calls:
        raise Unusable(f"{place} cannot be learned: the model's chat template shows no tool calls.")
    checked = []
    for index, call in enumerate(calls):
        at = f"{place}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type") != "function":
            raise Unusable(f"{at} must be an object with an id, the type 'function', and a function.")
        arguments = _text(function.get("arguments"), f"{at}.function.arguments", may_be_empty=True)
        shown = {
            "name": _text(function.get("name"), f"{at}.function.name"),
            "arguments": _object_or(arguments),
        }
        checked.append({"id": _text(call.get("id"), f"{at}.id"), "type": "function", "function": shown})
    return checked


def _object_or(arguments: str) -> Any:
    """Arguments as chats show them to templates: as an object where they are one."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return arguments


def _check_calls_and_results(messages: list[dict[str, Any]]) -> None:
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                raise Unusable(f"messages[{index}].tool_call_id must be the id of a call before it without a result.")
            open_calls.remove(message["tool_call_id"])
        elif open_calls:
            raise Unusable(f"messages[{index}] must be the result of the call {min(open_calls)!r:.80}.")
        open_calls |= {call["id"] for call in message.get("tool_calls", ())}


def _checked_tools(tools: Any, template: Template) -> list[Any] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise Unusable("the field 'tools' must be a list.")
    if not template.shows_tools:
        raise Unusable("the field 'tools' cannot be learned: the model's chat template shows no tools.")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
        ):
            raise Unusable(f"tools[{index}] must be an object with the type 'function' and a function with a name.")
    return tools


def _text(value: Any, place: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise Unusable(f"{place} must be a text{'' if may_be_empty else ' that is not empty'}.")
    return value
