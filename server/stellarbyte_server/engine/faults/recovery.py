"""Recovery from a failed step: recomputes its parts, and checks whether the engine works at all."""

import logging
from functools import partial

from stellarbyte_server.engine.faults.isolation import EngineBroken, Findings, isolate
from stellarbyte_server.engine.run.executor import DeviceLost, OutOfDeviceMemory
from stellarbyte_server.engine.run.runner import Runner, compute
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

logger = logging.getLogger("server.engine")


def compute_again(runner: Runner, chunks: list[Chunk], error: Exception) -> Findings:
    """Recompute a step that failed with `error`, in parts, without the chunks that make it fail.

    No step is in flight; chunks of ended sequences are omitted.

    Raises:
        DeviceLost
    """
    chunks = [chunk for chunk in chunks if not chunk.sequence.is_over]
    runner.recover([chunk.sequence for chunk in chunks])
    findings = isolate(chunks, partial(compute, runner))
    if isinstance(error, OutOfDeviceMemory):
        logger.warning("out of memory in a step of %d requests: computed it in parts", len(chunks))
    elif not findings.faults:
        logger.warning("a step failed, and succeeded when recomputed", exc_info=error)
    return findings


def require_sound(runner: Runner, scheduler: Scheduler) -> None:
    """Compute a probe step without requests. There must be free blocks.

    Raises:
        EngineBroken: it fails.
        DeviceLost
    """
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    request = GenerationRequest(request_id="", prompt_token_ids=(0,), sampling=sampling)
    with scheduler.outsider(request) as chunk:
        try:
            compute(runner, [chunk])
        except DeviceLost:
            raise
        except OutOfDeviceMemory:
            return  # another program may use the memory now
        except Exception as error:
            raise EngineBroken("even an empty probe step fails") from error
