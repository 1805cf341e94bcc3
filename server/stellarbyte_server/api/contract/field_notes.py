"""What fields of requests mean and what holds without them: sentences for the document. Knows no rules of its own.

A key is a field's name, or MODEL.FIELD where that model's field means something else or is alone in having its name. A
test fails for a field of a request without a sentence, and for a sentence without a field. Answers describe most of
their fields themselves, in objects.py.
"""

from typing import Any

_UNUSED = "Has no effect."
_AS_MODEL_SAYS = "Default: as the model's generation_config.json says, else {}."

NOTES: dict[str, str] = {
    # What is asked, and of whom
    "model": "The served model's name; an adapter's name; or NAME@HASH, an adapter in one version.",
    "TokenizePromptBody.model": "As elsewhere; all have one tokenizer. Default: the served model.",
    "TokenizeChatBody.model": "As elsewhere; all have one tokenizer. Default: the served model.",
    "DetokenizeBody.model": "As elsewhere; all have one tokenizer. Default: the served model.",
    "prompt": "One prompt or a list of them, each a text or token ids.",
    "messages": "The chat so far, oldest message first.",
    "CompletionBody.echo": "Begin each answer with its prompt. With max_tokens 0 that is all. Default: false.",
    "ChatBody.add_generation_prompt": "Begin the assistant's message. Default: true, unless the last one is continued.",
    "ChatBody.continue_final_message": "Go on with the last message, which is the assistant's. Default: false.",
    "add_special_tokens": "Add what the tokenizer adds to a text, such as a first token. Default: true.",
    "ChatBody.add_special_tokens": "The same on top of the chat template, which writes its own. Default: false.",
    "adapter_scale": "How strongly the adapter acts, beside its own alpha / r. Default: 1.",
    # How tokens are chosen
    "temperature": f"Higher is more random; 0 takes the likeliest token. {_AS_MODEL_SAYS.format(1)}",
    "top_p": f"Keep the likeliest tokens that together reach this probability. {_AS_MODEL_SAYS.format(1)}",
    "top_k": f"Keep this many of the likeliest tokens; 0 and -1 keep all. {_AS_MODEL_SAYS.format('all')}",
    "min_p": f"Keep tokens that are at least this share as likely as the likeliest. {_AS_MODEL_SAYS.format(0)}",
    "presence_penalty": "Taken from the logit of a token that the answer has already. Default: 0.",
    "frequency_penalty": "Taken from it for every time the answer has it. Default: 0.",
    "repetition_penalty": f"Divides the logits of tokens in prompt and answer. {_AS_MODEL_SAYS.format(1)}",
    "logit_bias": "Token id to a number from -100 to 100 that is added to its logit; at most 1024 of them, and"
    " 16384 over all answers to a request.",
    "seed": "The same seed draws the same random numbers, whatever else the server does. Default: a random one.",
    # How many, and when an answer ends
    "n": "Answers to each prompt. Default: 1.",
    "CompletionBody.best_of": "Answers to generate; the n with the highest mean log-probability stay. Default: n.",
    "CompletionBody.max_tokens": "Most tokens of the answer; 0 needs echo. Default: 16.",
    "ChatBody.max_tokens": "Most tokens of the answer. Default: to the context's end; 4096 where the context slides.",
    "ChatBody.max_completion_tokens": "The same as max_tokens, under its newer name.",
    "min_tokens": "The answer does not end before it has so many tokens. Default: 0.",
    "stop": "Up to 4 texts that end the answer.",
    "stop_token_ids": "Tokens that end the answer.",
    "include_stop_str_in_output": "Keep what ended the answer in its text. Default: false.",
    "ignore_eos": "Do not end at the model's end-of-sequence tokens. Default: false.",
    "context_overflow": (
        "At the context's end: refuse (error), or let the oldest tokens go out of sight (slide). Default: as the"
        " server's --context-overflow."
    ),
    # What is shown
    "stream": "Send the answer as server-sent events while it is generated. Default: false.",
    "stream_options": "How to stream; only with stream.",
    "StreamOptions.include_usage": "Send the usage as a last event. Default: false.",
    "skip_special_tokens": "Leave special tokens out of the text. Default: true.",
    "return_token_ids": "Add token_ids, and prompt_token_ids, to the answer. Default: false.",
    "CompletionBody.logprobs": "Log-probabilities, with so many of the likeliest tokens. Default: none.",
    "ChatBody.logprobs": "Log-probabilities of the answer's tokens. Default: false.",
    "ChatBody.top_logprobs": "With so many of the likeliest tokens beside each. Default: 0.",
    # How it is scheduled and kept
    "priority": "Lower runs first; a level is worth 10 seconds of waiting. 0 to 100, or the key's bounds. Default: 0.",
    "cache_salt": "Requests of a key share the prefix cache only with those that have the same one. Default: none.",
    # For those who send them
    "user": _UNUSED,
    "metadata": _UNUSED,
    "store": _UNUSED,
    "service_tier": _UNUSED,
    "safety_identifier": _UNUSED,
    "prompt_cache_key": _UNUSED,
    # Structured output and tools
    "ChatBody.response_format": "What form the answer must have. Default: any text.",
    "ResponseFormat.type": "Any text, any JSON object, or what json_schema says.",
    "ResponseFormat.json_schema": "Exactly if the type is json_schema.",
    "JsonSchema.name": "A name for it; the model does not see it.",
    "JsonSchema.description": "For people; the model does not see it.",
    "JsonSchema.schema": "The JSON Schema of the answer. Default: any JSON.",
    "JsonSchema.strict": "An answer always follows its schema, whatever this says.",
    "tools": "Functions that the model may call.",
    "ChatBody.tool_choice": "Call none, as the model likes, at least one, or this one. Default: auto.",
    "ChatBody.parallel_tool_calls": "Whether one answer may have several calls. Default: true.",
    "FunctionTool.type": "The only kind there is.",
    "FunctionTool.function": "What can be called.",
    "Function.name": "What the model calls it by.",
    "Function.description": "What it does, for the model.",
    "Function.parameters": "The JSON Schema of its arguments. Default: it takes none.",
    "Function.strict": "Every call is held to the schema, whatever this says.",
    "NamedTool.type": "The only kind there is.",
    "NamedTool.function": "One of the tools.",
    "FunctionName.name": "The tool's name.",
    # Messages
    "Message.role": "Who says it.",
    "Message.content": "A text, or parts of text, which are joined by newlines. Only the assistant's may have none.",
    "Message.name": "Who it is by, where the chat template shows that.",
    "Message.tool_calls": "Calls that the assistant made.",
    "Message.tool_call_id": "Which call a tool's message answers.",
    "ToolCall.id": "As it was in the answer.",
    "ToolCall.type": "The only kind there is.",
    "ToolCall.function": "What was called.",
    "FunctionCall.name": "The tool's name.",
    "FunctionCall.arguments": "JSON, as text.",
    # /v1/responses
    "ResponsesBody.input": "A text of the user, or a list of messages.",
    "ResponsesBody.instructions": "Becomes the first message, by the system.",
    "ResponsesBody.max_output_tokens": (
        "Most tokens of the answer. Default: to the context's end; 4096 where the context slides."
    ),
    "ResponsesBody.text": "What form the answer must have. Default: any text.",
    "ResponsesBody.include": "What to add to the answer: its log-probabilities.",
    "ResponsesBody.top_logprobs": "With so many of the likeliest tokens beside each. Default: 0.",
    "ResponsesBody.truncation": (
        "At the context's end: let the oldest tokens go out of sight (auto), or refuse (disabled). Default: as the"
        " server's --context-overflow."
    ),
    "ResponsesBody.metadata": "Comes back with the response.",
    "ResponsesBody.previous_response_id": "Always refused: nothing is stored. Send the whole conversation.",
    "InputItem.type": "The only kind there is.",
    "InputItem.role": "Who says it.",
    "InputItem.content": "A text, or parts of text, which are joined by newlines.",
    "InputItem.id": "Of an answer that is sent back; unused.",
    "InputItem.status": "Of an answer that is sent back; unused.",
    "InputPart.type": "Any of them is a text.",
    "InputPart.text": "The text.",
    "InputPart.annotations": "Of an answer that is sent back; unused.",
    "InputPart.logprobs": "Of an answer that is sent back; unused.",
    "TextSettings.format": "What form the answer must have. Default: any text.",
    "TextFormat.type": "Any text, any JSON object, or what schema says.",
    "TextFormat.name": "A name for the schema; the model does not see it.",
    "TextFormat.description": "For people; the model does not see it.",
    "TextFormat.schema": "The JSON Schema of the answer.",
    "TextFormat.strict": "An answer always follows its schema, whatever this says.",
    # /v1/embeddings
    "EmbeddingsBody.input": "One text or a list of up to 2048, each a text or token ids.",
    "EmbeddingsBody.encoding_format": "Numbers, or float32, little-endian, in base64. Default: float.",
    "EmbeddingsBody.dimensions": "Refused unless it is the model's own.",
    "EmbeddingsBody.pooling": "The state after the last token, or the mean over all tokens. Default: last.",
    # /tokenize, /detokenize
    "TokenizePromptBody.prompt": "The text.",
    "TokenizePromptBody.messages": "Absent: a body has a prompt or messages.",
    "TokenizeChatBody.prompt": "Absent: a body has a prompt or messages.",
    "TokenizeChatBody.add_generation_prompt": "As for chats. Default: true, unless the last message is continued.",
    "TokenizeChatBody.continue_final_message": "As for chats. Default: false.",
    "TokenizeChatBody.add_special_tokens": "As for chats. Default: false.",
    "return_token_strs": "Also answer with each token's text. Default: false.",
    "DetokenizeBody.tokens": "Token ids.",
    # Adapters
    "LoadBody.lora_path": "A folder inside --adapter-dir, or the path of one of --lora-modules.",
    "LoadBody.load_inplace": "Replace an adapter of this name. Default: false, which refuses a name that is taken.",
    "lora_name": "The adapter's name.",
    "AdapterEntry.state": "draining: its name is gone or has a newer version, and its last requests end on it.",
    "AdapterEntry.error": "Why it could not be read.",
    "AdapterEntry.content_hash": "SHA-256 of its content, which NAME@HASH pins; null while it is unread.",
    "AdapterEntry.root": "Where it lies, inside --adapter-dir.",
    "AdapterEntry.rank": "The largest of its modules; null while it is unread.",
    "AdapterEntry.bytes": "In memory.",
    "AdapterEntry.refcount": "Requests that run or wait on it.",
    "AdapterEntry.requests": "Of all versions that the name had.",
    "AdapterEntry.tokens": "Generated by all versions that the name had.",
}


def add_notes(models: dict[str, dict[str, Any]], bodies: set[str]) -> None:
    """Describe the fields of all models of a document; `bodies` are those that are a whole request."""
    for name, model in models.items():
        for field, schema in model.get("properties", {}).items():
            note = NOTES.get(f"{name}.{field}")
            if note is None and name in bodies:
                note = NOTES.get(field)
            if note is not None:
                schema["description"] = note
