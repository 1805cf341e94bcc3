"""`stellarbyte compress`: a folder that loads, the figures on the screen, and one line for each error."""

import json
from pathlib import Path

import pytest
import torch

from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.cli.main import main
from tests.support.models.hugging_face import tiny_llama

SMALL = ["--context", "16", "--contexts", "6", "--held-out-contexts", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder / "source", hidden_size=128, intermediate_size=128, initializer_range=0.1)
    assert main(["convert", str(folder / "source"), str(folder / "model")]) == 0
    return folder / "model"


def test_a_model_is_compressed_with_its_own_answers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "small"
    command = ["compress", str(model), str(target), "--method", "gptq", "--zero-points", "real", *SMALL]
    assert main(command) == 0
    told = capsys.readouterr().out
    report = json.loads((target / "report.json").read_text())
    assert f"Wrote {target}" in told and f"{report['quality']['perplexity_after']:.4f}" in told
    assert (report["text"], report["calibration_tokens"]) == ("the model's own answers", 96)
    assert report["quality"]["tokens"] == 3 * 15
    quantized = open_checkpoint(target).quantized.values()
    assert {matrix.kind for matrix in quantized} == {"int4", "int8"}
    assert {matrix.read().zeros.dtype for matrix in quantized if matrix.kind == "int4"} == {torch.float16}
    assert main(["info", str(target)]) == 0
    assert "stellarbyte compress, gptq, int4" in capsys.readouterr().out


def test_options_reach_the_settings(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(1000, 1400))))
    arguments = ["compress", str(model), str(tmp_path / "small"), "--method", "smoothquant", "--strength", "0.7"]
    arguments += ["--bits", "8", "--type", "float", "--keep-head", "--text", str(text), "--prune", "neurons=0.5"]
    assert main([*arguments, "--prune", "heads=0.5", *SMALL]) == 0
    report = json.loads((tmp_path / "small/report.json").read_text())
    assert (report["method"], report["kind"], report["head"]) == ("smoothquant", "fp8", "as stored")
    assert (report["text"], report["pruning"]) == ("text.txt", "heads=0.5, neurons=0.5")
    assert load_model(tmp_path / "small").config.num_attention_heads == 2
    assert "before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "There is nothing to do: give a method, or what to prune."),
        (["--method", "gptq", "--type", "float"], "--type float needs --bits 8"),
        (["--method", "gptq", "--strength", "0.5"], "strength is a setting of smoothquant"),
        (["--method", "round", "--strength", "0.5"], "strength is a setting of smoothquant"),
        (["--method", "gptq", "--bits", "8", "--zero-points", "real"], "zero points (real) are a setting of int4"),
        (["--method", "gptq", "--zero-points", "real", "--format", "compressed-tensors"], "have no real zero points"),
        (["--method", "gptq", "--zero-points", "real", "--prune", "weights=0.5"], "cannot keep the zeros"),
        (["--prune", "heads=2"], "--prune heads=2: give heads=SHARE, neurons=SHARE or weights=SHARE"),
        (["--prune", "layers=0.5"], "--prune layers=0.5: give heads=SHARE"),
        (["--method", "round", "--held-out", "text.txt"], "--held-out needs --text"),
        (["--method", "round", "--text", "absent.txt"], "absent.txt cannot be read: No such file or directory"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(model), str(tmp_path / "small"), *arguments, *SMALL]) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith("error: ") and told in output.err
    assert not (tmp_path / "small").exists()


def test_an_existing_folder_is_refused_at_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["compress", str(model), str(tmp_path), "--method", "round"]) == 1
    assert "is not empty; give a folder that does not exist yet." in capsys.readouterr().err
