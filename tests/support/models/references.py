"""What transformers' LlamaForCausalLM answers greedily with the demo model's weights, for tests to compare with."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stellarbyte.checkpoint.native import load_config, load_model
from stellarbyte.checkpoint.source import resolve_model

MODEL_NAME = "SmolLM2-135M-Instruct"  # under which the server offers it
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three primary colours are red,",
    "In 1969, the first humans",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is photosynthesis?\nA:",
    "SELECT name, age FROM users WHERE",
    "My favourite recipe for pancakes: first,",
    "The quick brown fox jumps over the lazy dog.",
    "To be, or not to be, that is",
    "<html>\n<head>\n<title>",
    "La capitale de l'Italie est",
    "A prime number is a natural number that",
    "import numpy as np\n\nx = np.",
    "The meeting is on Tuesday, so please",
    "Gravity is the force by which",
    "List of planets:\n1. Mercury\n2. Venus\n3.",
]


@dataclass
class Reference:
    prompt: str
    token_ids: list[int]
    gaps: list[float]  # between the two best logits, at each token


def transformers_model() -> LlamaForCausalLM:
    """transformers' own class with the demo model's weights."""
    path = resolve_model("demo")
    ours = load_config(path)
    fields = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("tie_word_embeddings", "hidden_act"),
    )
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(ours, name) for name in fields})).eval()
    llama.load_state_dict(load_model(path).state_dict())
    return llama


def transformers_answers(tokenizer: PreTrainedTokenizerFast, prompts: list[str], num_tokens: int) -> list[Reference]:
    """What transformers generates, the prompts in one left-padded batch."""
    llama = transformers_model()
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = llama.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    return [
        Reference(prompt, row[width:].tolist(), row_gaps)
        for prompt, row, row_gaps in zip(prompts, out.sequences, gaps, strict=True)
    ]
