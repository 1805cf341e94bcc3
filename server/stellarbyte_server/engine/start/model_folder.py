"""What the engine reads of a model's folder: config, weights, tokenizer, ends."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from stellarbyte.checkpoint.dummy import dummy_config, dummy_hash, dummy_language_model, dummy_weights
from stellarbyte.checkpoint.native import (
    load_language_model,
    load_quantized,
    open_checkpoint,
    read_parameter,
    read_parts,
    read_plain_parts,
)
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.checkpoint.quantized.origin import read_origin
from stellarbyte.checkpoint.vocabulary import mismatch
from stellarbyte.checkpoint.weights_hash import FileState, states_of, weights_hash
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.parallel.group import RankGroup
from stellarbyte.parallel.model import rank_language_model
from stellarbyte.parallel.shares import EMBEDDING, HEAD, RankShare
from stellarbyte_server.tokens.stand_in_tokenizer import make_stand_in_tokenizer

logger = logging.getLogger("server.engine")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A checkpoint or, with `is_dummy`, a config.json: then weights are random, and a tokenizer is made up if absent.

    Its methods raise CheckpointError where a checkpoint cannot be read.
    """

    path: Path
    config: ByteModelConfig
    is_dummy: bool
    weight_files: Mapping[Path, FileState]  # as they were when the folder was opened; none of a dummy

    def language_model(self, dtype: torch.dtype, device: torch.device) -> ByteLanguageModel:
        """Quantized matrices are dequantized."""
        if self.is_dummy:
            logger.warning("the weights are random (--load-format dummy): answers mean nothing")
            return dummy_language_model(self.config, dtype=dtype, device=device)
        return load_language_model(self.path, dtype=dtype, device=device)

    def kept_model(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[ByteLanguageModel, Mapping[str, QuantizedMatrix]]:
        """The model, without the matrices that the checkpoint keeps quantized, and those; a dummy has none."""
        if self.is_dummy:
            return self.language_model(dtype, device), {}
        return load_quantized(self.path, dtype=dtype, device=device)

    def rank_model(self, share: RankShare, group: RankGroup, dtype: torch.dtype) -> ByteLanguageModel:
        """The model of one rank, on the CPU; of the weights only its share is read. Quantized matrices are
        dequantized."""
        if self.is_dummy:
            return self.kept_rank_model(share, group, dtype, torch.device("cpu"))[0]
        indices = {name: piece.index for name, piece in share.pieces().items()}
        return _rank_model(share, group, read_parts(open_checkpoint(self.path), indices, dtype))

    def kept_rank_model(
        self, share: RankShare, group: RankGroup, dtype: torch.dtype, device: torch.device
    ) -> tuple[ByteLanguageModel, Mapping[str, QuantizedMatrix]]:
        """As `kept_model`, of one rank.

        Raises:
            UndividedError: the groups of a quantized matrix cannot be divided.
        """
        pieces = share.pieces()
        if self.is_dummy:
            drawn = dummy_weights(self.config, dtype=dtype, device=device)
            read = ((name, weight[pieces[name].index].clone()) for name, weight in drawn)
            return _rank_model(share, group, read), {}
        from stellarbyte.parallel.quantized import cut_matrix  # as the GPU kernels take the pieces

        checkpoint = open_checkpoint(self.path)
        indices = {name: piece.index for name, piece in pieces.items()}
        kept = {
            name: cut_matrix(name, stored.read(), indices[name], share.ranks)
            for name, stored in checkpoint.quantized.items()
        }
        read = ((name, part.to(device)) for name, part in read_plain_parts(checkpoint, indices, dtype))
        absent = ((name, torch.empty(part.shape, dtype=dtype, device="meta")) for name, part in kept.items())
        return _rank_model(share, group, chain(read, absent)), kept

    def weight(self, module: str) -> torch.Tensor:
        """The whole weight of a module, from the files; dequantized. For a checkpoint."""
        name = f"{module}.weight"
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        return read_parameter(open_checkpoint(self.path), name)

    def weights_hash(self) -> str:
        """SHA-256 over the weights, hexadecimal; "dummy-…" for random ones. CheckpointError if they have changed."""
        return dummy_hash(self.path) if self.is_dummy else weights_hash(self.weight_files)

    def tokenizer(self) -> Tokenizer:
        """The folder's; the log says which of its tokens the model cannot read."""
        file = self.path / "tokenizer.json"
        if self.is_dummy and not file.is_file():
            return make_stand_in_tokenizer(self.config.vocab_size)
        tokenizer = Tokenizer.from_file(str(file))
        if (message := mismatch(tokenizer, self.config.vocab_size)) is not None:
            logger.warning("%s", message)
        return tokenizer

    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: generation_config.json's, else the model config's.

        Those that the model cannot generate are left out, which the log says: logits have no place for them.
        """
        ids = self._named_eos_token_ids()
        if strange := sorted(token_id for token_id in ids if not 0 <= token_id < self.config.vocab_size):
            rows = self.config.vocab_size
            logger.warning("no answer can end with eos_token_id %s: the vocabulary has %d tokens", strange, rows)
        return ids - frozenset(strange)

    def _named_eos_token_ids(self) -> frozenset[int]:
        if (self.path / "generation_config.json").is_file():
            ids = GenerationConfig.from_pretrained(self.path, local_files_only=True).eos_token_id
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset(self.config.eos_token_ids)


def _rank_model(share: RankShare, group: RankGroup, read: Iterable[tuple[str, torch.Tensor]]) -> ByteLanguageModel:
    """Of the pieces of all parameters."""
    pieces = share.pieces()
    weights = {name: torch.zeros_like(weight) if pieces[name].is_zero else weight for name, weight in read}
    return rank_language_model(share, group, weights)


def open_model_folder(path: Path, *, is_dummy: bool) -> ModelFolder:
    """Check a folder as far as possible without reading weights.

    Raises:
        stellarbyte.checkpoint.errors.CheckpointError: it is absent, damaged or unsupported.
    """
    if is_dummy:
        return ModelFolder(path=path, config=dummy_config(path), is_dummy=True, weight_files={})
    checkpoint = open_checkpoint(path)
    if (origin := read_origin(path)) is not None:
        logger.info("the weights are from %s", "; ".join([origin.format, *origin.notes]))
    return ModelFolder(path=path, config=checkpoint.config, is_dummy=False, weight_files=states_of(checkpoint.files))
