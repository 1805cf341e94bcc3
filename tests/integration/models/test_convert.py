"""Converted models compute what their sources compute: ByteTransformer's logprobs against transformers' classes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from tests.support.models.families import tiny_family
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import (
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_olmoe,
    tiny_qwen2,
    tiny_qwen2_moe,
    tiny_qwen3,
    tiny_qwen3_moe,
)

LENGTH = 40  # several windows of 8
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

MODELS = {
    "llama": (tiny_llama, {}),
    "llama tied": (tiny_llama, {"tie_word_embeddings": True}),
    "llama wide heads": (tiny_llama, {"head_dim": 16}),
    "llama biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama linear": (tiny_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama llama3": (tiny_llama, {"rope_parameters": LLAMA3}),
    "llama yarn": (tiny_llama, {"rope_parameters": YARN}),
    "llama gelu": (tiny_llama, {"hidden_act": "gelu_pytorch_tanh"}),
    "llama with another's window": (tiny_llama, {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}),
    "mistral with another's layers": (tiny_mistral, {"layer_types": ["full_attention"] * 3}),
    "llama sharded": (tiny_llama, {"max_shard_size": "40KB"}),
    "mistral window": (tiny_mistral, {}),
    "mistral no window": (tiny_mistral, {"sliding_window": None}),
    "qwen2": (tiny_qwen2, {}),
    "qwen2 window in upper layers": (
        tiny_qwen2,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2 window not used": (tiny_qwen2, {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": (tiny_qwen3, {}),
    "qwen3 biases and window": (
        tiny_qwen3,
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "mixtral": (tiny_mixtral, {}),
    "mixtral window, sharded": (tiny_mixtral, {"sliding_window": 8, "max_shard_size": "40KB"}),
    "mixtral in stacks": (tiny_mixtral, {"save_original_format": False}),
    "qwen2 moe": (tiny_qwen2_moe, {}),
    "qwen2 moe renormalised, windows": (
        tiny_qwen2_moe,
        {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen2 moe in stacks": (tiny_qwen2_moe, {"save_original_format": False, "decoder_sparse_step": 1}),
    "qwen2 moe without biases": (tiny_qwen2_moe, {"qkv_bias": False}),
    "qwen3 moe": (tiny_qwen3_moe, {}),
    "qwen3 moe window, biases, not renormalised": (
        tiny_qwen3_moe,
        {"use_sliding_window": True, "sliding_window": 8, "attention_bias": True, "norm_topk_prob": False},
    ),
    "qwen3 moe dense": (tiny_qwen3_moe, {"mlp_only_layers": [0, 1, 2]}),
    "olmoe": (tiny_olmoe, {}),
    "olmoe renormalised, biases": (tiny_olmoe, {"norm_topk_prob": True, "attention_bias": True}),
}


GGUF_MODELS = {
    "llama": (tiny_llama, {}, "llama"),
    "llama tied, wide heads": (tiny_llama, {"tie_word_embeddings": True, "head_dim": 16}, "llama"),
    "llama biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}, "llama"),
    "qwen2": (tiny_qwen2, {}, "qwen2"),
    "qwen3": (tiny_qwen3, {}, "qwen3"),
    "mixtral": (tiny_mixtral, {}, "llama"),
    "qwen2 moe": (tiny_qwen2_moe, {"decoder_sparse_step": 1}, "qwen2moe"),
    "qwen3 moe, first layer dense": (tiny_qwen3_moe, {}, "qwen3moe"),
    "olmoe": (tiny_olmoe, {}, "olmoe"),
    "granite": (partial(tiny_family, name="granite"), {}, "granite"),
    "smollm3": (
        partial(tiny_family, name="smollm3"),
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]},
        "smollm3",
    ),
    "olmo2": (partial(tiny_family, name="olmo2"), {}, "olmo2"),
    "gpt-oss": (partial(tiny_family, name="gpt_oss"), {"swiglu_limit": 7.0}, "gpt-oss"),
}


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 290, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_agrees_with_its_source(name: str, tmp_path: Path):
    make, overrides = MODELS[name]
    source = make(tmp_path / "source", **overrides)
    target = convert(source, tmp_path / "target")
    expected = logprobs(AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval())
    assert expected.std() > 1  # a model that says something
    torch.testing.assert_close(logprobs(load_model(target)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_converted_gguf_agrees_with_its_source(name: str, tmp_path: Path):
    """Rows of q and k are permuted in llama files (biases too), and not in qwen ones."""
    make, overrides, architecture = GGUF_MODELS[name]
    source = make(tmp_path / "source", **overrides)
    target = convert(write_gguf(tmp_path / "x.gguf", source, architecture=architecture), tmp_path / "target")
    expected = logprobs(AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval())
    torch.testing.assert_close(logprobs(load_model(target)), expected, rtol=0, atol=1e-4)


def test_from_pretrained_reads_what_convert_writes(tmp_path: Path):
    target = convert(tiny_qwen3(tmp_path / "source"), tmp_path / "target", max_shard_bytes=50_000)
    assert len(open_checkpoint(target).files) > 2
    ours = AutoModelForCausalLM.from_pretrained(target, local_files_only=True).eval()
    assert type(ours).__name__ == "ByteTransformer"
    torch.testing.assert_close(logprobs(ours), logprobs(load_model(target)), rtol=0, atol=0)


def test_window_that_no_layer_has_is_not_kept(tmp_path: Path):
    """Qwen2 folders may name a window for layers above the last one."""
    overrides = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    target = convert(tiny_qwen2(tmp_path / "source", **overrides), tmp_path / "target")
    assert open_checkpoint(target).config.sliding_window is None


def test_legacy_rope_scaling_is_understood(tmp_path: Path):
    """config.json as it was written before transformers 5: rope_theta and rope_scaling at the top level."""
    source = tiny_llama(tmp_path / "source")
    file = source / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config["rope_theta"] = 20000.0
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    file.write_text(json.dumps(config))
    target = convert(source, tmp_path / "target")
    rope = open_checkpoint(target).config.rope_parameters
    assert rope is not None
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 20000.0, 4.0)
    expected = logprobs(AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval())
    torch.testing.assert_close(logprobs(load_model(target)), expected, rtol=0, atol=1e-4)


def test_tokenizer_and_template_are_carried_over(tmp_path: Path):
    source = tiny_llama(tmp_path / "source")
    target = convert(source, tmp_path / "target")
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": "Où est la gare ? 東京 🚉"}]
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    for text in ("the capital", "  two  spaces\n\n", "<|im_start|>user", "naïve 東京 🚉"):
        assert before(text)["input_ids"] == after(text)["input_ids"]
        assert after.decode(after(text)["input_ids"]) == text


def test_training_time_truncation_does_not_cut_prompts(tmp_path: Path):
    source = tiny_llama(tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(source / "tokenizer.json"))
    target = convert(source, tmp_path / "target")
    text = "a prompt of more than four tokens"
    copied = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert copied.decode(copied.encode(text).ids) == text
    assert len(copied.encode("a").ids) == 1


@pytest.mark.parametrize(
    "setting",
    ["{{ messages }}", [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]],
)
def test_template_in_tokenizer_config_becomes_a_file(setting: object, tmp_path: Path):
    """As folders had it before transformers 4.43: a string, or several with names."""
    source = tiny_llama(tmp_path / "source", chat_template=None)
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": setting}))
    target = convert(source, tmp_path / "target")
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(target).chat_template == AutoTokenizer.from_pretrained(source).chat_template
