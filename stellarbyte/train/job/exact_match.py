"""How many held-out answers a model gives token for token when it decodes greedily."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from stellarbyte.lora.invocation import TOKENS
from stellarbyte.model.loss import CHUNK_ELEMENTS, NO_LABEL, next_tokens
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.errors import TrainError


@torch.no_grad()
def exact_match(
    model: ByteTransformer,
    batches: Iterable[Mapping[str, torch.Tensor]],
    device: torch.device,
    *,
    autocast: AbstractContextManager[None] | None = None,
) -> float:
    """The share of rows in which each learned token is the most likely one after the tokens before it.

    A greedy answer is the expected one exactly if this holds for each of its tokens, its end included: by induction,
    every token is then chosen after the expected ones. So one forward pass answers for any length. Of a row with
    several answers, each is given the expected ones before it, and all must agree. Ties go to the lowest id.

    Raises:
        TrainError: no row has a token to predict.
    """
    was_training = model.training
    model.eval()
    num_rows = num_matches = 0
    with nullcontext() if autocast is None else autocast:
        for batch in batches:
            found = _matches(model, {name: tensor.to(device) for name, tensor in batch.items()})
            num_rows, num_matches = num_rows + len(found), num_matches + int(found.sum())
    model.train(was_training)
    if num_rows == 0:
        raise TrainError("The held-out data has no answer to compare; give more of it, or none.")
    return num_matches / num_rows


def _matches(model: ByteTransformer, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[rows with a learned token], bool. At most CHUNK_ELEMENTS logits are in memory at once."""
    document_ids = batch.get("document_ids")
    if (tokens := getattr(model, TOKENS, None)) is not None:  # as the model's forward does it for activated adapters
        tokens.begin(batch["input_ids"], document_ids, goes_on=False)
    targets_BT = next_tokens(batch["labels"], document_ids)
    embeddings = model.model.embed_tokens(batch["input_ids"])
    hidden_BTC, _ = model._hidden(embeddings, None, batch.get("position_ids"), document_ids, None, None, False)
    is_learned_BT = targets_BT != NO_LABEL
    chunks = hidden_BTC[is_learned_BT].split(max(1, CHUNK_ELEMENTS // model.config.vocab_size))
    is_right_BT = torch.ones_like(is_learned_BT)
    is_right_BT[is_learned_BT] = (
        torch.cat([model._logits(chunk).argmax(-1) for chunk in chunks]) == targets_BT[is_learned_BT]
    )
    return is_right_BT.all(dim=1)[is_learned_BT.any(dim=1)]
