"""DoRA, heads and embeddings of adapters on the GPU engine against the float64 oracle; on a CPU by Triton's
interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.lora.bank import EMBEDDING, HEAD, REPLACEABLE, LoraBank
from stellarbyte.ops.triton.lora import rows_of_one
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models import oracle
from tests.support.models.adapters import merged, random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens

FIRST, LENGTH = 9, 12  # the prompt is one step, then each token
SIZES = {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}


FIELDS = [
    pytest.param({"embedding_multiplier": 3.0, "logits_softcap": 4.0}, 0.25, id="factors"),
    pytest.param({}, 1.0, marks=pytest.mark.slow_without_gpu, id="plain"),
]


@pytest.mark.parametrize(("fields", "scale"), FIELDS)
def test_heads_and_embeddings_of_adapters_equal_the_oracles(
    fields: dict[str, float], scale: float, device: torch.device
) -> None:
    """In prompts and when decoding, each alone and both, and with one low-rank change."""
    model, tokens = make_model(num_hidden_layers=1, **fields), random_tokens(LENGTH)
    adapters = {
        name: random_adapter(model.config, seed, ranks=(2,), share=0.2, replaced=replaced)
        for seed, (name, replaced) in enumerate([("head", (HEAD,)), ("embedding", (EMBEDDING,)), ("both", REPLACEABLE)])
    }
    with own_stream(device):
        engine = GpuEngine(model, device, adapters=adapters, num_blocks=20, max_num_seqs=2)
        for name in adapters if scale == 1 else ["both"]:
            changed = merged(model, adapters[name], scale)
            expected = oracle.logprobs(changed.state_dict(), model.config, tokens)[FIRST - 1 :]
            found = engine.teacher_forced(tokens, FIRST, adapter=name, adapter_scale=scale)
            assert (found - expected).abs().max() <= 1e-4
            before = oracle.logprobs(model.state_dict(), model.config, tokens)[FIRST - 1 :]
            assert (found - before).abs().max() > 0.01, "the adapter changes too little to be seen"


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow_without_gpu), 0.25])
def test_logprobs_equal_the_oracles_on_changed_weights(scale: float, device: torch.device) -> None:
    """In prompts and when decoding; the step of a plain adapter after it has no change of the product."""
    model, tokens = make_model(**SIZES), random_tokens(LENGTH)
    adapters = {
        name: random_adapter(model.config, seed, ranks=(1, 4), share=0.8, dora=dora)
        for seed, (name, dora) in enumerate([("dora", 1.0), ("some", 0.5), ("plain", 0.0)])
    }
    with own_stream(device):
        engine = GpuEngine(model, device, adapters=adapters, num_blocks=20, max_num_seqs=2)
        for name in adapters if scale == 1 else ["dora"]:
            changed = merged(model, adapters[name], scale)
            expected = oracle.logprobs(changed.state_dict(), model.config, tokens)[FIRST - 1 :]
            found = engine.teacher_forced(tokens, FIRST, adapter=name, adapter_scale=scale)
            assert (found - expected).abs().max() <= 1e-4


def test_a_head_for_many_rows_of_one_sequence_until_its_slot_is_filled_again(device: torch.device) -> None:
    model = make_model(num_hidden_layers=1, vocab_size=75).requires_grad_(False).to(device)
    bank = LoraBank(model.config, 1, 4, device=device)
    adapter = random_adapter(model.config, 1, ranks=(2,), replaced=(HEAD,))
    hidden_RC = torch.randn(70, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    base_RV = hidden_RC.double() @ model.lm_head.weight.double().T
    head = TritonModel(model, model.config, bank).head
    rows = rows_of_one(70, 1, 0.5, device)
    bank.fill(1, adapter.packed(model.config))
    expected_RV = base_RV + 0.5 * hidden_RC.double() @ adapter.replaced[HEAD].to(device).double().T
    torch.testing.assert_close(head(hidden_RC, adapters=rows).double(), expected_RV, atol=1e-5, rtol=1e-5)
    assert (expected_RV - base_RV).abs().max() > 0.1
    bank.fill(1, random_adapter(model.config, 2, ranks=(2,)).packed(model.config))
    torch.testing.assert_close(head(hidden_RC, adapters=rows).double(), base_RV, atol=1e-5, rtol=1e-5)


@pytest.mark.slow_without_gpu
def test_rows_of_one_batch_have_their_own_adapters(device: torch.device) -> None:
    model = make_model(**SIZES)
    adapters = {
        name: random_adapter(model.config, seed, ranks=(1, 4), dora=dora, replaced=replaced)
        for seed, (name, dora, replaced) in enumerate([("dora", 1.0, (HEAD,)), ("plain", 0.0, ())])
    }
    names = ["dora", None, "plain", "dora"]
    requests = [
        make_request(random_tokens(9, seed=i), 6, str(i), adapter=name, adapter_scale=0.5 if i == 3 else 1.0)
        for i, name in enumerate(names)
    ]
    with own_stream(device):
        found = GpuEngine(model, device, adapters=adapters, num_blocks=30, max_num_seqs=4).generate(requests)
    for request, name, tokens in zip(requests, names, found, strict=True):
        alone = model if name is None else merged(model, adapters[name], request.adapter_scale)
        plain = make_request(list(request.prompt_token_ids), 6)
        assert ModelEngine(alone).generate([plain]) == [tokens]
