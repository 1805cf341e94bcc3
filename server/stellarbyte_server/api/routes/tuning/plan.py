"""What fine-tuning jobs of this server have in common, from its settings and its model."""

import os

from stellarbyte_server.api.service import Service
from stellarbyte_server.tuning.examples import Template
from stellarbyte_server.tuning.plan import Plan

MAX_RANK = 16  # of the adapters, unless the server takes only smaller ones


def plan_of(service: Service) -> Plan:
    """ValueError: the model has no chat template."""
    settings, info, tokenizer = service.settings, service.info, service.tokenizer
    source = tokenizer.chat_template_source
    if source is None:
        raise ValueError("--fine-tuning: the model has no chat template; give one with --chat-template")
    shown = Template(
        shows_tools="tools" in tokenizer.template_variables(has_tools=True), shows_calls="tool_calls" in source
    )
    return Plan(
        model=info.model_path,
        base=settings.model_name,
        template=settings.chat_template,
        rank=min(MAX_RANK, settings.engine.max_lora_rank),
        context=info.max_model_len,
        device=settings.fine_tuning,
        threads=max(1, _cores() // 2),
        memory=settings.fine_tuning_memory,
        shown=shown,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
