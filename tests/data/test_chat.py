"""Conversations: what the chat template makes of them, and those that it refuses."""

from __future__ import annotations

import json

import pytest

from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from tests.helpers.factory import refused
from tests.helpers.texts import byte_tokenizer, written

# Conversations

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls is defined %}TOOLS{% endif %}"
    "{% if m.role == 'judge' %}{{ raise_exception('no judges here\\nplease') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("field", [None, "messages", "turns"])
def test_messages_become_text_by_the_chat_template(source_of, field):
    tokenizer, name = chat_tokenizer(), field or "messages"
    rows = [CHAT, None, [], [{"role": "user", "content": " "}], CHAT[1:]]
    texts = documents(source_of(rows, name), *([field] if field else []), tokenizer=tokenizer)
    expected = [tokenizer.apply_chat_template(row, tokenize=False) for row in (CHAT, CHAT[1:])]
    assert list(texts) == expected
    assert "TOOLS" not in expected[0]
    assert (texts.empty, texts.conversations) == (3, 2)


def test_the_tokens_of_a_conversation_are_those_of_the_template(source_of):
    tokenizer = chat_tokenizer()
    one = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    texts = documents(source_of([CHAT] * 3, "messages"), tokenizer=tokenizer)
    assert pack(texts, tokenizer, len(one), 10**6, "name").input_ids.tolist() == [one] * 3


def test_keys_that_only_other_messages_have_do_not_reach_the_template(tmp_path):
    rows = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": "z"}]]
    file = written(tmp_path, ".parquet", rows, "messages")
    assert read_chat(file) == ["<s><user>x\nTOOLS<assistant>y\n"]


def read_chat(file, template=TEMPLATE):
    return list(documents(str(file), tokenizer=chat_tokenizer(template)))


def test_text_goes_before_messages(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": CHAT, "text": "plain"}) + "\n" + json.dumps({"messages": CHAT[1:2]}))
    assert read_chat(file) == ["plain", "<s><user>Hi\n"]


def test_conversations_that_cannot_be_written_are_refused(tmp_path):
    file = written(tmp_path, ".jsonl", [CHAT, [{"role": "judge", "content": "x"}]], "messages")
    refused(lambda: read_chat(file), "line 2", "chat template refuses this conversation: no judges here")
    refused(lambda: read_chat(file, None), "line 1", "this model has no chat template")
    refused(lambda: read_chat(file, {"tool_use": "x"}), "line 1", "chat template refuses")
    for value in ([{"from": "human", "value": "x"}], [CHAT], {"role": "user"}, [{"role": None, "content": "x"}], 5):
        refused(
            lambda value=value: read_chat(written(tmp_path, ".jsonl", [value], "messages")),
            "line 1",
            "neither text nor",
        )
