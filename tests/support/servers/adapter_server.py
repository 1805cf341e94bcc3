"""A server on a tiny model with adapters whose answers are known, for tests over HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.lora import load_adapter, merge_lora
from stellarbyte.lora.adapted_model import adapter_layers
from stellarbyte_server.engine.text import TextStream
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.models.adapters import write_adapter
from tests.support.models.hugging_face import tiny_llama

PROMPT = [40, 41, 42, 43, 44]
NUM_TOKENS = 12
_MIN_GAP = 1e-3  # between the two likeliest tokens: below, a batch's last bits may decide


@dataclass
class KnownModel:
    """A model folder, and what it answers to PROMPT greedily, alone and with adapters."""

    folder: Path
    model: ByteTransformer
    tokenizer: Tokenizer

    @classmethod
    def make(cls, parent: Path) -> "KnownModel":
        convert(tiny_llama(parent / "hf", head_dim=16, max_position_embeddings=512), parent / "tiny")
        tokenizer = Tokenizer.from_file(str(parent / "tiny" / "tokenizer.json"))
        return cls(parent / "tiny", load_model(parent / "tiny"), tokenizer)

    def add_adapter(self, folder: Path, seed: int, num_tokens: int = NUM_TOKENS, **fields: Any) -> list[str]:
        """Write an adapter and return its `answers`; of the seeds from `seed` on the first without near ties."""
        while True:
            write_adapter(folder, self.model, seed, **fields)
            merged = ByteTransformer(self.model.config).eval()
            merged.load_state_dict(self.model.state_dict())
            load_adapter(merged, folder)
            merge_lora(merged)
            answers = self.answers(merged, num_tokens)
            if answers is not None:
                return answers
            seed += 1_000_000

    def mix_answers(self, scales: Mapping[Path, float], num_tokens: int = NUM_TOKENS) -> list[str] | None:
        """The `answers` with what several adapter folders change in the weights added up, each times its scale."""
        total = ByteTransformer(self.model.config).eval()
        total.load_state_dict(self.model.state_dict())
        for folder, scale in scales.items():
            merged = ByteTransformer(self.model.config).eval()
            merged.load_state_dict(self.model.state_dict())
            merge_lora(load_adapter(merged, folder))
            for name, layer in adapter_layers(merged).items():
                own = self.model.get_submodule(name).weight.data
                total.get_submodule(name).weight.data += scale * (layer.base_layer.weight.data - own)
        return self.answers(total, num_tokens)

    def answers(self, model: ByteTransformer, num_tokens: int = NUM_TOKENS) -> list[str] | None:
        """The answer's text when it is cut after 0, 1, ... num_tokens tokens; None if the model nearly had a choice."""
        (tokens,) = ModelEngine(model, num_blocks=256).generate([make_request(PROMPT, num_tokens)])
        with torch.inference_mode():
            logits_TV = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
        best, second = logits_TV.topk(2).values.T
        if (best - second).min() < _MIN_GAP:
            return None
        return [self._text(tokens[:count]) for count in range(num_tokens + 1)]

    def _text(self, tokens: list[int]) -> str:
        stream = TextStream(self.tokenizer, ())
        return "".join(stream.push(token)[0] for token in tokens) + stream.flush()


def completion(model: str, num_tokens: int = NUM_TOKENS, **fields: object) -> dict[str, object]:
    """The body of a request whose answer is known."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return body | fields
