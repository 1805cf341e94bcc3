"""The sampling fields of a request and the kinds of their values."""

# Written by `python -m scripts.sampling_fields` from the server's API.
SAMPLING_FIELDS: dict[str, str | tuple[str, ...]] = {
    "max_tokens": "integer",
    "temperature": "number",
    "top_p": "number",
    "top_k": "integer",
    "min_p": "number",
    "repetition_penalty": "number",
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "seed": "integer",
    "context_overflow": ("error", "slide"),
}
