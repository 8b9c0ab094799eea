"""Conversations and prompts with their completions: what a model is to say is learned, the rest is read.

A chat template turns messages into text. Some mark what the assistant says themselves (`{% generation %}`), and then
`transformers` says which tokens those are. For the others the conversation is rendered turn by turn: what the template
adds for an assistant's turn, beyond the prompt for it, is what the assistant says. That needs a template under which a
conversation's beginning is the beginning of its rendering, which is checked. (Templates that leave out what was thought
in earlier turns are not of that kind.)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tbjax.training.data.corpus import Document
from tbjax.training.data.encoder import Encoder
from tbjax.training.data.sources import Place, Refusals

# What is learned of a conversation: all that the assistant says, its last turn, or the prompts too.
Learn: TypeAlias = Literal["completions", "last", "all"]

MARKED = re.compile(r"\{%[-+]?\s*generation\b")
SHOWN = 40  # characters of a rendering in an error

Message: TypeAlias = Mapping[str, Any]


class Chat:
    """Conversations to documents."""

    def __init__(self, encoder: Encoder, learn: Learn = "completions") -> None:
        if learn not in get_args(Learn):
            raise ValueError(f"learn={learn!r} is unknown: it is one of {', '.join(map(repr, get_args(Learn)))}.")
        self._encoder = encoder
        self._tokenizer: Any = encoder.tokenizer
        self._learn: Learn = learn

    def completion(self, prompt: str, completion: str) -> Document:
        """A prompt and what follows it, each tokenized for itself, as the prompt alone will be when it is asked."""
        asked, answered = self._encoder([prompt, completion])
        asked, answered = [*self._encoder.begin, *asked], [*answered, *self._encoder.end]
        learn = np.repeat([self._learn == "all", True], [len(asked), len(answered)])
        return Document(np.array([*asked, *answered]), learn)

    def conversation(
        self,
        messages: Sequence[Message],
        place: Place,
        refusals: Refusals,
        *,
        given: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> Document | None:
        """A conversation, of which the first `given` messages are prompt whoever says them; None if it is refused."""
        import jinja2

        if why := _wrong(messages, given, self._learn):
            refusals.refuse(place, why)
            return None
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [number for number in turns if number >= given][-1 if self._learn == "last" else 0 :]
        try:
            if self._learn == "completions" and not given and MARKED.search(self._template()):
                return self._marked(messages, tools, place, refusals)
            return self._by_turns(messages, turns, tools, place)
        except jinja2.TemplateError as error:
            refusals.refuse(place, f"the chat template does not take it: {error}", error)
            return None

    def _template(self) -> str:
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise ValueError(
                f"{type(self._tokenizer).__name__} has no chat template, so there is no way to write messages as text: "
                "set tokenizer.chat_template, or give texts or prompts with completions."
            )
        return template if isinstance(template, str) else self._tokenizer.get_chat_template()

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, place: Place, refusals: Refusals
    ) -> Document | None:
        out = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learn = np.array(out["assistant_masks"], bool)
        if not learn.any():
            refusals.refuse(
                place, "the chat template's {% generation %} marks nothing of it, so nothing would be learned."
            )
            return None
        return Document(np.array(out["input_ids"]), learn)

    def _by_turns(
        self, messages: Sequence[Message], turns: Sequence[int], tools: Sequence[Any] | None, place: Place
    ) -> Document:
        whole = self._render(messages, tools)
        spans = []
        for turn in turns if self._learn != "all" else ():
            asked = self._render(messages[:turn], tools, ask=True)
            answered = whole if turn + 1 == len(messages) else self._render(messages[: turn + 1], tools)
            _must_begin(
                answered, asked, place, f"the prompt for message {turn + 1} is no longer there once it is answered"
            )
            _must_begin(whole, answered, place, f"message {turn + 1} is written otherwise once more messages follow")
            spans.append((len(asked), len(answered)))
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self._tokenizer).__name__} does not say where in the text its tokens stand, which masking a "
                "prompt needs: use the fast tokenizer of this model, or a template with {% generation %}."
            )
        out = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        start, stop = np.array(out["offset_mapping"], np.int64).reshape(-1, 2).T
        learn = np.full(len(start), self._learn == "all")
        for first, last in spans:
            learn |= (start >= first) & (stop <= last) & (stop > start)
        return Document(np.array(out["input_ids"]), learn)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str:
        self._template()
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=ask
        )


def _wrong(messages: Any, given: int, learn: Learn) -> str:
    """What is wrong with the messages, in words; empty if nothing is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return f"messages must be a list, this is a {type(messages).__name__}."
    if not messages:
        return "the conversation is empty."
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {number} must have a role: {str(message)[:SHOWN]!r}."
        content = message.get("content")
        if not isinstance(content, str | Sequence) and not message.get("tool_calls"):
            return f"message {number} must have a content, this is {type(content).__name__}."
        if isinstance(content, str) and not encodable(content):
            return f"message {number} holds half of a surrogate pair, which no UTF-8 text has."
    if learn != "all" and not any(message["role"] == "assistant" for message in messages[given:]):
        return "no message has the role 'assistant', so there is nothing to learn."
    if learn == "last" and messages[-1]["role"] != "assistant":
        return f"learn='last' needs a conversation that ends with the assistant, not with {messages[-1]['role']!r}."
    return ""


def encodable(text: str) -> bool:
    """Whether a text is Unicode: JSON's escapes can write what is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _must_begin(text: str, beginning: str, place: Place, what: str) -> None:
    if text.startswith(beginning):
        return
    same = next(i for i in range(len(beginning)) if text[i : i + 1] != beginning[i])
    raise ValueError(
        f"{place}: under this chat template {what} ({beginning[same : same + SHOWN]!r} against "
        f"{text[same : same + SHOWN]!r}), so which tokens are the assistant's cannot be told. learn='last' learns "
        "the last turn alone, learn='all' the prompts too; a template that marks them with {% generation %} serves "
        "in any case."
    )
