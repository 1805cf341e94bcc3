"""Reads a YAML file into a pydantic model; everything wrong in it is one sentence with the file and the key."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from stellarbyte.train.errors import TrainError, missing_library

try:
    import yaml
except ImportError as error:
    raise missing_library("PyYAML", "Reading a YAML file") from error

MAX_BYTES = 1 << 20
_SHOWN_CHARACTERS = 80  # of a wrong value


class Section(BaseModel):
    """The base of every section: unknown keys are refused, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def read_yaml(file: Path, section: type[S], overrides: Sequence[str] = ()) -> S:
    """The file as a `section`, with the values of `overrides` (`a.b=VALUE`, VALUE in YAML) in the place of its own.

    A number in a path of an override is the index of a list's entry. Raises TrainError.
    """
    content = yaml_value(_read(file), str(file))
    if not isinstance(content, dict):
        raise TrainError(f"{file} must contain keys with values, such as {_example(section)}.")
    for override in overrides:
        _override(content, override)
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise TrainError(f"{file}: {_sentence(section, error)}") from error


class _Loader(yaml.SafeLoader):
    """YAML of plain values: no objects, no aliases (a few of them can grow without end), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be one word", problem_mark=key.start_mark)
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 3e-4 as text; everybody means a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise TrainError(f"{file} does not exist.") from error
    except OSError as error:
        raise TrainError(f"{file} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise TrainError(f"{file} has more than {MAX_BYTES >> 20} MiB; a configuration is far smaller.")
    return content


def yaml_value(content: bytes | str, name: str) -> Any:
    """The value of a YAML text; `name` names it in errors. Raises TrainError."""
    try:
        return yaml.load(content, _Loader)  # nosec B506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        raise TrainError(f"{name}{place} is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, dates that do not exist
        raise TrainError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise TrainError(f"{name} is nested too deeply.") from error


def _override(content: dict[str, Any], override: str) -> None:
    """Set one value within `content`; sections that are not there are made."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise TrainError(f"--set {override} must have the form KEY=VALUE or SECTION.KEY=VALUE.")
    place: Any = content
    for depth, key in enumerate(keys[:-1]):
        place = _entry(place, key, override, ".".join(keys[:depth]))
    value = yaml_value(text, f"--set {override}")
    if isinstance(place, list):
        _entry(place, keys[-1], override, ".".join(keys[:-1]))  # refuses an index that is not there
        place[int(keys[-1])] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    else:
        raise TrainError(f"--set {override}: {'.'.join(keys[:-1])} is a value, not a section.")


def _entry(place: Any, key: str, override: str, path: str) -> Any:
    if isinstance(place, list):
        if not key.isascii() or not key.isdigit() or int(key) >= len(place):
            raise TrainError(f"--set {override}: {path} is a list of {len(place)} entries, counted from 0.")
        return place[int(key)]
    if not isinstance(place, dict):
        raise TrainError(f"--set {override}: {path} is a value, not a section.")
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def _sentence(section: type[Section], error: ValidationError) -> str:
    """The first error; an unknown key comes before all others, since it often causes them."""
    errors = error.errors(include_url=False)
    chosen = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in chosen["loc"]]
    name = ".".join(location)
    if chosen["type"] == "extra_forbidden":
        known = sorted(_keys_at(section, location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1)
        return f"{name} is unknown; " + (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}.")
    if chosen["type"] == "missing":
        return f"{name} is missing."
    message = chosen["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if chosen["type"] in ("value_error", "assertion_error"):
        return f"{name}: {message}." if name else f"{message}."
    shown = repr(chosen["input"])
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
    return f"{name} ({shown}) {message}."


def _keys_at(section: type[Section], location: Sequence[str]) -> set[str]:
    """The keys that may stand at a location. Its other parts are indices of lists and names of a union's members."""
    sections = [section]
    for part in location:
        inner = [each.model_fields[part].annotation for each in sections if part in each.model_fields]
        if inner:
            sections = [found for annotation in inner for found in _sections_in(annotation)]
        elif named := [each for each in sections if each.__name__ == part]:
            sections = named
    return {key for each in sections for key in each.model_fields}


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _example(section: type[Section]) -> str:
    return next(iter(section.model_fields)) + ": ..."
