"""Conversations (a list of messages with role and content) as the text that the model's chat template makes of them."""

from __future__ import annotations

from typing import Any

from attnprune.errors import InputError, first_line


class Conversation(str):
    """Text that a chat template wrote. It ends as the template ends it: no end-of-text token is put after it."""

    __slots__ = ()


def render(messages: Any, tokenizer: Any) -> Conversation:
    """A conversation in the words of the tokenizer's chat template; "" if no message says anything.

    Raises:
        InputError: not a list of messages, no chat template, or one that refuses this conversation.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise InputError("neither text nor chat messages (a list of role and content)")
    if not any(_says(message) for message in messages):
        return Conversation()
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat messages, but this model has no chat template", hint="give text, or a chat model")
    # A table has every key in every message; where a value is missing, the template must not see the key.
    given = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
    try:
        return Conversation(tokenizer.apply_chat_template(given, tokenize=False))
    except Exception as error:  # a template is the model's own program and may raise anything
        raise InputError(f"the model's chat template refuses this conversation: {first_line(error)}") from None


def _says(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))
