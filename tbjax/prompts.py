"""What a model may be asked to continue, as rows of token ids, and the answer in the form of the question.

    a text                        a text
    a chat (messages)             the assistant's text
    several of either             a list of texts
    a row of token ids            a row of token ids
    rows of token ids             rows of token ids
    what a tokenizer gave         as its `input_ids`, without what its `attention_mask` leaves out

Token ids may be numbers in a sequence or any array: NumPy's, JAX's, PyTorch's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard, TypeVar

import numpy as np

from tbjax.generate.engine import check_tokens

Message: TypeAlias = Mapping[str, Any]
Chat: TypeAlias = Sequence[Message]
Ids: TypeAlias = Any  # a sequence of integers, or an array of them
Prompt: TypeAlias = str | Sequence[str] | Chat | Sequence[Chat] | Ids | Sequence[Ids]

KINDS = "a text, a chat (a list of messages), token ids, or a list of one of these"


Answer = TypeVar("Answer")


class Asked(NamedTuple):
    """A prompt in the model's terms."""

    rows: list[list[int]]
    one: bool  # a single prompt, not a list of them
    read_as: Callable[[list[int]], str] | None  # the text of token ids, if texts were asked

    def form(self, answers: Sequence[Answer]) -> Answer | list[Answer]:
        """Answers, as many to each row, in the form of the prompt: one to one, otherwise a list."""
        return answers[0] if self.one and len(answers) == 1 else list(answers)


def asked(prompt: Prompt, tokenizer: Callable[[], Any], vocab_size: int) -> Asked:
    """The rows of a prompt. `tokenizer` gives the model's, or raises if it has none: it is called for texts only."""
    if isinstance(prompt, str) or _is_chat(prompt):
        return _texts([prompt], tokenizer(), one=True)
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        return asked(_without_padding(prompt), tokenizer, vocab_size)
    if isinstance(prompt, Mapping):
        raise ValueError("prompt is a single message: a chat is a list of messages, [{'role': ..., 'content': ...}].")
    ids = _array(prompt)
    if ids is not None:
        if ids.ndim not in (1, 2):
            raise ValueError(f"a prompt of token ids is [sequence] or [batch, sequence], not {list(ids.shape)}.")
        rows = ids if ids.ndim == 2 else ids[None]
        return _ids(list(rows), vocab_size, one=ids.ndim == 1)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise ValueError(f"prompt={prompt!r}: it must be {KINDS}.")
    if all(isinstance(item, str) or _is_chat(item) for item in prompt):
        return _texts(list(prompt), tokenizer(), one=False)
    if all(_is_integer(token) for token in prompt):
        return _ids([prompt], vocab_size, one=True)
    rows = [row if (ids := _array(row)) is None else ids for row in prompt]
    if all(row.ndim == 1 if isinstance(row, np.ndarray) else _is_row(row) for row in rows):
        return _ids(rows, vocab_size, one=False)
    raise ValueError(
        f"prompt mixes kinds ({', '.join(sorted({type(item).__name__ for item in prompt}))}): give {KINDS}."
    )


def reader(tokenizer: Any) -> Callable[[list[int]], str]:
    """The text of token ids, without special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def _texts(items: Sequence[Any], tokenizer: Any, *, one: bool) -> Asked:
    def encode(item: str | Chat) -> list[int]:
        if isinstance(item, str):
            return tokenizer(item)["input_ids"]
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("this model's tokenizer has no chat template: give the prompt as a text.")
        # A chat that ends with the assistant's own words is continued, not answered.
        template = {"add_generation_prompt": item[-1].get("role") != "assistant"}
        template["continue_final_message"] = not template["add_generation_prompt"]
        return tokenizer.apply_chat_template(list(item), tokenize=True, return_dict=True, **template)["input_ids"]

    return Asked([encode(item) for item in items], one, reader(tokenizer))


def _ids(rows: Sequence[Any], vocab_size: int, *, one: bool) -> Asked:
    for row in rows:
        check_tokens(np.asarray(row, None if len(row) else np.int32), vocab_size)
    return Asked([[int(token) for token in row] for row in rows], one, None)


def _without_padding(encoded: Mapping[str, Any]) -> Any:
    ids, mask = encoded["input_ids"], encoded.get("attention_mask")
    if mask is None:
        return ids
    if np.ndim(ids[0]) == 0:
        return [token for token, real in zip(ids, mask, strict=True) if real]
    return [[t for t, real in zip(row, kept, strict=True) if real] for row, kept in zip(ids, mask, strict=True)]


def _array(value: Any) -> np.ndarray | None:
    """An array of any library as NumPy's; None of what is none."""
    return np.asarray(value) if hasattr(value, "__array__") and np.ndim(value) else None


def _is_chat(value: Any) -> TypeGuard[Chat]:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(_is_integer, value))


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and np.ndim(value) == 0 and not isinstance(value, bool)
