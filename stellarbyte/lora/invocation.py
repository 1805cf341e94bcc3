"""Where activated adapters (aLoRA, Greenewald et al. 2025, arXiv:2504.12397) act in the texts of a call.

As in PEFT: from the last occurrence of the invocation tokens on, these included; nowhere in a text without them. Tokens
that follow in a cache are computed as those before them. So the keys and values before the invocation are those of the
model without the adapter.
"""

from typing import Any

import torch
from torch import nn

# B texts, or rows of several, T tokens of each, S places where an invocation could start, D texts of a row

TOKENS = "_lora_tokens"  # the model's attribute
Invocation = tuple[int, ...]


def activated(
    token_ids_BT: torch.Tensor, invocation: Invocation, document_ids_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, T] whether each token has the adapter. With `document_ids` rows hold several texts, as runs of one number."""
    num_tokens, length = token_ids_BT.shape[1], len(invocation)
    if length > num_tokens:
        return torch.zeros_like(token_ids_BT, dtype=torch.bool)
    borders_BT = torch.zeros_like(token_ids_BT)
    if document_ids_BT is not None:
        borders_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    texts_BT = borders_BT.cumsum(1)
    num_places = num_tokens - length + 1
    is_start_BS = (token_ids_BT.unfold(1, length, 1) == token_ids_BT.new_tensor(invocation)).all(-1)
    is_start_BS &= texts_BT[:, :num_places] == texts_BT[:, length - 1 :]
    positions_T = torch.arange(num_tokens, device=token_ids_BT.device)
    starts_BS = torch.where(is_start_BS, positions_T[:num_places], -1)
    last_BD = torch.full_like(token_ids_BT, -1).scatter_reduce(1, texts_BT[:, :num_places], starts_BS, "amax")
    last_BT = last_BD.gather(1, texts_BT)
    return (last_BT >= 0) & (positions_T >= last_BT)


class ActivatedTokens:
    """The tokens of a model's current call, for its layers with activated adapters.

    A call with a cache goes on with the texts of the call before it.
    """

    def __init__(self) -> None:
        self._texts: tuple[torch.Tensor, torch.Tensor | None] | None = None  # token ids and document ids, both [B, T]
        self._masks: dict[Invocation, torch.Tensor] = {}  # [B, T]

    def begin(self, token_ids_BT: torch.Tensor | None, document_ids_BT: torch.Tensor | None, *, goes_on: bool) -> None:
        """Begin a call of the model; without token ids, its layers can have no activated adapter."""
        if token_ids_BT is None or not goes_on:
            self._texts, self._masks = None if token_ids_BT is None else (token_ids_BT, document_ids_BT), {}
            return
        before, self._texts = self._masks, None
        is_same = all(len(mask_BT) == len(token_ids_BT) for mask_BT in before.values())
        self._masks = {each: mask[:, -1:].expand_as(token_ids_BT) for each, mask in before.items()} if is_same else {}

    def of(self, invocation: Invocation) -> torch.Tensor:
        """[B, T] the tokens with an adapter.

        Raises:
            ValueError: the model got no token ids, or a cache that is not of its last call with this adapter.
        """
        if invocation not in self._masks:
            if self._texts is None:
                raise ValueError(
                    "an activated adapter needs input_ids, of whole texts or with the cache of the model's last call"
                )
            self._masks[invocation] = activated(self._texts[0], invocation, self._texts[1])
        return self._masks[invocation]


def tokens_of(model: nn.Module) -> ActivatedTokens:
    """Those of a model's calls, from now on."""
    found = getattr(model, TOKENS, None)
    if found is None:
        found = ActivatedTokens()
        setattr(model, TOKENS, found)
        model.register_forward_pre_hook(_begin_call, with_kwargs=True)
    assert isinstance(found, ActivatedTokens)
    return found


def _begin_call(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    tokens: ActivatedTokens = getattr(model, TOKENS)
    token_ids_BT = options.get("input_ids", arguments[0] if arguments else None)
    cache = next((given for name in ("past_key_values", "cache") if (given := options.get(name)) is not None), None)
    goes_on = cache is not None and cache.get_seq_length() > 0
    is_whole = options.get("memory") is None  # else earlier segments of the text are not here
    tokens.begin(token_ids_BT if is_whole else None, options.get("document_ids"), goes_on=goes_on)
