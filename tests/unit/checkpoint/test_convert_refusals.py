"""Whatever goes wrong in a conversion is one sentence, and leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.demo import find_demo_gguf
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from tests.support.models.hugging_face import tiny_llama, tiny_mixtral, tiny_olmoe, tiny_qwen3_moe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("convert") / "source")


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return edit


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.gate_proj.weight_scale": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "another architecture": (
        edit_json("config.json", model_type="gemma3"),
        "model of type 'gemma3'; supported are llama",
    ),
    "no language model": (
        edit_json("config.json", architectures=["LlamaForSequenceClassification"]),
        "holds LlamaForSequenceClassification, not LlamaForCausalLM",
    ),
    "native": (edit_json("config.json", model_type="bytetransformer"), "is a ByteTransformer checkpoint already"),
    "quantized": (edit_json("config.json", quantization_config={"quant_method": "gptq"}), "quantized with 'gptq'"),
    "activation": (edit_json("config.json", hidden_act="relu"), "hidden_act 'relu' is not supported"),
    "rope": (
        edit_json("config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic' is not one of",
    ),
    "config of wrong type": (edit_json("config.json", hidden_size="wide"), "config.json cannot be converted"),
    "pickle": (only_pickle, "pytorch_model.bin is a pickle"),
    "cut": (cut_weights, "but its header describes"),
    "stray tensor": (add_tensor, "holds the tensor model.layers.0.mlp.gate_proj.weight_scale, which"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "has no tokenizer that can be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_source_is_refused_before_a_byte_is_written(name: str, whole: Path, tmp_path: Path):
    source = shutil.copytree(whole, tmp_path / "source")
    change, message = REFUSED[name]
    change(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out" / "target")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return edit


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")

    return edit


EXPERT = "model.layers.1.mlp.experts"
REFUSED_EXPERTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (without(f"{EXPERT}.2.up_proj.weight"), f"lacks the tensor {EXPERT}.2.up_proj.weight, which the config"),
    "too many": (
        replaced(f"{EXPERT}.8.up_proj.weight", torch.ones(24, 32)),
        f"holds the tensor {EXPERT}.8.up_proj.weight",
    ),
    "shape": (
        replaced(f"{EXPERT}.3.down_proj.weight", torch.ones(32, 8)),
        f"{EXPERT}.3.down_proj.weight as torch.float32",
    ),
    "type": (
        replaced(f"{EXPERT}.3.gate_proj.weight", torch.ones(24, 32).half()),
        f"{EXPERT}.3.gate_proj.weight as torch.float16 [24, 32], but {EXPERT}.0.gate_proj.weight as torch.float32",
    ),
    "size": (edit_json("config.json", moe_intermediate_size=16), "mlp.experts.gate_up_proj as [8, 48, 32]; the config"),
    "no number": (edit_json("config.json", num_experts_per_tok=9), "num_experts_per_tok (9) must be from 1 to num_exp"),
}


@pytest.mark.parametrize("name", REFUSED_EXPERTS)
def test_experts_that_do_not_fit_are_refused_by_name(name: str, tmp_path: Path):
    source = tiny_qwen3_moe(tmp_path / "source")
    change, message = REFUSED_EXPERTS[name]
    change(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "target")
    assert message in str(caught.value)


def test_what_changes_the_numbers_of_experts_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"clip_qkv 3\.0 is not supported"):
        convert(tiny_olmoe(tmp_path / "olmoe", clip_qkv=3.0), tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"router_jitter_noise 0\.1 is not supported"):
        convert(tiny_mixtral(tmp_path / "mixtral", router_jitter_noise=0.1), tmp_path / "target")


def test_the_source_s_balance_loss_is_kept(tmp_path: Path):
    source = tiny_mixtral(tmp_path / "a", output_router_logits=True, router_aux_loss_coef=0.03)
    assert open_checkpoint(convert(source, tmp_path / "b")).config.router_balance_coef == 0.03
    assert open_checkpoint(convert(tiny_mixtral(tmp_path / "c"), tmp_path / "d")).config.router_balance_coef == 0.0


def test_existing_targets_are_not_touched(whole: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, message in {"file": "is not a folder", "full": "is not empty"}.items():
        with pytest.raises(CheckpointError, match=message):
            convert(whole, tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    open_checkpoint(convert(whole, tmp_path / "empty"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("bug")])
def test_interrupted_conversion_leaves_nothing(error: BaseException, whole: Path, tmp_path: Path):
    def interrupt(written: int, total: int) -> None:
        assert any(tmp_path.iterdir())
        if written > total / 2:
            raise error

    with pytest.raises(type(error)):
        convert(whole, tmp_path / "target", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence_and_leaves_nothing(whole: Path, tmp_path: Path):
    def fill(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="target could not be written: No space left on device"):
        convert(whole, tmp_path / "target", progress=fill)
    assert list(tmp_path.iterdir()) == []


def test_missing_space_is_seen_before_writing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    with pytest.raises(CheckpointError, match=r"only 0\.00 GB are free"):
        convert(whole, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_signals_leave_nothing_behind(tmp_path: Path):
    """The real command on the demo's file, stopped in the middle of writing by Ctrl-C or by a supervisor."""
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        command = [
            sys.executable,
            "-m",
            "stellarbyte.cli.main",
            "convert",
            str(find_demo_gguf()),
            str(folder / "target"),
        ]
        # A suite that runs in the background of a shell ignores Ctrl-C, and so would what it starts.
        heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
        runs[number] = folder, process
    stopped = set()
    deadline = time.monotonic() + 60
    while len(stopped) < len(runs) and time.monotonic() < deadline:
        for number, (folder, process) in runs.items():
            if number not in stopped and any(folder.glob(".target*/model.safetensors")):
                process.send_signal(number)
                stopped.add(number)
        time.sleep(0.01)
    for number, (folder, process) in runs.items():
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert list(folder.iterdir()) == []


def test_bits_are_kept_in_every_dtype(tmp_path: Path):
    for dtype in (torch.bfloat16, torch.float16):
        source = tiny_llama(tmp_path / f"source-{dtype}", dtype=dtype)
        target = convert(source, tmp_path / f"target-{dtype}")
        before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype == dtype
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))


def test_head_that_is_not_tied_after_all_is_kept(tmp_path: Path):
    """transformers does not tie a head that is stored with other values, whatever the config says."""
    source = tiny_llama(tmp_path / "source")
    edit_json("config.json", tie_word_embeddings=True)(source)
    opened = open_checkpoint(convert(source, tmp_path / "target"))
    assert not opened.config.tie_word_embeddings
    assert "lm_head.weight" in opened.tensors


def test_generation_defaults_are_carried_over(whole: Path, tmp_path: Path):
    source = shutil.copytree(whole, tmp_path / "source")
    edit_json("generation_config.json", temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[2, 1])(source)
    target = convert(source, tmp_path / "target")
    written = json.loads((target / "generation_config.json").read_text())
    expected = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 1], "bos_token_id": 0}
    assert {name: written[name] for name in expected} == expected
    assert load_model(target).generation_config.eos_token_id == [2, 1]
