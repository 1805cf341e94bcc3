"""The clients' lists of sampling fields are those that the API's declarations make."""

import re
from pathlib import Path

import pytest

from scripts.sampling_fields import OF_TERMINAL, OF_WEB, TARGETS
from stellarbyte_client.terminal.conversation import FIELDS
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.protocol.request import SamplingParams
from tests.support.servers.server_process import ROOT


@pytest.mark.parametrize("path", TARGETS, ids=lambda path: path.name)
def test_a_list_is_as_the_api_declares_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == TARGETS[path](), "run: python -m scripts.sampling_fields"


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_every_control_of_the_page_has_a_label(language: str) -> None:
    text = (ROOT / f"clients/web/stellarbyte_web/{language}.js").read_text(encoding="utf-8")
    labels = {"stop": "stopStrings"}  # "stop" is a button
    assert [name for name in OF_WEB if f"\n  {labels.get(name, name)}: " not in text] == []


def test_the_terminal_reads_every_kind_of_field() -> None:
    assert tuple(FIELDS) == OF_TERMINAL
    assert FIELDS["top_k"].read("5") == 5 and FIELDS["min_p"].read("0.5") == 0.5
    assert FIELDS["context_overflow"].read("slide") == "slide"
    for name, wrong in (("top_k", "0.5"), ("min_p", "nan"), ("context_overflow", "integer")):
        with pytest.raises(ValueError):
            FIELDS[name].read(wrong)


def test_the_page_about_the_api_names_every_field() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    fields = [name for name in SamplingParams.__struct_fields__ if name in ChatBody.model_fields]
    assert [name for name in fields if re.search(rf"\b{name}\b", text) is None] == []
