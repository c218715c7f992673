"""Calls in another dialect are read as chats: errors must still name the fields that the client sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from scheduler.contract.errors import GlowplugError


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Within, an error about a chat field becomes one about the field that it was made of.

    ``names`` maps the beginnings of chat fields' names to those of the dialect; the longest one that fits counts.
    """
    try:
        yield
    except GlowplugError as error:
        info = error.info
        fitting = [name for name in names if info.param is not None and info.param.startswith(name)]
        if info.param is None or not fitting:
            raise
        chat_name = max(fitting, key=len)
        param = names[chat_name] + info.param[len(chat_name) :]
        message = info.message
        if message.startswith(info.param):
            message = param + message[len(info.param) :]
        raise GlowplugError(info.code, message, param=param, retry_after_s=info.retry_after_s) from error
