"""Turns a chat into the engine's requests and a plan of the answer."""

from collections.abc import Callable
from functools import partial

import msgspec
from fastapi import Request

from stellarbyte_server.api.answers.addressed_calls import AddressedCallParser
from stellarbyte_server.api.answers.answer import AnswerPlan
from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader
from stellarbyte_server.api.answers.ends import KeptRequest
from stellarbyte_server.api.answers.tool_parser import ToolCallParser
from stellarbyte_server.api.chat.grammar import chat_grammar, chat_structure, special_marks
from stellarbyte_server.api.chat.prompt import ChatInput, chat_renderer, check_continuation, content_characters
from stellarbyte_server.api.chat.reasoning import reasoning_of, template_variables
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.generation import (
    MAX_TOKENS_AT_ONCE,
    Bounds,
    Prompt,
    check_body,
    check_characters,
    check_prompt,
    make_requests,
    off_loop,
    off_loop_if_long,
)
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structure import Grammar, Structure
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.protocol.request import Channels
from stellarbyte_server.tokens.tokenizer import ChatTemplateError, UnembeddableTokenError

DEFAULT_SLIDING_MAX_TOKENS = 4096
MAX_PREDICTED = 16_384  # tokens of a prediction, which the engine indexes within one step


async def plan_chat(http: Request, body: ChatBody, service: Service) -> AnswerPlan:
    """The engine's requests for a chat, and the form of the answer; ApiError."""
    plan, _ = await plan_rendered_chat(http, body, service)
    return plan


async def plan_rendered_chat(
    http: Request, body: ChatBody, service: Service
) -> tuple[AnswerPlan, Callable[[ChatInput], str]]:
    """The same, and what renders the prompt of this body, and of others with its tools; see `chat_renderer`."""
    asked, structure = body, chat_structure(body)
    _check(body, service, structure)
    bounds = Bounds.of(http, body, service)
    toolbox = _toolbox(body, service)
    if toolbox is not None and special_marks(toolbox, service):
        body = body.model_copy(update={"skip_special_tokens": False})  # the grammar allows no others than these marks
    grammar = await chat_grammar(http, service, structure, toolbox)
    variables = template_variables(body.chat_template_kwargs, body.reasoning_effort, service, toolbox)
    render = chat_renderer(service, toolbox, variables.values)
    token_ids = await _encode(http, body, service, render, bounds.context)
    reasoning = reasoning_of(body, token_ids, service)
    if isinstance(reasoning, Channels):
        may_comment = structure is None and not (toolbox is not None and toolbox.requires_call)
        reasoning = msgspec.structs.replace(reasoning, may_comment=may_comment)
        if body.continue_final_message:  # no call can come any more
            grammar = Grammar()
    prediction_token_ids = await _prediction(http, body, service)
    prompt = Prompt(token_ids=token_ids, max_tokens=_max_tokens(body, bounds, token_ids))
    alternatives = 0 if body.top_logprobs is None else body.top_logprobs
    logprobs = alternatives if body.logprobs else None
    form = ChoiceForm(
        kind="chat",
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        prompt_token_ids=token_ids if body.return_token_ids else None,
        with_tools=toolbox is not None and bool(toolbox.called),
        are_functions=toolbox is not None and toolbox.are_functions,
        shows_reasoning=body.include_reasoning is not False,
    )
    plan = AnswerPlan(
        kind="chat",
        model=body.model,
        requests=make_requests(
            body,
            service,
            [prompt],
            bounds,
            logprobs=logprobs,
            grammar=grammar.text,
            reasoning=reasoning,
            prediction_token_ids=prediction_token_ids,
        ),
        grammar_param=grammar.param,
        check=grammar.check,
        candidates=body.num_candidates,
        choices=body.num_choices,
        reader=partial(_reader, form, service, toolbox),
        stream=bool(body.stream),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        begins_with_text=toolbox is None or not toolbox.requires_call,
        ignored=variables.ignored if _drafts(body, service) else _with_prediction(body, variables.ignored),
        kept=KeptRequest.of(asked, service),
        receipt_of=asked if asked.receipt else None,
    )
    return plan, render


def _drafts(body: ChatBody, service: Service) -> bool:
    """Whether guesses of an answer have an effect."""
    return service.info.speculative != "off" and body.speculative is not False


def _with_prediction(body: ChatBody, ignored: tuple[str, ...]) -> tuple[str, ...]:
    return ignored if body.prediction is None else (*ignored, "prediction")


async def _prediction(http: Request, body: ChatBody, service: Service) -> tuple[int, ...]:
    """The tokens of the prediction; () if it has no effect. ApiError if it is too long."""
    if body.prediction is None or not _drafts(body, service):
        return ()
    text, param = body.prediction.content, "prediction.content"
    if len(text) <= MAX_PREDICTED * service.tokenizer.longest_token:
        encode = partial(service.tokenizer.encode, text, add_special_tokens=False)
        token_ids = await off_loop_if_long(http, service, encode, len(text))
        if len(token_ids) <= MAX_PREDICTED:
            return tuple(token_ids)
    raise bad_request(f"The field '{param}' has more than {MAX_PREDICTED} tokens.", param)


def _toolbox(body: ChatBody, service: Service) -> Toolbox | None:
    """The tools of a chat, in the current or deprecated form; ApiError if fields contradict each other, or the calls
    cannot be read."""
    toolbox = _given_toolbox(body, service.tokenizer.chat_template_source)
    if toolbox is None or not (toolbox.called and toolbox.format.in_channels):
        return toolbox
    param = "functions" if toolbox.are_functions else "tools"
    if service.channels is None:
        raise bad_request(
            f"The field '{param}' needs --reasoning-parser auto, and a tokenizer with the marks of channels, for this"
            " model, which writes calls in channels.",
            param,
        )
    if body.continue_final_message and toolbox.requires_call:
        raise bad_request(
            "'continue_final_message' cannot be combined with a required call: this model writes calls in messages of"
            " their own.",
            "continue_final_message",
        )
    return toolbox


def _given_toolbox(body: ChatBody, source: str | None) -> Toolbox | None:
    """ApiError if fields contradict each other. `source`: of the chat template."""
    if body.functions is None and body.function_call is None:
        return Toolbox.of(body.tools, body.tool_choice, body.parallel_tool_calls, source)
    older, newer = "functions" if body.function_call is None else "function_call", ("tools", "tool_choice")
    if body.tools or body.tool_choice is not None:
        raise bad_request(f"The field '{older}' cannot be combined with '{newer[0]}' or '{newer[1]}'.", older)
    return Toolbox.of_functions(body.functions or (), body.function_call, source)


def _check(body: ChatBody, service: Service, structure: Structure | None) -> None:
    """ApiError if fields contradict each other."""
    check_body(body, 1, service)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("'max_tokens' and 'max_completion_tokens' differ; give one of them.", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("The field 'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    check_continuation(body)
    if body.continue_final_message and structure is not None:
        raise bad_request(
            f"'continue_final_message' cannot be combined with '{structure.param}', which needs a whole answer.",
            "continue_final_message",
        )


async def _encode(
    http: Request, body: ChatBody, service: Service, render: Callable[[ChatInput], str], limit: int
) -> list[int]:
    """The chat as token ids; ApiError if the template refuses it or the model has no embedding for a token."""
    check_characters(content_characters(body), limit, service, "messages")

    def encode() -> list[int]:
        return service.tokenizer.encode(render(body), bool(body.add_special_tokens))

    try:
        return await off_loop(http, service, encode, record_of(http).body_bytes)
    except (ChatTemplateError, UnembeddableTokenError) as error:
        raise bad_request(str(error), "messages") from None


def _max_tokens(body: ChatBody, bounds: Bounds, token_ids: list[int]) -> int:
    """The maximum number of tokens of each answer; ApiError if the prompt leaves no room for one."""
    room = check_prompt(token_ids, bounds.context, "messages")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted is None:  # up to the end of the context, unless it slides
        wanted = bounds.default_tokens(DEFAULT_SLIDING_MAX_TOKENS if bounds.overflow == "slide" else room)
        wanted = min(wanted, MAX_TOKENS_AT_ONCE // (body.num_candidates * (1 + (body.top_logprobs or 0))))
    return min(wanted, room)


def _reader(form: ChoiceForm, service: Service, toolbox: Toolbox | None, _number: int) -> ChoiceReader:
    """A reader for the answer to one request."""
    parser: ToolCallParser | AddressedCallParser | None = None
    if toolbox is not None and toolbox.called and toolbox.format.in_channels:
        parser = AddressedCallParser(toolbox.by_name)
    elif toolbox is not None and toolbox.called:
        parser = ToolCallParser(toolbox.format, toolbox.by_name, required=toolbox.requires_call)
    return ChoiceReader(form, service.tokenizer.token_bytes, parser)
