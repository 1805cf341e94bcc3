"""`stellarbyte train`: from texts to a tokenizer and token shards, and one line for everything that is wrong."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stellarbyte.cli.arguments.train import TRAIN_COMMANDS
from stellarbyte.cli.main import main
from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.tokenizer import TrainTokenizer
from stellarbyte.train.config.yaml_file import read_yaml
from stellarbyte.train.data.tokens import TokenSequences
from tests.support.servers.server_process import ROOT

SETTINGS = {"tokenizer": TrainTokenizer, "prepare": Prepare}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with chapters of a page and their settings."""
    monkeypatch.chdir(tmp_path)
    choice = random.Random(1)
    words = ["".join(choice.choices("abcdefghijklmnopqrstuvwxyz", k=choice.randint(1, 9))) for _ in range(300)]
    parts = [[" ".join(choice.choices(words, k=8)) for _ in range(3)] for _ in range(400)]
    rows = [json.dumps({"title": f"Part {i}", "lines": part}) for i, part in enumerate(parts)]
    Path("pages.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    source = {"files": ["*.jsonl.gz"], "template": "{title}\n{lines}", "kind": "page", "license": "MIT"}
    tokenizer = {"output": "tokenizer", "sources": [source], "stages": [{"vocabulary": 400}, {"vocabulary": 500}]}
    prepare = {"output": "shards", "tokenizer": "tokenizer", "held_out": 0.2, "sources": [source]}
    for name, settings in (("tokenizer", tokenizer), ("prepare", prepare)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_from_texts_to_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tokenizer", "tokenizer.yaml"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"page\*? .* 0 .* 0 ", said)
    assert said.endswith("Wrote tokenizer\n")
    assert main(["train", "prepare", "prepare.yaml", "--set", "held_out=0.5"]) == 0
    said = capsys.readouterr().out
    rows, held_out = TokenSequences(folder / "shards", "train", 64), TokenSequences(folder / "shards", "held_out", 64)
    assert f" {rows.num_tokens:,} " in said
    assert f" {held_out.num_tokens:,} " in said
    assert f"fingerprint {rows.index.fingerprint}\nlicenses MIT\nWrote shards\n" in said
    assert 0.5 < rows.num_tokens / held_out.num_tokens < 2
    assert rows.index.held_out == 0.5
    assert main(["train", "prepare", "prepare.yaml", "--set", "held_out=0.5"]) == 1
    assert capsys.readouterr().err.endswith("error: shards is complete; delete it, or name another output.\n")
    assert main(["train", "prepare", "prepare.yaml", "--set", "held_out=0.5", "--resume"]) == 0


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", [name for name, *_ in TRAIN_COMMANDS])
def test_wrong_settings_are_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", command, "absent.yaml"]) == 1
    assert capsys.readouterr() == ("", "error: absent.yaml does not exist.\n")
    if command in SETTINGS:
        assert main(["train", command, f"{command}.yaml", "--set", "sources.0.feild=x"]) == 1
        said = f"error: {command}.yaml: sources.0.feild is unknown; did you mean field?\n"
        assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(("library", "name"), [("yaml", "PyYAML"), ("pyarrow", "pyarrow")])
def test_a_missing_library_is_one_line(library: str, name: str, folder: Path) -> None:
    (folder / "pages.parquet").touch()
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from stellarbyte.cli.main import main\n"
        "sys.exit(main(['train', 'tokenizer', 'tokenizer.yaml', '--set', 'sources.0.files=[pages.parquet]']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    command = re.escape(f"{sys.executable} -m pip install 'stellarbyte[train]'")
    assert re.fullmatch(rf"error: Reading \S.* needs {name}: {command}\.\n", ran.stderr)


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "poet").glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_are_valid(file: Path) -> None:
    if file.stem in SETTINGS:
        read_yaml(file, SETTINGS[file.stem])


def test_serving_imports_nothing_of_training() -> None:
    code = (
        "import sys, stellarbyte, stellarbyte.cli.arguments.parser, stellarbyte_server.engine.start.load\n"
        "print([name for name in sys.modules if name.startswith('stellarbyte.train')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
