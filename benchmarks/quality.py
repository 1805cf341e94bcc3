"""The loss of quality by --quantization and --kv-cache-dtype: perplexity of the demo model on a fixed text.

    python -m benchmarks.quality

The text, `quality_corpus.txt`, never changes, so that results of different dates compare: five pages of this
repository at commit fed8d3a. It is cut into contexts of 512 tokens; the perplexity is that of all tokens but the first
of each context.
"""

import argparse
import math
from pathlib import Path

import tokenizers
import torch

from benchmarks.support.record import write_result
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import ServedModel, TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize

CORPUS = Path(__file__).parent / "quality_corpus.txt"
CONTEXT = 512
BLOCK_SIZE = 16
REFERENCE = "torch float32"
ON_GPU = " on a GPU"  # the weights in a GPU's format, dequantized for the CPU
MANY_ROWS = ", many rows"  # the inputs of products in fp8, too
FP8_CACHE = "cache in fp8"


def whole_context(token_ids: list[int]) -> ForwardBatch:
    """One sequence in the cache's first blocks, logits after every token."""
    positions_T = torch.arange(len(token_ids))
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    blocks_M = torch.arange(num_blocks)
    return ForwardBatch(
        token_ids_T=torch.tensor(token_ids),
        positions_T=positions_T,
        slots_T=positions_T,
        offsets_T=positions_T % BLOCK_SIZE,
        query_starts=(0, len(token_ids)),
        block_tables_NM=blocks_M[None],
        block_bases_NM=blocks_M[None] * BLOCK_SIZE,
        num_blocks=(num_blocks,),
        num_sink_blocks=(0,),
        reach=len(token_ids) - 1,
        logits_rows=positions_T,
    )


@torch.inference_mode()
def perplexity(model: ServedModel, cache: PagedKVCache, contexts: list[list[int]]) -> float:
    """exp of the mean of -log p over all tokens but the first of each context."""
    total, count = 0.0, 0
    for context in contexts:
        logits_TV = model.logits(whole_context(context), cache)
        total += torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(context[1:]), reduction="sum").item()
        count += len(context) - 1
    return math.exp(total / count)


def with_gpu_weights(path: Path, quantization: str) -> ByteLanguageModel:
    """The model with all matrices but the embedding rounded to a GPU's format."""
    model = load_language_model(path, dtype=torch.float32, device=torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = quantize(Weight(matrix_NK=module.weight), "int8" if module is model.lm_head else quantization)
            module.weight = torch.nn.Parameter(dequantized(weight, torch.float32), requires_grad=False)
    return model


def narrow_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Rows of a product rounded as in `stellarbyte.ops.triton.fp8`."""
    scales = inputs[0].abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (inputs[0] / scales).to(torch.float8_e4m3fn).float() * scales


def served_model(name: str, model: ByteLanguageModel, config: ByteModelConfig, path: Path) -> ServedModel:
    if name in (REFERENCE, FP8_CACHE):
        return TorchModel(model, config)
    if ON_GPU in name:
        stored = with_gpu_weights(path, name.partition(ON_GPU)[0])
        if name.endswith(MANY_ROWS):
            for module in stored.model.modules():  # not the head
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(narrow_inputs)
        return TorchModel(stored, config)
    return CpuModel(model, config, quantization=name, num_threads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder or demo")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    path = resolve_model(options.model)
    config = open_checkpoint(path).config
    model = load_language_model(path, dtype=torch.float32, device=torch.device("cpu"))
    cache, fp8_cache = (
        PagedKVCache(config, CONTEXT // BLOCK_SIZE, BLOCK_SIZE, dtype, torch.device("cpu"))
        for dtype in (torch.float32, torch.float8_e4m3fn)
    )
    text = CORPUS.read_text(encoding="utf-8")
    token_ids = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    contexts = [token_ids[i : i + CONTEXT] for i in range(0, len(token_ids) - CONTEXT // 2, CONTEXT)]
    rows = []
    on_gpu = ("int8" + ON_GPU, "fp8" + ON_GPU, "fp8" + ON_GPU + MANY_ROWS)
    for name in (REFERENCE, "none", "int8", "int4", *on_gpu, FP8_CACHE):
        served = served_model(name, model, config, path)
        value = perplexity(served, fp8_cache if name == FP8_CACHE else cache, contexts)
        change = value / (rows[0]["perplexity"] if rows else value) - 1
        rows.append({"weights": name, "perplexity": round(value, 4), "change": round(change, 5)})
        print(f"{name:>24}  perplexity {value:.4f}  {change:+.2%}", flush=True)
    if not options.no_record:
        tokens = sum(len(context) - 1 for context in contexts)
        write_result("quality", {"model": options.model, "context": CONTEXT, "tokens": tokens, "runs": rows})


if __name__ == "__main__":
    main()
