"""Ranks read their pieces of a checkpoint's files, quantized ones as well, and no other bytes of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte.checkpoint import safetensors_file
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint, read_parameter, read_parts
from stellarbyte.parallel.shares import RankShare
from tests.support.models.byte_transformer import EXPERTS, make_model
from tests.support.models.quantized import write_quantized

PLAIN: dict[str, Any] = {"attention_bias": True, "attention_output_bias": True, "moe_layers": [1], **EXPERTS}


@pytest.mark.parametrize("form", ["plain", "tied", "awq", "compressed-tensors W8A8", "awq, experts"])
def test_pieces_of_files_are_those_of_the_whole_weights(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if form in ("plain", "tied"):
        model = make_model(**PLAIN, tie_word_embeddings=form == "tied").bfloat16()
        model.save_pretrained(folder, max_shard_size="40KB")
    else:
        name, _, has_experts = form.partition(", ")
        options = {"experts": True, "moe_intermediate_size": 128, "head_dim": 32} if has_experts else {}
        convert(write_quantized(tmp_path, name, **options)[0], folder)
    checkpoint = open_checkpoint(folder)
    assert bool(checkpoint.quantized) == (form not in ("plain", "tied"))
    whole = load_language_model(folder, dtype=torch.float32).state_dict()
    num_compared = 0
    for rank in range(2):
        pieces = RankShare(config=checkpoint.config, rank=rank, ranks=2).pieces()
        read = dict(read_parts(checkpoint, {name: piece.index for name, piece in pieces.items()}, torch.float32))
        assert read.keys() == pieces.keys()
        for name, part in read.items():
            assert torch.equal(part, whole[name][pieces[name].index]), name
            assert part.is_contiguous()
            num_compared += part.shape != whole[name].shape
    assert num_compared > 20
    for name in read:
        torch.testing.assert_close(read_parameter(checkpoint, name).float(), whole[name], rtol=0, atol=0)


def test_tensors_that_are_cut_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    pieces = RankShare(config=checkpoint.config, rank=1, ranks=2).pieces()
    asked: dict[str, tuple[slice, ...]] = {}
    real = safetensors_file.safe_open

    class Watched:
        def __init__(self, *told: Any, **options: Any) -> None:
            self._file = real(*told, **options)

        def __enter__(self) -> "Watched":
            self._file.__enter__()
            return self

        def __exit__(self, *told: Any) -> Any:
            return self._file.__exit__(*told)

        def keys(self) -> Any:
            return self._file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            asked[name] = ()
            return self._file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            asked[name] = pieces[name].index
            return self._file.get_slice(name)

    monkeypatch.setattr(safetensors_file, "safe_open", Watched)
    dict(read_parts(checkpoint, {name: piece.index for name, piece in pieces.items()}, torch.float32))
    assert asked == {name: piece.index for name, piece in pieces.items()}
    assert sum(bool(index) for index in asked.values()) > 20
