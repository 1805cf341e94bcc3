"""The state of a slot's sequence in every executor."""

from array import array

import torch

from stellarbyte_server.engine.run.adjustments import SlotAdjustment
from stellarbyte_server.engine.run.outputs import Head, last_logits, pooled_hidden, prompt_logprobs
from stellarbyte_server.engine.run.step_plan import Rewind, SlotBegin, StepResult

# T tokens of a chunk, C hidden size


class ExecutorSlot:
    """A slot's state, replaced by each `SlotBegin`: a step in flight keeps the one from its start."""

    def __init__(self, begin: SlotBegin, device: torch.device) -> None:
        self.begin = begin
        self.sampling = begin.sampling
        self.tokens = array("I", begin.token_ids)
        self.adjustment = SlotAdjustment(begin, device)

    def rewind(self, rewind: Rewind) -> None:
        """Forget the tokens after the first `num_tokens`."""
        del self.tokens[rewind.num_tokens :]
        self.adjustment.rewind(rewind.num_tokens)

    def num_plain(self, start: int, length: int) -> int:
        """How many of the tokens start..start+length come before the first that has the adapter."""
        return max(0, min(length, self.begin.adapter_start - start))

    @property
    def wants_hidden(self) -> bool:
        """Whether the prompt's hidden states are needed for more than the next token."""
        return self.sampling.prompt_logprobs is not None or self.begin.pooling is not None

    def read_prompt(self, result: StepResult, row: int, model: Head, start: int, chunk_TC: torch.Tensor) -> None:
        """Add the requested results from a chunk's hidden states."""
        if self.sampling.prompt_logprobs is not None:
            following = self.tokens[start + 1 : min(start + len(chunk_TC) + 1, self.begin.num_prompt)].tolist()
            result.prompt_logprobs[row] = prompt_logprobs(model, chunk_TC, following, self.sampling.prompt_logprobs)
        if self.begin.pooling == "logits":
            result.pooled[row] = last_logits(model, chunk_TC)
        elif self.begin.pooling is not None:
            result.pooled[row] = pooled_hidden(self.begin.pooling, chunk_TC)
