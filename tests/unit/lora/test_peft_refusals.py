"""Files that are no adapter for this model: each is one sentence that names the field or module and no folder."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte.lora import Adapter, AdapterError, read_adapter
from stellarbyte.lora import peft_format as peft_format_module
from stellarbyte.lora.peft_config import MODULES_TO_SAVE, USE_DORA
from tests.support.models.bad_adapters import REFUSED, SHAPES, Q, config, tensors, write_adapter


def read(folder: Path, max_rank: int = 8) -> Adapter:
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    copies = {"lm_head.weight": (6, 4)}
    return read_adapter(*files, SHAPES, max_rank=max_rank, accepts={USE_DORA, MODULES_TO_SAVE}, copies=copies)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence_without_a_folder(tmp_path: Path, case: str) -> None:
    edit, said = REFUSED[case]
    write_adapter(tmp_path)
    read(tmp_path)
    edit(tmp_path)
    start = time.perf_counter()
    with pytest.raises(AdapterError, match=said) as refusal:
        read(tmp_path)
    assert time.perf_counter() - start < 5
    message = str(refusal.value)
    assert "/" not in message and "\n" not in message and len(message) < 700 and message.isascii()
    assert message.startswith(("adapter_config.json ", "adapter_model.safetensors ")) and message.endswith(".")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").mkdir()  # opening it would be another error
    with pytest.raises(
        AdapterError, match=r"^adapter_model\.bin is a pickle.*convert it to adapter_model\.safetensors"
    ):
        read_adapter(tmp_path / "adapter_config.json", tmp_path / "adapter_model.bin", SHAPES, max_rank=8)


@pytest.mark.parametrize("honest", [False, True])
def test_a_terabyte_is_refused_without_reading_it(tmp_path: Path, honest: bool) -> None:
    """Whether the header describes the size or not; a sparse file takes no room."""
    write_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if honest:
        entry = {"dtype": "F32", "shape": [2, 1 << 37], "data_offsets": [0, 1 << 40]}
        small = {"dtype": "F32", "shape": [6, 2], "data_offsets": [1 << 40, (1 << 40) + 48]}
        raw = json.dumps({f"{Q}.lora_A.weight": entry, f"{Q}.lora_B.weight": small}).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(file, 8 + len(raw) + (1 << 40) + 48)
    else:
        os.truncate(file, 1 << 40)
    start = time.perf_counter()
    with pytest.raises(AdapterError, match="have the shapes" if honest else "header describes"):
        read(tmp_path)
    assert time.perf_counter() - start < 1


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    large = torch.ones(2, 1 << 16)
    tensors({f"{Q}.lora_A.weight": large})(tmp_path)  # more than a buffer that was filled with the header
    monkeypatch.setitem(SHAPES, "model.layers.0.self_attn.q_proj", (6, 1 << 16))
    check = peft_format_module._check_modules

    def check_and_cut(*arguments: Any) -> None:
        check(*arguments)
        os.truncate(file, file.stat().st_size - 4)

    monkeypatch.setattr(peft_format_module, "_check_modules", check_and_cut)
    with pytest.raises(AdapterError, match="was truncated while being read"):
        read(tmp_path)


def test_large_finite_numbers_and_neutral_fields_are_accepted(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    largest = torch.finfo(torch.float32).max
    tensors({f"{Q}.lora_A.weight": torch.full((2, 4), largest)})(tmp_path)  # their sum is infinite
    config(
        **{"task_type": "CAUSAL_LM", "base_model_name_or_path": "/a/b", "peft_version": "0.1", "inference_mode": True},
        **{"init_lora_weights": "gaussian", "megatron_core": "megatron.core", "qalora_group_size": 16, "revision": "x"},
        **{"layers_to_transform": [0], "exclude_modules": ["k"], "loftq_config": {"a": 1}, "use_dora": False},
        **{"rank_pattern": None, "modules_to_save": None, "trainable_token_indices": [], "megatron_config": {}},
    )(tmp_path)
    a, _ = read(tmp_path).weights["model.layers.0.self_attn.q_proj"]
    assert a.max().item() == largest


def test_absent_fields_have_pefts_defaults(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    config(lora_alpha="absent", bias="absent")(tmp_path)
    assert read(tmp_path).scale_of("model.layers.0.self_attn.q_proj") == 4.0  # PEFT's lora_alpha is 8
