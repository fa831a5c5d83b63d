"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json

import pytest

from rqc.runtime.chat import ChatTemplate, load_chat_template
from rqc.runtime.errors import EngineFormatError, InputError

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{% endif %}
"""
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FEATURES = """{% set ns = namespace(n=0) %}
{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% if ns.n > 2 %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}
  {% generation %}{{ m.role }}: {{ m.content | tojson }}{% endgeneration %}

{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}
{{ messages[0].get('reasoning_content', '-') }}{{ unk_token is defined }}
"""
TALK = [
    {"role": "user", "content": " Wer bist du? <b>&\"'</b> "},
    {"role": "assistant", "content": "Émile 🎉", "tool_calls": None},
    {"role": "user", "content": "And\nnow?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def peer():
    """transformers' rendering with the special tokens that these tests use."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    return lambda source, messages, **options: tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **options
    )


@pytest.mark.parametrize("source", [CHATML, STRICT, FEATURES], ids=["chatml", "strict", "features"])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], [{**TALK[0], "reasoning": "hm"}, *TALK[1:]]])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(peer, source, messages, tools, prompt):
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": False}
    assert template.render(messages, **options) == peer(source, messages, **options)


def test_the_date_is_todays():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(TALK).startswith("20")


def test_a_refusal_by_the_template_is_an_input_error():
    template = ChatTemplate(STRICT, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(InputError, match="roles must alternate"):
        template.render(TALK[1:])


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}"]
)
def test_the_sandbox_holds(source):
    with pytest.raises(InputError):
        ChatTemplate(source).render(TALK)


def test_a_template_that_is_no_template():
    with pytest.raises(InputError, match="cannot be read"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "messages",
    [[], "hi", {"role": "user"}, [1], [{"content": "x"}], [{"role": "user"}], [{"role": 1, "content": "x"}], None],
    ids=repr,
)
def test_malformed_conversations(messages):
    with pytest.raises(InputError):
        ChatTemplate(CHATML).render(messages)


def test_messages_are_plain_data():
    with pytest.raises(InputError, match="plain JSON"):
        ChatTemplate(CHATML).render([{"role": "user", "content": object()}])


def config(**entries) -> bytes:
    return json.dumps(entries).encode()


def test_where_the_template_is_found():
    named = [{"name": "default", "template": "d{{ bos_token }}"}, {"name": "tool_use", "template": "t"}]
    files = {"tokenizer_config.json": config(chat_template=named, bos_token={"content": "<s>"}, eos_token=None)}
    assert load_chat_template(files).render(TALK) == "d<s>"
    assert load_chat_template(files, with_tools=True).render(TALK, tools=TOOLS) == "t"
    assert load_chat_template({**files, "chat_template.jinja": b"own"}).render(TALK) == "own"
    assert load_chat_template({"tokenizer_config.json": config(chat_template="one")}).render(TALK) == "one"
    special = {"special_tokens_map.json": config(bos_token="<b>")}
    assert load_chat_template({**special, "chat_template.jinja": b"{{ bos_token }}"}).render(TALK) == "<b>"


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": config(bos_token="<s>", chat_template=None)}])
def test_a_model_without_template(files):
    with pytest.raises(InputError, match="no chat template") as caught:
        load_chat_template(files)
    assert "generate" in caught.value.hint


def test_a_damaged_configuration():
    with pytest.raises(EngineFormatError, match="tokenizer_config"):
        load_chat_template({"tokenizer_config.json": b"{"})


def test_chat_is_generate_on_the_rendered_prompt(engine):
    loaded = engine(files={"chat_template.jinja": CHATML.encode()})
    prompt = loaded.chat_text(TALK)
    assert prompt.rstrip().endswith("<|im_start|>assistant")
    assert loaded.chat_ids(TALK) == loaded.tokenize(prompt, special=False)
    answer = loaded.chat(TALK, max_new_tokens=12)
    assert answer == loaded.generate(loaded.chat_ids(TALK), max_new_tokens=12)
    assert answer == "".join(loaded.stream_chat(TALK, max_new_tokens=12))


def test_chat_without_template(engine):
    with pytest.raises(InputError, match="no chat template"):
        engine().chat(TALK)
