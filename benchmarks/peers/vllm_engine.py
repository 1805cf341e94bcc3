"""benchmarks.gpu's workloads on vLLM's engine, without HTTP, for the same table. Needs vllm.

python -m benchmarks.peers.vllm_engine --engine 0.6b --folder TMP 0.6b/1 0.6b/64
"""

import argparse
import time
from pathlib import Path

import vllm
from vllm.lora.request import LoRARequest

from benchmarks.gpu.workloads import (
    ENGINES,
    MAX_MODEL_LEN,
    MAX_STEP_TOKENS,
    RANK,
    WORKS,
    Engine,
    Work,
    random_prompt,
    report,
    reporting_failure,
    shape_of,
    work_of,
    write_adapters,
    write_config,
)


def load(engine: Engine, folder: Path, *, is_tiny: bool) -> tuple[vllm.LLM, list[LoRARequest]]:
    """vLLM with random weights, and the LoRA requests of its adapters."""
    shape = shape_of(engine, is_tiny=is_tiny)
    paths = write_adapters(shape, folder / "adapters", engine.adapters)
    with_adapters = {"enable_lora": True, "max_loras": engine.adapters, "max_lora_rank": RANK} if paths else {}
    llm = vllm.LLM(
        model=str(write_config(shape, folder / "model", for_transformers=True)),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        tensor_parallel_size=engine.ranks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        **with_adapters,
    )
    return llm, [LoRARequest(path.name, number, str(path)) for number, path in enumerate(paths, 1)]


def run(llm: vllm.LLM, adapters: list[LoRARequest], work: Work, vocab_size: int, seed: int) -> tuple[int, float]:
    """Tokens generated and seconds taken."""
    lengths = work.lengths(seed=0)
    prompts = [
        {"prompt_token_ids": random_prompt(length, vocab_size, seed * 100_003 + number)}
        for number, (length, _) in enumerate(lengths)
    ]
    sampling = [
        vllm.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output, detokenize=False)
        for _, output in lengths
    ]
    used = [adapters[number % work.adapters] for number in range(len(lengths))] if work.adapters else None
    started_s = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=used)
    seconds = time.perf_counter() - started_s
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="+", choices=list(WORKS))
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--device", choices=["cuda", "cpu"], help="unused: vLLM's build decides")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", required=True, type=Path, help="an empty one, for config.json and adapters")
    options = parser.parse_args()
    engine = ENGINES[options.engine]
    started_s = time.perf_counter()
    with reporting_failure(options.works):
        llm, adapters = load(engine, options.folder, is_tiny=options.tiny)
    build_s = time.perf_counter() - started_s
    vocab_size = shape_of(engine, is_tiny=options.tiny).vocab_size
    for name in options.works:
        work = work_of(name, is_tiny=options.tiny)
        with reporting_failure([name]):
            _, cold_s = run(llm, adapters, work, vocab_size, seed=1)
            tokens, seconds = run(llm, adapters, work, vocab_size, seed=2)
        figures = {"tok_s": tokens / seconds, "tokens": tokens, "seconds": seconds}
        report(name, {"build_s": build_s, "cold_s": cold_s, **figures})


if __name__ == "__main__":
    main()
