"""Loss of quality by --quantization, --kv-cache-dtype and `stellarbyte compress`: the demo model on a fixed text.

    python -m benchmarks.quality --compressed gptq=small --compressed awq=other

The text, `quality_corpus.txt`, never changes, so that results of different dates compare: five pages of this
repository at commit fed8d3a. It is cut into contexts of 512 tokens. Perplexity, mean KL divergence from float32 and the
share of places with the same most likely token are those of all tokens but the first of each context. Of int8 and
int4, `kl_of_arithmetic` is the mean KL divergence of the CPU kernels from plain float32 products of the same weights.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch.nn import functional as F

from benchmarks.support.record import write_result
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import ServedModel, TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.compress.pipeline import REPORT_FILE
from stellarbyte.compress.quantization.grid import Grid
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


class Quality(NamedTuple):
    """Attributes: perplexity: exp of the mean of -log p; kl: the mean of KL(reference ‖ model) in nats; agreement: the
    share of places whose most likely token is the reference's. All over all tokens but the first of each context."""

    perplexity: float
    kl: float
    agreement: float


@torch.inference_mode()
def log_probs(model: ServedModel, cache: PagedKVCache, context: list[int]) -> torch.Tensor:
    """[T - 1, V] for the tokens after the first."""
    return model.logits(whole_context(context), cache)[:-1].log_softmax(dim=-1)


@torch.inference_mode()
def measure(
    model: ServedModel, cache: PagedKVCache, contexts: list[list[int]], references: list[torch.Tensor]
) -> Quality:
    loss = kl = agreement = 0.0
    for context, expected_TV in zip(contexts, references, strict=True):
        found_TV = log_probs(model, cache, context)
        loss += F.nll_loss(found_TV, torch.tensor(context[1:]), reduction="sum").item()
        kl += F.kl_div(found_TV, expected_TV, reduction="sum", log_target=True).item()
        agreement += (found_TV.argmax(dim=-1) == expected_TV.argmax(dim=-1)).sum().item()
    count = sum(len(context) - 1 for context in contexts)
    return Quality(perplexity=math.exp(loss / count), kl=kl / count, agreement=agreement / count)


def with_gpu_weights(path: Path, quantization: str) -> ByteLanguageModel:
    """The model with all matrices but the embedding rounded to a GPU's format."""
    model, int4 = float_model(path), Grid(kind="int4", zero_points="real")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            if quantization == "int4" and module is not model.lm_head:
                numbers_NK = int4.round(module.weight.data, int4.fit(module.weight.data))
            else:
                kind = "int8" if module is model.lm_head else quantization
                numbers_NK = dequantized(quantize(Weight(matrix_NK=module.weight), kind), torch.float32)
            module.weight = torch.nn.Parameter(numbers_NK, requires_grad=False)
    return model


def with_weights_of(served: CpuModel, path: Path) -> ByteLanguageModel:
    """The model with all matrices but the embedding as the kernels multiply them."""
    model = float_model(path)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(served.weight(name), requires_grad=False)
    return model


def float_model(path: Path) -> ByteLanguageModel:
    """Matrices that are stored with fewer bits are dequantized."""
    return load_language_model(path, dtype=torch.float32, device=torch.device("cpu"))


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


def how_compressed(folder: Path) -> dict[str, object]:
    report = json.loads((folder / REPORT_FILE).read_text())
    return {name: report[name] for name in ("method", "kind", "head", "text", "calibration_tokens")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder or demo")
    parser.add_argument(
        "--compressed",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also a folder that `stellarbyte compress` wrote from the model; can be repeated",
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    path = resolve_model(options.model)
    compressed = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.compressed)}
    config, model = open_checkpoint(path).config, float_model(path)
    cache, fp8_cache = (
        PagedKVCache(config, CONTEXT // BLOCK_SIZE, BLOCK_SIZE, dtype, torch.device("cpu"))
        for dtype in (torch.float32, torch.float8_e4m3fn)
    )
    text = CORPUS.read_text(encoding="utf-8")
    token_ids = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    contexts = [token_ids[i : i + CONTEXT] for i in range(0, len(token_ids) - CONTEXT // 2, CONTEXT)]
    references = [log_probs(TorchModel(model, config), cache, context) for context in contexts]
    rows: list[dict[str, object]] = []
    reference = 0.0
    on_gpu = ("int8" + ON_GPU, "int4" + ON_GPU, "fp8" + ON_GPU, "fp8" + ON_GPU + MANY_ROWS)
    for name in (REFERENCE, "none", "int8", "int4", *compressed, *on_gpu, FP8_CACHE):
        if name in compressed:
            folder = compressed[name]
            served: ServedModel = TorchModel(float_model(folder), open_checkpoint(folder).config)
        else:
            served = served_model(name, model, config, path)
        found = measure(served, fp8_cache if name == FP8_CACHE else cache, contexts, references)
        reference = reference or found.perplexity
        change = found.perplexity / reference - 1
        row = {"weights": name, "perplexity": round(found.perplexity, 4), "change": round(change, 5)}
        row |= {"kl": round(found.kl, 6), "agreement": round(found.agreement, 4)}
        if isinstance(served, CpuModel) and served.quantization != "none":
            plain = TorchModel(with_weights_of(served, path), config)
            expected = [log_probs(plain, cache, context) for context in contexts]
            row["kl_of_arithmetic"] = float(f"{measure(served, cache, contexts, expected).kl:.2g}")
        rows.append(row)
        print(
            f"{name:>24}  perplexity {found.perplexity:.4f}  {change:+.2%}  KL {found.kl:.5f}  "
            f"same token {found.agreement:.2%}",
            flush=True,
        )
    if not options.no_record:
        tokens = sum(len(context) - 1 for context in contexts)
        figures = {"model": options.model, "context": CONTEXT, "tokens": tokens, "runs": rows}
        figures["compressed"] = {name: how_compressed(folder) for name, folder in compressed.items()}
        write_result("quality", figures)


if __name__ == "__main__":
    main()
