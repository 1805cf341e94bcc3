"""Memory: segments that read it equal one pass over the whole text, in every layer; the oracle is float64."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarbyte import ByteModelConfig, ByteTransformer, LoRAConfig, Memory, RelativeCache
from stellarbyte.lora import apply_lora_to_model
from tests.support.cases import each_value_once
from tests.support.models import oracle
from tests.support.models.byte_transformer import EXPERTS, W, make_config, make_model, random_tokens

LENGTH = 6 * W + 5
MODELS: dict[str, dict[str, Any]] = {
    "rope": {"use_xpos": False, "sliding_window": W},
    "xpos": {"sliding_window": W},
    "norms of queries and keys": {"use_xpos": False, "qk_norm": True, "attention_bias": True, "sliding_window": W},
    "one key head": {"sliding_window": W, "num_key_value_heads": 1},
    "sinks": {"sliding_window": W, "sink_tokens": 4},
    "sinks of the softmax": {"use_xpos": False, "sliding_window": W, "softmax_sink": True},
    "rope and sinks": {"use_xpos": False, "sliding_window": W, "sink_tokens": 3},
    "deepnorm": {"deepnorm": True, "sliding_window": W},
    "parallel": {"parallel_residual": True, "sliding_window": W, "layer_scale_init": 0.3},
    "experts": EXPERTS | {"use_xpos": False, "sliding_window": W, "qk_norm": True, "qk_norm_per_head": False},
    "norms before and after, caps, other rotations": {
        "branch_norms": "both",
        "zero_centered_norms": True,
        "embedding_multiplier": 3.0,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "sliding_window": W,
        "sink_tokens": 2,
        "layer_rotations": ["local", "global", "none"],
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "norms after": {"branch_norms": "after", "residual_multiplier": 0.7, "sliding_window": W},
}


def read_in_segments(model: ByteTransformer, rows: list[list[int]], memory: Memory, length: int) -> torch.Tensor:
    """Logits [B, T, V] of rows of equal length, one segment after the other."""
    tokens = torch.tensor(rows)
    return torch.cat([model(segment, memory=memory).logits for segment in tokens.split(length, dim=1)], dim=1)


def assert_is_one_pass(
    model: ByteTransformer, tokens: list[int], logits_TV: torch.Tensor, attend: oracle.Attend | None = None
) -> None:
    expected = oracle.logprobs(model.state_dict(), model.config, tokens, attend)
    assert (logits_TV.double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4


def assert_same_states(found_MC: torch.Tensor, expected_MC: torch.Tensor) -> None:
    """To 1e-5 of the largest: float32 has no more of states that are sums."""
    assert (found_MC.double() - expected_MC).abs().max() <= 1e-5 * expected_MC.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sizes"),
    each_value_once(list(MODELS), [(1, W - 1), (5, W - 1), (5, 2 * W), (W - 1, W), (3 * W, W - 1)]),
)
def test_segments_equal_one_pass_in_every_layer(name: str, sizes: tuple[int, int]) -> None:
    length, mem_len = sizes
    model = make_model(**MODELS[name])
    rows = [random_tokens(LENGTH), random_tokens(LENGTH, seed=1)]
    memory = Memory(model.config, mem_len)
    logits = read_in_segments(model, rows, memory, length)
    sinks = model.config.sink_tokens
    for row, tokens in enumerate(rows):
        assert_is_one_pass(model, tokens, logits[row])
        states = oracle.hidden_states(model.state_dict(), model.config, tokens)
        for layer in range(3):
            held = memory.get(layer)
            assert held is not None and held.shape == (2, sinks + mem_len, 48)
            assert_same_states(held[row], torch.cat((states[layer][:sinks], states[layer][-mem_len:])))


@torch.no_grad()
def test_long_segments_attend_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stellarbyte.model.dense_attention.XPOS_CHUNK", 7)
    test_segments_equal_one_pass_in_every_layer("sinks", (3 * W, W - 1))


@torch.no_grad()
def test_adapters_project_the_memory_too() -> None:
    expected = make_model(sliding_window=W)
    adapted = apply_lora_to_model(make_model(sliding_window=W), LoRAConfig(r=4, target_modules=["k_proj", "v_proj"]))
    for layer in range(3):
        for name in ("k_proj", "v_proj"):
            module = f"model.layers.{layer}.self_attn.{name}"
            wrapper = adapted.get_submodule(module)
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            b.normal_()
            expected.get_submodule(module).weight.add_(wrapper.scales["default"] * b @ a)
    tokens = random_tokens(LENGTH)
    logits = read_in_segments(adapted, [tokens], Memory(adapted.config, W), 9)
    assert_is_one_pass(expected, tokens, logits[0])


@torch.no_grad()
def test_positions_stay_small_in_a_stream_of_any_length() -> None:
    model = make_model(sliding_window=W, sink_tokens=4)
    memory = Memory(model.config, W)
    read_in_segments(model, [random_tokens(40 * W)], memory, 20)
    assert memory.num_seen == 40 * W
    assert memory.next_position == 4 + 2 * W


def attend_to_segments(starts: list[int]) -> oracle.Attend:
    """Attention in which the query at m sees the keys from starts[m] to m, in layers of any kind."""

    def attend(config: ByteModelConfig, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        m, n = torch.arange(len(q))[:, None], torch.arange(len(q))[None, :]
        visible = (n <= m) & (n >= torch.tensor(starts)[:, None])
        scores = oracle.pair_scores(config, layer, q, k, m - n).masked_fill(~visible, -math.inf)
        return torch.einsum("hmn,nhd->mhd", scores.softmax(dim=-1), v)

    return attend


def first_visible(num_tokens: int, length: int, mem_len: int, dropped_at_once: int) -> list[int]:
    """The oldest token that each one sees, from a memory that takes its rows one at a time."""
    starts, held = [], 0
    for segment in range(0, num_tokens, length):
        size = min(length, num_tokens - segment)
        starts += [segment - held] * size
        for _ in range(size):
            held += 1
            if held > mem_len:
                held -= dropped_at_once
    return starts


@torch.no_grad()
@pytest.mark.parametrize(
    ("length", "drops", "use_xpos"),
    each_value_once([3, 10, 16], [(1.0, 1), (0.5, 5), (0.25, 3), (0.9, 9), (0.01, 1)], [True, False]),
)
def test_without_a_window_a_segment_sees_the_whole_memory(
    length: int, drops: tuple[float, int], use_xpos: bool
) -> None:
    ratio, dropped_at_once = drops
    model = make_model(use_xpos=use_xpos)
    tokens, mem_len = random_tokens(53), 10
    logits = read_in_segments(model, [tokens], Memory(model.config, mem_len, ratio=ratio), length)
    attend = attend_to_segments(first_visible(len(tokens), length, mem_len, dropped_at_once))
    assert_is_one_pass(model, tokens, logits[0], attend)


@torch.no_grad()
def test_layers_with_and_without_a_window_share_a_memory() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = make_model(sliding_window=W, layer_types=kinds, sink_tokens=4)
    tokens = random_tokens(LENGTH)
    logits = read_in_segments(model, [tokens], Memory(model.config, LENGTH), 7)
    assert_is_one_pass(model, tokens, logits[0])


@torch.no_grad()
def test_a_ratio_drops_the_rounded_share_and_no_more() -> None:
    """0.07 · 100 is 7.000000000000001 in floating point."""
    memory = Memory(make_config(), 100, ratio=0.07)
    rows = torch.randn(1, 130, 48)
    for token in range(130):
        memory.update_all([rows[:, token : token + 1]] * 3)
        held = memory.get(2)
        assert held is not None
        assert torch.equal(held, rows[:, token + 1 - held.shape[1] : token + 1])
        assert held.shape[1] == (token + 1 if token < 100 else 94 + (token - 100) % 7)


def test_gradients_end_at_the_present_segment() -> None:
    model = make_model(sliding_window=W)
    leaves = [torch.randn(1, 8, 48, requires_grad=True) for _ in range(2)]
    memory = Memory(model.config, W)
    for leaf in leaves:
        loss = model(inputs_embeds=leaf, memory=memory).logits.square().mean()
    loss.backward()
    assert leaves[0].grad is None
    assert leaves[1].grad is not None and leaves[1].grad.abs().min() > 0
    assert not any(rows.requires_grad for layer in range(3) if (rows := memory.get(layer)) is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_its_graph_kept_the_gradients_are_those_of_one_pass(checkpointing: bool) -> None:
    """So keys and values of the memory train their projections, too."""
    tokens = torch.tensor([random_tokens(24)])
    gradients = []
    for in_segments in (False, True):
        model = make_model(sliding_window=W, sink_tokens=2, layer_scale_init=0.5).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        memory = Memory(model.config, W, detach=False)
        logits = read_in_segments(model, tokens.tolist(), memory, 8) if in_segments else model(tokens).logits
        logits[:, 16:].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_recomputed_layers_read_the_memory_as_it_was() -> None:
    """Gradient checkpointing runs a layer again in `backward`, when the memory holds the next segment's rows."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(sliding_window=W).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        memory = Memory(model.config, W)
        losses = [
            model(segment, labels=segment, memory=memory).loss
            for segment in torch.tensor([random_tokens(30)]).split(10, dim=1)
        ]
        sum(losses).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", ["rope", "sinks"])
def test_generate_goes_on_from_a_memory_and_extends_it(name: str, chunk: int | None) -> None:
    model = make_model(**MODELS[name])
    rows = [random_tokens(4 * W), random_tokens(4 * W, seed=1)]
    memory = Memory(model.config, 2 * W)
    with torch.no_grad():
        read_in_segments(model, [row[: 3 * W] for row in rows], memory, 9)
    prompts = torch.tensor(rows)[:, 3 * W :]
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    answers = model.generate(prompts, memory=memory, max_new_tokens=2 * W, do_sample=False, **options)[:, W:]
    for row, answer in zip(rows, answers.tolist(), strict=True):
        text = row.copy()
        for _ in range(2 * W):
            text.append(int(oracle.logprobs(model.state_dict(), model.config, text)[-1].argmax()))
        assert answer == text[len(row) :]
    assert memory.num_seen == 6 * W - 1  # the last token has not been read
    states = oracle.hidden_states(model.state_dict(), model.config, text[:-1])
    held = memory.get(2)
    assert held is not None
    assert_same_states(held[1, -2 * W :], states[2][-2 * W :])


@torch.no_grad()
def test_a_cache_goes_on_with_the_memory_that_it_began_with() -> None:
    model = make_model(sliding_window=W, sink_tokens=2)
    tokens = random_tokens(4 * W)
    memory = Memory(model.config, W)
    logits = [read_in_segments(model, [tokens[: 2 * W]], memory, 10)]
    cache = RelativeCache(model.config, memory=memory)
    for start in range(2 * W, 4 * W, 6):
        logits.append(model(torch.tensor([tokens[start : start + 6]]), past_key_values=cache).logits)
    assert_is_one_pass(model, tokens, torch.cat(logits, dim=1)[0])
    assert memory.num_seen == 4 * W
    cache.reset()
    more = random_tokens(5, seed=2)
    last = model(torch.tensor([more]), past_key_values=cache).logits
    assert_is_one_pass(model, tokens + more, torch.cat([*logits, last], dim=1)[0])


@torch.no_grad()
def test_a_saved_memory_goes_on_where_it_was(tmp_path: Path) -> None:
    model = make_model(sliding_window=W, sink_tokens=2)
    memory = Memory(model.config, W, ratio=0.25)
    read_in_segments(model, [random_tokens(3 * W), random_tokens(3 * W, seed=1)], memory, 10)
    memory.save(tmp_path / "memory.safetensors", model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["memory.safetensors"]
    loaded = Memory.load(tmp_path / "memory.safetensors", make_model(sliding_window=W, sink_tokens=2))
    assert repr(loaded) == repr(memory)
    segment = torch.tensor([random_tokens(7, seed=2)] * 2)
    for _ in range(2):
        assert torch.equal(model(segment, memory=loaded).logits, model(segment, memory=memory).logits)
    empty = Memory(model.config, W)
    empty.save(tmp_path / "empty.safetensors", model)
    assert Memory.load(tmp_path / "empty.safetensors", model).num_seen == 0


@torch.no_grad()
def test_a_memory_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_model(sliding_window=W)
    memory = Memory(model.config, W)
    read_in_segments(model, [random_tokens(W)], memory, 5)
    memory.save(file := tmp_path / "memory.safetensors", model)
    changed = make_model(sliding_window=W)
    changed.model.layers[2].mlp.up_proj.weight[7, 3] += 1e-3
    adapted = apply_lora_to_model(make_model(sliding_window=W), LoRAConfig(r=2, target_modules=["q_proj"]))
    for other in (changed, adapted, make_model(sliding_window=W + 1), make_model(sliding_window=W).bfloat16()):
        with pytest.raises(ValueError, match=r"memory\.safetensors was made by another model"):
            Memory.load(file, other)
    memory.save(file, adapted)
    assert Memory.load(file, adapted).num_seen == W
    for layer in adapted.model.layers:
        layer.self_attn.q_proj.active = ()
    with pytest.raises(ValueError, match="was made by another model"):
        Memory.load(file, adapted)


@torch.no_grad()
def test_a_memory_names_copied_modules_and_activations_of_adapters(tmp_path: Path) -> None:
    copied = apply_lora_to_model(make_model(), LoRAConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    memory = Memory(copied.config, W)
    read_in_segments(copied, [random_tokens(W)], memory, 5)
    memory.save(file := tmp_path / "memory.safetensors", copied)
    assert Memory.load(file, copied).num_seen == W
    configs = copied.model.layers[0].self_attn.q_proj.configs
    configs["default"] = dataclasses.replace(configs["default"], activation="silu")
    with pytest.raises(ValueError, match="was made by another model"):
        Memory.load(file, copied)


@torch.no_grad()
def test_files_that_are_no_memory_are_refused(tmp_path: Path) -> None:
    model = make_model(sliding_window=W)
    memory = Memory(model.config, W)
    read_in_segments(model, [random_tokens(W)], memory, 5)
    memory.save(file := tmp_path / "memory.safetensors", model)
    content = file.read_bytes()
    metadata_of_another = {"format": "pt"}
    save_file(load_file(file), tmp_path / "weights.safetensors", metadata_of_another)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a memory"):
        Memory.load(tmp_path / "weights.safetensors", model)
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"memory\.safetensors cannot be read"):
        Memory.load(file, model)
    with pytest.raises(ValueError, match="absent cannot be read"):
        Memory.load(tmp_path / "absent", model)
    file.write_bytes(content.replace(b'"num_seen":"12"', b'"num_seen":"11"'))
    with pytest.raises(ValueError, match=r"memory\.safetensors is corrupt: layers\.0 has the shape"):
        Memory.load(file, model)


@torch.no_grad()
def test_size_dtype_and_clearing() -> None:
    model = make_model(sliding_window=W)
    memory = Memory(model.config, W)
    assert memory.memory_size == 0 and memory.get(0) is None and memory.batch_size is None
    read_in_segments(model, [random_tokens(2 * W)] * 2, memory, 9)
    assert memory.memory_size == 3 * 2 * W * 48 * 4
    assert repr(memory) == (
        "Memory(layers=3, mem_len=12, ratio=1, detach=True, batch_size=2, rows=12, num_seen=24, bytes=13824)"
    )
    before = memory.get(1)
    assert memory.to("cpu", torch.bfloat16) is memory and memory.memory_size == 13824 / 2
    held = memory.get(1)
    assert before is not None and held is not None and torch.equal(held, before.bfloat16())
    segment = torch.tensor([random_tokens(6, seed=1)] * 2)
    logits = model(segment, memory=memory).logits
    assert logits.dtype == torch.float32 and memory.memory_size == 13824 / 2
    memory.clear()
    assert memory.num_seen == memory.memory_size == 0
    assert torch.equal(model(segment, memory=memory).logits, model(segment).logits)


@torch.no_grad()
def test_what_a_memory_cannot_do_is_told_in_a_sentence() -> None:
    model = make_model(sliding_window=W)
    config, tokens = model.config, torch.tensor([random_tokens(6)] * 2)
    for settings, message in (
        ({"mem_len": 0}, r"mem_len \(0\) must be at least 1"),
        ({"mem_len": 4, "ratio": 0}, r"ratio \(0\) must be greater than 0 and at most 1"),
        ({"mem_len": 4, "ratio": 1.5}, r"ratio \(1.5\) must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Memory(config, **settings)
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(ValueError, match="cannot hold states of a model with longrope"):
        Memory(make_config(rope_parameters=longrope | factors, use_xpos=False), 4)
    memory = Memory(config, W)
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 48\], expected \[batch, tokens, 48\]"):
        memory.update(0, torch.zeros(2, 48))
    with pytest.raises(ValueError, match="hiddens has 2 layers, but the memory has 3"):
        memory.update_all([torch.zeros(2, 1, 48)] * 2)
    padded = torch.ones(2, 6)
    padded[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask marks padding, which a memory cannot hold"):
        model(tokens, attention_mask=padded, memory=memory)
    for option in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be 1|needs use_cache=True"):
            model.generate(tokens, memory=memory, max_new_tokens=2, **option)
    assert memory.num_seen == 0
    cache = model(tokens, memory=memory, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the memory holds 2 sequences, but the input has 1"):
        model(tokens[:1], memory=memory)
    with pytest.raises(ValueError, match="hidden has 1 sequences, but the memory holds 2"):
        memory.update(0, torch.zeros(1, 1, 48))
    with pytest.raises(ValueError, match="must be given with a cache's first call; this cache has 6 tokens"):
        model(tokens, past_key_values=cache, memory=Memory(config, W))
    model(tokens, memory=memory)
    with pytest.raises(ValueError, match="the memory has changed since the cache's last call"):
        model(tokens, past_key_values=cache, memory=memory)
    memory.update(0, torch.zeros(2, 1, 48))
    with pytest.raises(ValueError, match=r"seen different numbers of tokens: \[13, 12, 12\]"):
        model(tokens, memory=memory)
