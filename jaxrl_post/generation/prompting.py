"""Strings to arrays and back: the host's side of sampling."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation.rollouts import Array
from jaxrl_post.isolation.templates import render
from jaxrl_post.types import Message, Prompts


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts ready for the sampler, those that were too long left out.

    Attributes:
      prompts: the questions that were kept; row ``i`` below belongs to question ``i``.
      contexts: ``[P, S]`` int32 token ids, padded on the left.
      context_mask: ``[P, S]`` bool, true for tokens.
      dropped: ids of the questions that were too long.
    """

    prompts: Prompts
    contexts: np.ndarray
    context_mask: np.ndarray
    dropped: tuple[str, ...]


def tokenize_prompts(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message] | str],
    *,
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation, up to where the model's turn begins.

    With a chat template the text is what the template makes of the messages, and its
    own special tokens are all there are. Without one it is the contents one after the
    other, with the special tokens that the tokenizer puts around a text by default. A
    plain string is taken as it is, in the same way. Names of special tokens become
    those tokens wherever they stand, unless `quote_special_tokens` has quoted them.

    Args:
      tokenizer: a transformers tokenizer.
      conversations: messages, or a string, per prompt.
      chat_template_arguments: handed to the template, such as
        ``{"enable_thinking": False}``.

    Raises:
      InputError: the template fails, or takes too long. transformers renders it in
        jinja's sandbox, in a process of its own: see `isolation.templates`.
    """
    chats = {
        i: conversation
        for i, conversation in enumerate(conversations)
        if tokenizer.chat_template and not isinstance(conversation, str)
    }
    texts = render(tokenizer, [*chats.values()], chat_template_arguments or {})
    rendered = dict(zip(chats, texts, strict=True))
    rows = []
    for i, conversation in enumerate(conversations):
        if i in rendered:
            text = rendered[i]
        elif isinstance(conversation, str):
            text = conversation
        else:
            text = "".join(message["content"] for message in conversation)
        rows.append(_encode(tokenizer, text, add_special_tokens=i not in rendered))
    return rows


_OPEN, _CLOSE = (
    "\ufdd0",
    "\ufdd1",
)  # no text has them: reserved for use inside a program
_QUOTED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def quote_special_tokens(tokenizer: Any, text: str) -> str:
    """`text` in which the names of special tokens will be nothing but text.

    A tokenizer turns `<|im_end|>` into the token that ends a turn, wherever it stands.
    Text that others wrote, inserted into a conversation, must not end one:
    `tokenize_prompts` spells out what is quoted here, as the ordinary tokens of its
    characters. Text without such names is returned as it is.

    Args:
      tokenizer: a transformers tokenizer.
      text: goes into a message.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special}
    names.update(tokenizer.all_special_tokens)
    found = [name for name in names if name and name in text]
    if not found:
        return text
    # Longest first: one name may begin with another.
    pattern = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return re.sub(pattern, lambda match: f"{_OPEN}{match[0]}{_CLOSE}", text)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    ids: list[int] = []
    for i, piece in enumerate(_QUOTED.split(text)):
        if i % 2:
            ids += tokenizer(
                piece, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
        elif piece or i == 0:
            # What the tokenizer puts before a text goes before its first piece.
            begins = add_special_tokens and i == 0
            ids += tokenizer(piece, add_special_tokens=begins)["input_ids"]
    return ids


def bucket(length: int, multiple: int) -> int:
    """The smallest positive multiple of `multiple` that is at least `length`.

    >>> bucket(33, 32), bucket(0, 32)
    (64, 32)
    """
    return max(1, -(-length // multiple)) * multiple


def pad_contexts(
    rows: Sequence[Sequence[int]], multiple: int = 1, pad_token: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids side by side, padded on the left to a common length.

    Args:
      rows: ids of each context.
      multiple: of which the length is one, so that few lengths occur: each is a
        program to compile.
      pad_token: goes where the mask is false.

    Returns:
      ids ``[P, S]`` int32 and mask ``[P, S]`` bool.

    >>> pad_contexts([[5, 6, 7], [8]], multiple=2)[0].tolist()
    [[0, 5, 6, 7], [0, 0, 0, 8]]
    """
    size = bucket(max(map(len, rows), default=0), multiple)
    contexts = np.full((len(rows), size), pad_token, np.int32)
    mask = np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        contexts[i, size - len(row) :] = row
        mask[i, size - len(row) :] = True
    return contexts, mask


def encode_prompts(
    tokenizer: Any,
    prompts: Prompts,
    *,
    max_prompt_length: int,
    max_dropped_share: float = 1.0,
    multiple: int = 64,
    chat_template_arguments: Mapping[str, Any] | None = None,
    key: str = "task",
) -> EncodedPrompts:
    """Prompts as contexts. A prompt that is too long is left out, never cut.

    Args:
      tokenizer: a transformers tokenizer.
      prompts: the questions.
      max_prompt_length: tokens that a prompt may have.
      max_dropped_share: of the prompts; when more are too long, that is an error.
      multiple: see `pad_contexts`.
      chat_template_arguments: see `tokenize_prompts`.
      key: the config's section that the prompts are of, for messages.

    Raises:
      InputError: too many prompts are too long, or a prompt is empty.
    """
    rows = tokenize_prompts(
        tokenizer, prompts.messages, chat_template_arguments=chat_template_arguments
    )
    for name, row in zip(prompts.ids, rows, strict=True):
        if not row:
            raise InputError(
                f"prompt {name!r} is empty: it has no token; check its columns."
            )
    kept = [i for i, row in enumerate(rows) if len(row) <= max_prompt_length]
    dropped = tuple(
        name
        for name, row in zip(prompts.ids, rows, strict=True)
        if len(row) > max_prompt_length
    )
    if len(dropped) > max_dropped_share * len(rows):
        longest = max(map(len, rows))
        raise InputError(
            f"{key}: {len(dropped)} of {len(rows)} prompts are longer than "
            f"max_prompt_length={max_prompt_length} tokens (the longest has {longest}; "
            f"the first is {dropped[0]!r}), more than task.max_dropped_share="
            f"{max_dropped_share:g}. Raise one of the two."
        )
    contexts, mask = pad_contexts([rows[i] for i in kept], multiple)
    return EncodedPrompts(prompts.take(kept), contexts, mask, dropped)


def stop_token_ids(tokenizer: Any, stop: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids of the tokenizer's end tokens, and of the texts in `stop`.

    Raises:
      InputError: a text that is not one token.
    """
    ends = tokenizer.eos_token_id
    ids = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
    for text in stop:
        token = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token) != 1:
            raise InputError(
                f"stop text {text!r} is {len(token)} tokens; it must be exactly one."
            )
        ids += token
    return tuple(dict.fromkeys(ids))


def decode_responses(tokenizer: Any, tokens: Array, mask: Array) -> list[str]:
    """The text of each response, special tokens left out.

    Args:
      tokenizer: a transformers tokenizer.
      tokens: ``[B, T]`` ids.
      mask: ``[B, T]``, true for generated tokens; what it excludes is not read.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask) != 0
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    return tokenizer.batch_decode(
        rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
