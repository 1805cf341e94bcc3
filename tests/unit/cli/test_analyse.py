"""`stellarbyte analyse` writes a report, or tells in one line why it cannot, and leaves nothing behind then."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from stellarbyte.analysis import analyse
from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures import gallery
from stellarbyte.analysis.pictures.style import Pen
from stellarbyte.cli.main import main
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.training.byte_tokenizer import save_byte_tokenizer

DRAWN = ("parameters", "speed", "adapter-1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(vocab_size=300, num_hidden_layers=2).save_pretrained(folder)
    return save_byte_tokenizer(folder, vocab_size=300)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One speed, and few of the pictures, which tests/unit/analysis draws."""
    monkeypatch.setitem(analyse.GRIDS, "cpu", ((1,), (4,)))
    drawings = gallery.drawings

    def few(analysis: Analysis) -> list[tuple[str, gallery.Draw]]:
        return [(name, draw if name in DRAWN else _empty) for name, draw in drawings(analysis)]

    monkeypatch.setattr(gallery, "drawings", few)


def _empty(_: Pen) -> Figure:
    return Figure(figsize=(1, 1))


def test_a_report_of_a_text_in_a_file_with_an_adapter(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "tones", make_model(vocab_size=300, num_hidden_layers=2), 1)
    (tmp_path / "river.txt").write_text("a river is wide")
    out = tmp_path / "new" / "report"
    options = ["--text", str(tmp_path / "river.txt"), "--adapter", str(adapter), "--adapter", str(adapter)]
    assert main(["analyse", str(model), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out == f"Wrote {out / 'index.html'}\n"
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found["text"] == {"name": "river.txt", "content": "a river is wide"}
    assert [one["name"] for one in found["adapters"]] == ["tones", "tones"] and len(found["speeds"]) == 1
    assert (found["device"], found["dtype"]) == ("cuda" if torch.cuda.is_available() else "cpu", found["dtype"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<h1>Analysis of " in page and ">tones</h3>" in page
    assert [folder.name for folder in out.parent.iterdir()] == ["report"]


def test_in_chinese_without_speed_into_an_empty_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    arguments = ["--out", str(out), "--no-speed", "--language", "zh", "--device", "cpu"]
    assert main(["analyse", str(model), *arguments]) == 0
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (found["speeds"], found["text"]["name"], found["dtype"]) == ([], "sample.zh.txt", "float32")
    assert "的分析报告</h1>" in (out / "index.html").read_text(encoding="utf-8")
    assert "speed" not in {axis["name"] for axis in found["axes"]} and not (out / "speed.png").exists()


def test_a_model_without_a_tokenizer_has_a_report_of_its_weights(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["analyse", str(bare), "--out", str(tmp_path / "out"), "--no-speed"]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["attention"] is found["quality"] is found["text"] is None and len(found["weights"]) > 20


def test_what_cannot_be_analysed_is_told_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def told(*arguments: str, source: Path = model) -> str:
        assert main(["analyse", str(source), "--no-speed", "--out", str(out), *arguments]) == 1
        output = capsys.readouterr()
        assert output.out == "" and list(tmp_path.glob(".out*")) == []
        return output.err.splitlines()[-1]

    absent, full, bare = tmp_path / "absent", tmp_path / "full", tmp_path / "bare"
    full.mkdir()
    (full / "file").touch()
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert told(source=absent) == f"error: {absent} does not exist."
    assert told("--text", "") == "error: The text in --text is empty; give at least a word."
    assert told("--text", "水" * 30_000).endswith("has more than 65,536 bytes; give a shorter text.")
    assert told("--text", "a", source=bare) == f"error: {bare / 'tokenizer.json'} is missing; --text needs a tokenizer."
    assert told("--out", str(full)) == f"error: {full} is not empty; give a folder that does not exist yet."
    assert told("--out", str(full / "file")) == f"error: {full / 'file'} exists and is not a folder."
    assert (
        told("--out", str(full / "file" / "out"))
        == f"error: {full / 'file' / 'out'} could not be written: File exists."
    )
    assert told("--adapter", str(absent)).startswith(f"error: The adapter {absent} cannot be analysed: ")
    if not torch.cuda.is_available():
        assert told("--device", "cuda") == "error: --device cuda needs a GPU that torch can use; there is none."
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = f"{sys.executable} -m pip install 'stellarbyte[analysis]'"
    assert told() == f"error: stellarbyte analyse needs matplotlib: {command}."
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_model(vocab_size=300, num_hidden_layers=2)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    assert main(["analyse", str(tmp_path / "broken"), "--out", str(tmp_path / "out")]) == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
