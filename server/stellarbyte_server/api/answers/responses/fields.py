"""Fields of a response that only depend on the request."""

from typing import Any

from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.bodies.responses.tools import ResponseTool, shown_choice
from stellarbyte_server.protocol.request import GenerationRequest


def response_fields(body: ResponsesBody, request: GenerationRequest) -> dict[str, Any]:
    """The request's fields, with the values that apply where the body has none."""
    sampling = request.sampling
    return {
        "background": False,
        "frequency_penalty": sampling.frequency_penalty,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": {} if body.metadata is None else body.metadata,
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": _format(body)},
        "tool_choice": shown_choice(body.tool_choice),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": 0 if body.top_logprobs is None else body.top_logprobs,
        "top_p": sampling.top_p,
        "truncation": "auto" if request.context_overflow == "slide" else "disabled",
        "user": body.user,
    }


def _format(body: ResponsesBody) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return wanted.model_dump(by_alias=True, exclude_none=True)


def _tool(tool: ResponseTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": True if tool.strict is None else tool.strict,
    }
