"""The library's forward, generate and forward_step against the float64 oracle."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stellarbyte import ByteConfig, ByteModelConfig, ByteTransformer
from stellarbyte.cache.relative import RelativeCache
from tests.support.cases import each_value_once
from tests.support.models import oracle
from tests.support.models.byte_transformer import (
    EXPERT_VARIANTS,
    VARIANTS,
    VOCABULARY,
    W,
    assert_same_model,
    make_config,
    make_model,
    random_tokens,
)

ALL_VARIANTS = VARIANTS | EXPERT_VARIANTS
NUM_NEW = W + 4  # tokens of an answer: with a prompt of three beyond the window
LENGTHS = [W - 1, W, W + 1, 2 * W, 4 * W + 3]
POSITIONS = {"xpos": {"use_xpos": True}, "rope": {"use_xpos": False}}


def assert_matches_oracle(model: ByteTransformer, tokens: list[int], logits_TV: torch.Tensor) -> None:
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    assert (logits_TV.double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("variant", "implementation"), each_value_once(list(ALL_VARIANTS), ["sdpa", "eager"]))
def test_forward_matches_oracle(variant: str, implementation: str) -> None:
    model = make_model(attn_implementation=implementation, **ALL_VARIANTS[variant])
    tokens = random_tokens(4 * W + 3)
    assert_matches_oracle(model, tokens, model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("positions", POSITIONS)
def test_window_and_sinks_match_oracle(positions: str, sinks: int, length: int) -> None:
    model = make_model(sliding_window=W, sink_tokens=sinks, **POSITIONS[positions])
    tokens = random_tokens(length)
    assert_matches_oracle(model, tokens, model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize(("variant", "chunk"), each_value_once(list(ALL_VARIANTS), [7, 1]))
def test_cached_forward_matches_oracle(variant: str, chunk: int) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    tokens = random_tokens(4 * W + 3)
    cache, logits = None, []
    for start in range(0, len(tokens), chunk):
        out = model(torch.tensor([tokens[start : start + chunk]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0])
    assert_matches_oracle(model, tokens, torch.cat(logits))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_forward_step_matches_oracle(variant: str) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    tokens, others = random_tokens(4 * W + 3), random_tokens(4 * W + 3, seed=1)
    past_k = past_v = None
    logits = []
    for pair in zip(tokens, others, strict=True):
        out, past_k, past_v = model.forward_step(torch.tensor(pair)[:, None], past_k, past_v)
        logits.append(out[:, 0])
    stacked = torch.stack(logits, dim=1)
    assert_matches_oracle(model, tokens, stacked[0])
    assert_matches_oracle(model, others, stacked[1])
    every_layer_has_a_window = all(model.config.windows)
    kept = W - 1 + model.config.sink_tokens if every_layer_has_a_window else len(tokens)
    assert past_k is not None and past_k.shape == (3, 2, 2, kept, 16)


def test_long_xpos_sequences_stay_finite_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """XPos factors of one base leave float32 long before this decay does: queries are given bases in chunks."""
    monkeypatch.setattr("stellarbyte.model.dense_attention.XPOS_CHUNK", 64)
    model = make_model(xpos_scale_base=2, max_position_embeddings=512)  # ζ^(-n/b) passes float32's maximum at n = 142
    tokens = random_tokens(300)
    assert_matches_oracle(model, tokens, model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("variant", ["qwen2", "xpos window sinks"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(variant: str, side: str) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    rows = [random_tokens(4 * W), random_tokens(2 * W + 1, seed=1), random_tokens(5, seed=2)]
    ids, mask = torch.zeros(3, 4 * W, dtype=torch.long), torch.zeros(3, 4 * W, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(4 * W - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        assert_matches_oracle(model, row, logits[i][mask[i].bool()])


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_generate_from_left_padded_prompts_equals_each_prompt_alone(variant: str) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    prompts = [random_tokens(2 * W), random_tokens(3, seed=1)]
    ids, mask = torch.zeros(2, 2 * W, dtype=torch.long), torch.zeros(2, 2 * W, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False)[:, 2 * W :]
    for i, prompt in enumerate(prompts):
        text = prompt.copy()
        for _ in range(NUM_NEW):
            text.append(int(oracle.logprobs(model.state_dict(), model.config, text)[-1].argmax()))
        assert together[i].tolist() == text[len(prompt) :]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_used_under_both_of_its_names(name: str) -> None:
    """transformers 5.24 renamed the argument; passed under a name forward did not know, the cache was ignored and
    `generate` went on from the last token alone."""
    model = make_model()
    tokens = random_tokens(20)
    first = model(torch.tensor([tokens[:15]]), use_cache=True)
    rest = model(torch.tensor([tokens[15:]]), **{name: first.past_key_values}).logits[0]
    assert_matches_oracle(model, tokens, torch.cat((first.logits[0], rest)))


def test_num_items_in_batch_divides_the_loss() -> None:
    model = make_model()
    tokens = torch.tensor([random_tokens(21)])
    mean = model(tokens, labels=tokens).loss
    assert torch.isclose(model(tokens, labels=tokens, num_items_in_batch=80).loss, mean * 20 / 80)


def test_beam_search_reorders_the_cache() -> None:
    """Cached beams must equal beams recomputed from scratch."""
    model = make_model(sliding_window=W, sink_tokens=2)
    prompt = torch.tensor([random_tokens(W)])
    options = {"max_new_tokens": 2 * W, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_loss_ignores_masked_labels() -> None:
    model = make_model()
    tokens = torch.tensor([random_tokens(20)])
    labels = tokens.clone()
    labels[:, :11] = -100
    expected = oracle.logprobs(model.state_dict(), model.config, tokens[0].tolist())[:-1]
    picked = expected.gather(1, tokens[0, 1:, None])[10:]
    assert abs(model(tokens, labels=labels).loss.item() + picked.mean().item()) < 1e-5


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_save_and_load_round_trip(variant: str, tmp_path) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([random_tokens(30)])
    for loaded in (ByteTransformer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is ByteTransformer
        assert_same_model(loaded, model, tokens)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def test_learnable_xpos_starts_at_the_papers_decay_trains_and_survives_loading(tmp_path) -> None:
    plain, learnable = make_model(), make_model(xpos_learnable_scale=True)
    tokens = torch.tensor([random_tokens(40)])
    assert torch.allclose(plain(tokens).logits, learnable(tokens).logits, atol=1e-5)
    learnable(tokens, labels=tokens).loss.backward()
    gradient = learnable.model.rotary.raw_decay.grad
    assert gradient is not None and gradient.abs().min() > 0
    with torch.no_grad():
        learnable.model.rotary.raw_decay.add_(0.5)
    learnable.save_pretrained(tmp_path)
    assert_same_model(ByteTransformer.from_pretrained(tmp_path), learnable, tokens)


def enable_gradient_checkpointing(model: ByteTransformer) -> None:
    """By its current name, or the one that older supported releases of transformers know."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tokens = torch.tensor([random_tokens(30)])
    gradients = []
    for checkpointing in (False, True):
        model = make_model(layer_scale_init=0.5).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_recomputes_layers_instead_of_keeping_them() -> None:
    kept = {}
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(torch.tensor([random_tokens(200)]))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_dropout_acts_in_training_only() -> None:
    tokens = torch.tensor([random_tokens(30)])
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout", "drop_path_rate"):
        model = make_model(**{name: 0.5})
        assert torch.equal(model(tokens).logits, make_model()(tokens).logits), name
        model.train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits), name


def test_drop_path_grows_with_depth_and_drops_whole_samples() -> None:
    model = make_model(drop_path_rate=0.4)
    paths = [layer.residual.drop_path for layer in model.model.layers]
    assert [path.rate for path in paths] == [0.0, 0.2, 0.4]
    paths[2].train()
    out = paths[2](torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert ((per_sample == 0).all(dim=1) | torch.isclose(per_sample, torch.tensor(1 / 0.6)).all(dim=1)).all()
    assert abs(out.mean().item() - 1) < 0.05


def test_deepnorm_starts_with_the_papers_gains() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(make_config(deepnorm=True, hidden_size=256, intermediate_size=512))
    layer = model.model.layers[1]
    beta = (8 * 3) ** -0.25
    assert abs(layer.self_attn.v_proj.weight.std().item() / 0.2 - beta) < 0.02
    assert abs(layer.mlp.down_proj.weight.std().item() / 0.2 - beta) < 0.02
    assert abs(layer.self_attn.q_proj.weight.std().item() / 0.2 - 1) < 0.02


def test_wrong_use_is_told_in_a_sentence() -> None:
    model = make_model()
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 2\], expected \[1, 3\]"):
        model(tokens, attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="both past_k and past_v"):
        model.forward_step(tokens[:, :1], torch.zeros(3, 1, 2, 1, 16), None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_keys'"):
        model(tokens, past_keys=None)
    with pytest.raises(ValueError, match="return_dict=False is not supported"):
        model(tokens, return_dict=False)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match="are not supported"):
            model(tokens, **{name: True})
    with pytest.raises(ValueError, match="only one of past_key_values and cache"):
        model(tokens, past_key_values=RelativeCache(model.config), cache=RelativeCache(model.config))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)


def test_the_readmes_library_example_runs(tmp_path) -> None:
    """The example of the project's first description, word for word but for the path."""
    from stellarbyte import ByteModelConfig, ByteTransformer, LoRAConfig
    from stellarbyte.lora import apply_lora_to_model

    config = ByteModelConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    model = ByteTransformer(config)
    outputs = model(torch.randint(0, 32000, (1, 512)))
    assert outputs.logits.shape == (1, 512, 32000)
    model.save_pretrained(tmp_path)
    model = ByteTransformer.from_pretrained(tmp_path)
    input_ids = torch.randint(0, 32000, (1, 90))
    assert model.generate(input_ids, max_length=100).shape == (1, 100)
    model = apply_lora_to_model(
        model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=16, lora_dropout=0.05)
    )
    out, new_k, new_v = model.forward_step(input_ids[:, :1], None, None)
    assert out.shape == (1, 1, 32000) and new_k.shape == new_v.shape == (12, 1, 12, 1, 64)


def test_byte_config_is_the_same_class() -> None:
    assert ByteConfig is ByteModelConfig and make_config().vocab_size == VOCABULARY
