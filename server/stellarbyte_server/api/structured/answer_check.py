"""Validates a finished answer if its grammar omits a part of its schema, and reports a violation to the client.

The answer may have been streamed by then, so it is not changed: a violation is one sentence in a separate field.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stellarbyte_server.api.structured.json_schema import EnforceableSchema
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.validator import NotValidated, violation

NOT_CHECKED = "The answer was not checked against the whole schema: the server is busy."

Schema = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AnswerCheck:
    """The schemas of an answer that are not strict: of its text, and of calls by the tool's name."""

    content: Schema | None = None
    arguments: Mapping[str, Schema] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Schema | None, tools: Sequence[OfferedTool] = ()) -> "AnswerCheck | None":
        """None if all schemas are strict. `content` must be None if it is strict."""
        arguments = {tool.name: tool.parameters for tool in tools if tool.parameters is not None and not tool.strict}
        return cls(content=content, arguments=arguments) if content is not None or arguments else None

    def violation(self, text: str, calls: Sequence[tuple[str, str]]) -> str | None:
        """One sentence on the first violation of a schema; None: the answer is valid. May take long: call in a thread.

        `calls` are names and arguments. With calls, only their arguments are checked; otherwise the text.
        """
        if not calls:
            return None if self.content is None else _violation(self.content, text, "The answer")
        for name, arguments in calls:
            schema = self.arguments.get(name)
            if schema is not None and (why := _violation(schema, arguments, f"The call of {name}")) is not None:
                return why
        return None


def _violation(schema: Schema, text: str, what: str) -> str | None:
    if not EnforceableSchema(schema, "", strict=False).left_out:
        return None
    try:
        why = violation(schema, json.loads(text))
    except NotValidated as error:
        return f"{what} was not checked against the whole schema: {error}."
    except ValueError:
        return f"{what} is not valid JSON."
    except (TypeError, AttributeError, RecursionError):  # keywords with values that no draft allows
        return f"{what} was not checked against the whole schema: a value is invalid or nested too deeply."
    return None if why is None else f"{what} violates a part of the schema that is not enforced: {why}"
