"""Chat templates that show tools as those of known models do, with no more than it takes."""

_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}"
QWEN = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '{{ "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}{% endif %}'
    f"{{% for message in messages %}}{_TURN}"
    "{% for call in message.tool_calls %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% generation %}<|im_end|>{% endgeneration %}{% continue %}{% endfor %}"
)
QWEN_TAGS = (
    "{% for tool in tools or [] %}<function>{{ tool.function.name }} {{ tool.function.description }}</function>"
    "{% endfor %}"
    f"{{% for message in messages %}}{_TURN}"
    "{% for call in message.tool_calls %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{% for name, value in call.function.arguments | items %}{{ '<parameter=' + name + '>\n' }}"
    "{{ value if value is string else value | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}<|im_end|>{% endfor %}"
)
LLAMA_3 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    '{%- if tools is not none %}{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.' }}{% for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}{% endif %}"
    f"{{% for message in messages %}}{{% if not message.tool_calls %}}{_TURN}{{% else %}}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{% set call = message.tool_calls[0].function %}{"name": "{{ call.name }}", '
    '"parameters": {{ call.arguments | tojson }}}{% endif %}{% endfor %}'
)
_MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ message.tool_call_id }} {{ message.content }}[/TOOL_RESULTS]"
    "{% elif message.tool_calls %}CALLS{% else %}[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"
)
_NEW = (
    "{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}ID[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}"
)
MISTRAL_NEW = _MISTRAL.replace("CALLS{", _NEW.replace("ID", "") + "{")
MISTRAL_IDS = _MISTRAL.replace("CALLS{", _NEW.replace("ID", "[CALL_ID]{{ call.id }}") + "{")
MISTRAL_OLD = _MISTRAL.replace(
    "CALLS{",
    "[TOOL_CALLS] [{% for call in message.tool_calls %}{{ (call.function | tojson)[:-1] }}, "
    '"id": "{{ call.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]{',
)
# Of Gemma's kind: no role but the user's and the model's, in turns.
IN_TURNS = (
    "{% for message in messages %}"
    "{% if message.role == 'system' or (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the user and the assistant take turns') }}{% endif %}"
    f"{_TURN}<|im_end|>\n{{% endfor %}}"
)

# Like gpt-oss's: one call a message, with one thought before it; the thoughts of earlier answers are not shown.
HARMONY = (
    "{% if reasoning_effort is defined %}<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>{% endif %}"
    "{% if tools %}<|start|>developer<|message|>namespace functions {% for tool in tools %}"
    "{{ '// ' + tool.function.description + tool.function | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}"
    "{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    "{% if message.content and message.thinking %}{{ raise_exception('two thoughts') }}{% endif %}"
    "{% if message.content or message.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ message.thinking or message.content }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif message.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ message.content | tojson }}<|end|>"
    "{% elif message.role == 'assistant' %}"
    "{% if message.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ message.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ message.content }}"
    "{{ '<|end|>' if add_generation_prompt or not loop.last else '<|return|>' }}"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
