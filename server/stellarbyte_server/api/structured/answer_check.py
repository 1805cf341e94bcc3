"""A finished answer is looked at where its grammar left out a part of its schema; the client is told, not refused.

The answer has been sent by then, so it stays as it is: what it breaks is one sentence beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stellarbyte_server.api.structured.json_schema import EnforceableSchema
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.validator import NotValidated, violation

NOT_CHECKED = "The answer was not checked against the whole schema: the server has too much to do."

Schema = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AnswerCheck:
    """The schemas of an answer, those that are not strict: of its text, and of calls by the tool's name."""

    content: Schema | None = None
    arguments: Mapping[str, Schema] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Schema | None, tools: Sequence[OfferedTool] = ()) -> "AnswerCheck | None":
        """None: everything is enforced. Leave out a content that is strict."""
        arguments = {tool.name: tool.parameters for tool in tools if tool.parameters is not None and not tool.strict}
        return cls(content=content, arguments=arguments) if content is not None or arguments else None

    def violation(self, text: str, calls: Sequence[tuple[str, str]]) -> str | None:
        """What of an answer its schemas do not allow, as one sentence; None: nothing. In a thread: it may take long.

        `calls` are names and arguments. An answer without calls is one by its text.
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
    except (TypeError, AttributeError, RecursionError):  # of values that no draft allows
        return f"{what} was not checked against the whole schema: it has a value that cannot be used."
    return None if why is None else f"{what} breaks a part of the schema that is not enforced: {why}"
