"""A tiny chat model whose tokens are bytes."""

from pathlib import Path

import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from tests.support.training.byte_tokenizer import BOS_ID, EOS_ID, PAD_ID, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_model(folder: Path) -> Path:
    """A checkpoint with a tokenizer, which serves and trains within moments."""
    tokenizer = byte_tokenizer(template=TEMPLATE, vocab_size=272)
    torch.manual_seed(5)
    model = ByteTransformer(
        ByteModelConfig(
            vocab_size=272,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,  # of 8 channels: plain torch serves them, without kernels to compile
            intermediate_size=96,
            max_position_embeddings=512,
            use_xpos=False,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
