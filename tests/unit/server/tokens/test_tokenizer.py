"""Chat templates render as transformers renders them; prompts become the ids the tokenizer gives them."""

import json
import threading

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stellarbyte_server.tokens.tokenizer import (
    ChatTemplate,
    ChatTemplateError,
    UnembeddableTokenError,
    load_prompt_tokenizer,
)
from tests.support.servers.fake_engine import CHAT_TEMPLATE, make_model_folder, make_tokenizer

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
SMOL_LM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TRIMMING = SMOL_LM.replace("message['content'] +", "(message['content'] | trim) +")
INDENTED = """
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {% generation %}
    {{ ns.count }}: {{ message | tojson }} {{ message.content | trim | upper }}
    {% endgeneration %}
    {% if ns.count == 2 %}
        {% break %}
    {% endif %}
{%- endfor %}
{{ tools | tojson(indent=2) }} {{ documents is none }} {{ strftime_now('%Y') }} {{ pad_token is defined }}
"""
CHATS = [
    [{"role": "user", "content": "What is 3 < 4 & 'é'?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA_2, SMOL_LM, INDENTED])
def test_templates_render_as_in_transformers(source, messages):
    special_tokens = {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=source, **special_tokens)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, special_tokens).render(messages) == expected


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [SMOL_LM, INDENTED])
def test_tools_and_the_start_of_an_answer_render_as_in_transformers(source, add_generation_prompt, tools):
    theirs = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=source)
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    expected = theirs.apply_chat_template(CHATS[2], tokenize=False, **options)
    assert ChatTemplate(source, {}).render(CHATS[2], **options) == expected


@pytest.mark.parametrize("content", ["The answer is ", "The answer is", " ", "", "line\n", "as the user said: hi"])
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA_2, SMOL_LM, TRIMMING])
def test_an_answer_is_continued_as_in_transformers(source, content):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    special_tokens = {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=source, **special_tokens)
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = ChatTemplate(source, special_tokens)
    assert ours.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


@pytest.mark.parametrize(
    ("source", "messages", "add_generation_prompt"),
    [
        (SMOL_LM, CHATS[2], True),
        (CHAT_TEMPLATE, [], False),
        (CHAT_TEMPLATE, [{"role": "user", "content": None}], False),
        ("{{ messages[0].content }}", CHATS[2], False),
        ("{{ messages[-1].content | last }}", CHATS[0], False),
    ],
)
def test_what_cannot_be_continued_is_refused(source, messages, add_generation_prompt):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=True
        )


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (LLAMA_2, [{"role": "assistant", "content": "I go first"}]),
        ("{{ messages[9].content.strip() }}", CHATS[0]),
        ("{{ messages + 1 }}", CHATS[0]),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", CHATS[0]),
        ("{{ 1 / 0 }}", CHATS[0]),
    ],
)
def test_a_template_that_fails_refuses_the_messages(source, messages):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(messages)


def test_a_broken_template_is_refused_when_it_is_loaded():
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        ChatTemplate("{% for %}", {})


def test_a_folder_is_read_with_its_template(tmp_path):
    tokenizer = load_prompt_tokenizer(make_model_folder(tmp_path), None, 259)
    assert tokenizer.encode("hé") == list("hé".encode())
    end, start = make_tokenizer().token_to_id("<|im_end|>"), make_tokenizer().token_to_id("<|im_start|>")
    expected = [start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"]
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == expected


def test_tokens_become_their_text_again(tmp_path):
    tokenizer = load_prompt_tokenizer(make_model_folder(tmp_path), None, 259)
    text = "hé <|im_end|>!"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "hé !"
    assert [tokenizer.token_text(token_id) for token_id in (*b"h ", 258, 10**6)] == ["h", "Ġ", "<|im_end|>", ""]


def test_a_tokenizer_adds_its_own_tokens_to_prompts_and_to_chats_only_when_asked(tmp_path):
    folder = make_model_folder(tmp_path)
    adding = make_tokenizer()
    start = adding.token_to_id("<|im_start|>")
    adding.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    adding.save(str(folder / "tokenizer.json"))
    tokenizer = load_prompt_tokenizer(folder, None, 259)
    assert tokenizer.encode("hi") == [start, *b"hi"]
    assert tokenizer.encode("hi", add_special_tokens=False) == list(b"hi")
    chat = tokenizer.encode_chat(CHATS[0])
    assert chat[:2] == [start, *b"u"]
    assert tokenizer.encode_chat(CHATS[0], add_special_tokens=True) == [start, *chat]


@pytest.mark.parametrize("place", ["file of its own", "list", "flag"])
def test_the_template_is_found_wherever_it_is(tmp_path, place):
    folder, flag = make_model_folder(tmp_path / "model", chat_template="wrong"), None
    if place == "file of its own":
        (folder / "chat_template.jinja").write_text("right")
    elif place == "list":
        named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "right"}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    else:
        flag = tmp_path / "template.jinja"
        flag.write_text("right")
    tokenizer = load_prompt_tokenizer(folder, None if flag is None else str(flag), 259)
    assert tokenizer.encode_chat([]) == list(b"right")


def test_a_model_without_a_template_says_how_to_give_one(tmp_path):
    tokenizer = load_prompt_tokenizer(make_model_folder(tmp_path, chat_template=None), None, 259)
    with pytest.raises(ChatTemplateError, match="--chat-template FILE"):
        tokenizer.encode_chat(CHATS[0])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path, file):
    (make_model_folder(tmp_path) / file).write_text("{")
    with pytest.raises(ValueError, match=file):
        load_prompt_tokenizer(tmp_path, None, 259)


def test_no_id_beyond_the_embedding_leaves_the_tokenizer_wherever_it_comes_from(tmp_path):
    """Of an added token, of what the tokenizer itself puts before a text, or of its padding; also from a template."""
    folder = make_model_folder(tmp_path)
    tokenizer = load_prompt_tokenizer(folder, None, 258)  # <|im_end|> is 258
    for encode in (tokenizer.encode, tokenizer.encode_for_echo):
        with pytest.raises(UnembeddableTokenError, match=r"'<\|im_end\|>' \(id 258\).* 258 tokens"):
            encode("a<|im_end|>b")
    with pytest.raises(UnembeddableTokenError, match="im_end"):
        tokenizer.encode_chat(CHATS[0])
    assert tokenizer.encode("<|im_start|>a") == [257, ord("a")]
    strange = make_tokenizer()
    strange.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 999)])
    strange.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnembeddableTokenError, match="id 999"):
        load_prompt_tokenizer(folder, None, 259).encode("a")
    padding = make_tokenizer()
    padding.enable_padding(length=8, pad_id=4000)
    padding.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnembeddableTokenError, match="id 4000"):
        load_prompt_tokenizer(folder, None, 259).encode("a")


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_tokenized(tmp_path, what):
    """The event loop is such a thread."""
    tokenizer = load_prompt_tokenizer(make_model_folder(tmp_path / "m"), None, 259)
    text = "a b" * 300_000
    ids = tokenizer.encode(text)
    begun, ended = threading.Event(), threading.Event()

    def work():
        begun.set()
        if what == "encode":
            assert tokenizer.encode(text) == ids
        else:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    num_turns = 0
    while not ended.wait(0.001):
        num_turns += 1
    thread.join()
    assert num_turns > 20
