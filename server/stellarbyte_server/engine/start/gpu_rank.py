"""The part of a rank of a model on its GPU."""

from collections.abc import Callable

import torch

from stellarbyte.backends.gpu.matrices import as_served
from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank
from stellarbyte.model.parts import PARTS
from stellarbyte.parallel.gpu_ranks import GpuRanks
from stellarbyte.parallel.group import RankGroup
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.start.model_folder import ModelFolder


def load_gpu_model(
    folder: ModelFolder, share: RankShare, group: RankGroup, bank: LoraBank, quantization: str
) -> TritonModel:
    """Read and pack the rank's part, in the bank's dtype and on its device.

    Raises:
        CheckpointError: a file cannot be read.
        ValueError: the kernels do not support the model, or the ranks cannot divide its quantized matrices.
    """
    model, kept = folder.kept_rank_model(share, group, bank.dtype, bank.numbers_SF.device)
    return TritonModel(
        model, share.own_config, bank, quantization=quantization, kept=kept, ranks=GpuRanks(share, group)
    )  # fmt: skip


def whole_weights(
    folder: ModelFolder, share: RankShare, model: TritonModel, quantization: str
) -> Callable[[str], torch.Tensor]:
    """As `TritonModel.weight`, of all ranks together: read from the files, and rounded as each rank rounds its part.

    Args:
        model: of any rank.
        quantization: as asked for.
    """
    shares = [RankShare(config=share.config, rank=rank, ranks=share.ranks) for rank in range(share.ranks)]
    parts = {part.name: part for part in PARTS}

    def weight(module: str) -> torch.Tensor:
        whole_NK = folder.weight(module)
        if (module == HEAD and model.keeps_head) or (module not in (HEAD, EMBEDDING) and model.keeps_layers):
            return whole_NK
        whole_NK = whole_NK.to(model.embedding_VC.dtype)
        if module == EMBEDDING:
            return whole_NK
        if module == HEAD:
            return as_served(module, whole_NK, "none" if quantization == "none" else "int8")
        layer, name = module.removeprefix("model.layers.").split(".", 1)
        if parts[name].cut != "in":
            return as_served(module, whole_NK, quantization)
        cuts = [one.piece(parts[name], int(layer)) for one in shares]
        return torch.cat([as_served(module, whole_NK[:, cut], quantization) for cut in cuts], dim=1)

    return weight
