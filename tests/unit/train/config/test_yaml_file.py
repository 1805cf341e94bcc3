"""YAML files as sections: values, overrides, and one sentence with the file and the key for everything wrong."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from stellarbyte.train.config.yaml_file import MAX_BYTES, Section, read_yaml, yaml_value
from stellarbyte.train.errors import TrainError


class Texts(Section):
    kind: Literal["texts"]
    path: Path


class Rows(Section):
    kind: Literal["rows"]
    path: Path
    column: str = "text"


class Data(Section):
    max_length: int = Field(512, ge=1)
    sources: list[Annotated[Texts | Rows, Field(discriminator="kind")]] = Field([])


class Train(Section):
    lr: float = 0.001
    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.lr > 1:
            raise ValueError(f"lr {self.lr} is above 1")
        return self


class Run(Section):
    data: Data
    train: Train | None = Train()


def read(text: str, folder: Path, *overrides: str) -> Run:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return read_yaml(folder / "run.yaml", Run, overrides)


def test_values_come_from_the_file_then_from_overrides(tmp_path: Path) -> None:
    text = "data: {max_length: 7, sources: [{kind: rows, path: a.jsonl}]}\ntrain: {lr: 3e-4}"
    run = read(text, tmp_path)
    assert (run.data.max_length, run.train.lr) == (7, 0.0003)
    assert run.data.sources == [Rows(kind="rows", path=Path("a.jsonl"), column="text")]
    changed = read(
        text, tmp_path, "data.max_length=9", "train.lr=2E-5", "data.sources.0.column=poem", "train.name=诗=歌"
    )
    assert (changed.data.max_length, changed.train.lr, changed.train.name) == (9, 2e-5, "诗=歌")
    assert changed.data.sources[0].column == "poem"


def test_an_override_makes_sections_and_replaces_whole_ones(tmp_path: Path) -> None:
    assert read("data: {}\ntrain:\n", tmp_path, "train.name=x").train == Train(name="x")
    assert read("data: {}", tmp_path, "train={lr: 0.5}").train == Train(lr=0.5)


TEXTS = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Zs")))


@given(st.dictionaries(TEXTS, st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, st.lists)))
def test_values_are_those_of_json(content: dict[str, object]) -> None:
    """JSON is YAML: quoted texts stay texts, whatever they look like."""
    assert yaml_value(json.dumps(content, ensure_ascii=False), "x") == content


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("data: {max_lenght: 5}", [], "data.max_lenght is unknown; did you mean max_length?"),
        ("dtaa: {}", [], "dtaa is unknown; did you mean data?"),  # and not: data is missing
        ("data: {}\nq: 1", [], "q is unknown; known are data, train."),
        (
            "data: {sources: [{kind: rows, path: a, colum: b}]}",
            [],
            "data.sources.0.rows.colum is unknown; did you mean column?",
        ),
        ("data: {}\ntrain: {nam: 1}", [], "train.nam is unknown; did you mean name?"),
        ("data: {}", ["data.max_lenght=5"], "data.max_lenght is unknown; did you mean max_length?"),
        ("train: {}", [], "data is missing."),
        ("data: {max_length: 0}", [], "data.max_length (0) should be greater than or equal to 1."),
        (
            "data: {max_length: long}",
            [],
            "data.max_length ('long') should be a valid integer, unable to parse string as an integer.",
        ),
        ("data: {}\ntrain: {lr: .nan}", [], "train.lr (nan) should be a finite number."),
        ("data: {}\ntrain: {lr: 2}", [], "train: lr 2.0 is above 1."),
    ],
)
def test_wrong_keys_and_values(text: str, overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        read(text, tmp_path, *overrides)
    assert str(caught.value) == f"{tmp_path / 'run.yaml'}: {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "{} must contain keys with values, such as data: ...."),
        ("- a", "{} must contain keys with values, such as data: ...."),
        ("a: &x [1]\nb: *x", "{}, line 2 is not valid YAML: aliases are not supported."),
        ("data: {}\ndata: {}", "{}, line 2 is not valid YAML: the key 'data' is there twice."),
        ("? [a]\n: b", "{}, line 1 is not valid YAML: a key must be one word."),
        ("data: [", "{}, line 1 is not valid YAML: expected the node content, but found '<stream end>'."),
        ("a: !!python/object:os.system x", "{}, line 1 is not valid YAML: could not determine a constructor"),
        ("a: 2024-13-01", "{} is not valid YAML: month must be in 1..12"),
        ("[" * 100_000, "{} is nested too deeply."),
        ("#" * (MAX_BYTES + 1), "{} has more than 1 MiB; a configuration is far smaller."),
        ("\x00", "{} is not valid YAML: "),
    ],
)
def test_wrong_files(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        read(text, tmp_path)
    assert str(caught.value).startswith(said.format(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"absent\.yaml does not exist"):
        read_yaml(tmp_path / "absent.yaml", Run)
    with pytest.raises(TrainError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path, Run)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data", "--set data must have the form KEY=VALUE or SECTION.KEY=VALUE."),
        ("data..x=1", "--set data..x=1 must have the form KEY=VALUE or SECTION.KEY=VALUE."),
        ("data.max_length.x=1", "--set data.max_length.x=1: data.max_length is a value, not a section."),
        ("data.max_length.x.y=1", "--set data.max_length.x.y=1: data.max_length is a value, not a section."),
        ("data.sources.1.path=1", "--set data.sources.1.path=1: data.sources is a list of 1 entries, counted from 0."),
        ("data.sources.x=1", "--set data.sources.x=1: data.sources is a list of 1 entries, counted from 0."),
        ("data.max_length=[", "--set data.max_length=[, line 1 is not valid YAML: "),
    ],
)
def test_wrong_overrides(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        read("data: {max_length: 3, sources: [{kind: texts, path: a}]}", tmp_path, override)
    assert str(caught.value).startswith(said)
