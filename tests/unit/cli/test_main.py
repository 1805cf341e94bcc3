"""The `stellarbyte` command: what it prints, and one line with exit status 1 for everything that users get wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stellarbyte.cli.main import main
from tests.support.models.hugging_face import tiny_llama


def test_convert_info_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = str(tmp_path / "target")
    assert main(["convert", str(tiny_llama(tmp_path / "source")), target, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"Wrote {target}\n"
    assert main(["info", target]) == 0
    assert "4 query, 2 key/value, of 8" in capsys.readouterr().out
    assert main(["info", target, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stored_dtype"], found["config"]["num_hidden_layers"]) == ("bfloat16", 3)
    texts = []
    for options in (["--raw"], [], ["--temperature", "0.8", "--seed", "1"], ["--temperature", "0.8", "--seed", "1"]):
        assert main(["generate", target, "the capital", "--max-tokens", "8", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[2] == texts[3]
    assert texts[0] != texts[1]  # the chat template makes another prompt


@pytest.mark.parametrize(
    ("flags", "told"), [(["--help"], "usage: "), (["--prot", "5"], "unrecognized arguments: --prot")]
)
def test_serve_leaves_its_flags_to_the_server(flags: list[str], told: str, capfd: pytest.CaptureFixture[str]):
    try:
        status = main(["serve", *flags])
    except SystemExit as ended:
        status = ended.code
    output = capfd.readouterr()
    assert status == (0 if flags == ["--help"] else 2)
    assert told in output.out + output.err


def test_other_commands_take_no_unknown_flags(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["info", "demo", "--prot"])
    assert "unrecognized arguments: --prot" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert main(["convert", str(tiny_llama(folder / "source")), str(folder / "model")]) == 0
    return folder / "model"


def test_a_temperature_near_zero_is_the_likeliest_answer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for temperature in ("0", "1e-300"):
        assert main(["generate", str(tiny), "the capital", "--max-tokens", "8", "--temperature", temperature]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_generate_tells_in_one_line_what_it_cannot_answer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(model: Path, *arguments: str) -> str:
        assert main(["generate", str(model), *arguments]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    bare, broken = tmp_path / "bare", tmp_path / "broken"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(tiny, broken)
    (broken / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert said(tiny, "", "--raw") == "error: The prompt is empty; give at least one token.\n"
    assert said(bare, "hello") == f"error: {bare / 'tokenizer.json'} is missing; text prompts need a tokenizer.\n"
    assert re.fullmatch(f"error: The tokenizer of {broken} cannot be read: .+\\.\n", said(broken, "hello"))


@pytest.mark.parametrize("command", [["generate", "{}", "the capital", "--max-tokens", "4"], ["info", "{}"]])
def test_who_has_read_enough_may_leave(
    command: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text that waits in a buffer when a command ends is part of what it says, too."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main([part.format(tiny) for part in command]) == 128 + signal.SIGPIPE
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info", "{}"], ["convert", "{}", "{}/target"], ["generate", "{}", "hello"]])
def test_errors_are_one_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [part.format(tmp_path / "absent") for part in command]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"error: {tmp_path / 'absent'} does not exist.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["convert", "x"],
        ["info", "x", "--yaml"],
        ["generate", "x", "hello", "--max-tokens", "0"],
        ["generate", "x", "hello", "--temperature", "-1"],
        ["generate", "x", "hello", "--temperature", "nan"],
        ["generate", "x", "hello", "--top-p", "1.5"],
        ["generate", "x", "hello", "--seed", "-1"],
        ["generate", "x", "hello", "--seed", "4294967296"],
        ["chat", "--max-tokens", "none"],
        ["adapters"],
        ["adapters", "load", "x"],
        ["adapters", "watch", "--interval", "0"],
        ["bench", "--streams", "1,x"],
        ["bench", "--streams", "0"],
        ["bench", "--model", "a,,b"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "--min-p", "nan"], "argument --min-p: 'nan' must be a finite number"),
        (["chat", "--adapter-scale", "inf"], "argument --adapter-scale: 'inf' must be a finite number"),
        (["chat", "--temperature", "1e999"], "argument --temperature: '1e999' must be a finite number"),
        (["chat", "--presence-penalty", "much"], "argument --presence-penalty: 'much' must be a finite number"),
        (["chat", "--top-k", "1.5"], "argument --top-k: '1.5' must be an integer"),
        (["chat", "--api-key", "ключ"], "argument --api-key: a key must consist of printable ASCII characters"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"stellarbyte chat: error: {said}"


@pytest.mark.parametrize("module", ["cli.arguments.parser", "cli", "cli.chat", "cli.adapters", "cli.bench"])
def test_commands_that_need_no_model_import_nothing_that_takes_seconds(module: str) -> None:
    code = f"import sys, stellarbyte.{module}; print({{'torch', 'transformers', 'openai'}} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
