"""From records to documents: which field of a record is learned, and how it becomes token ids."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from tbjax.training.data.chat import Chat, Learn, encodable
from tbjax.training.data.corpus import Document
from tbjax.training.data.encoder import Encoder
from tbjax.training.data.sources import Place, Refusals


class Fields(NamedTuple):
    """What of a record is learned: one field of text, one of messages, or a prompt and its completion."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in self if name is not None]

    def checked(self) -> Self:
        """Themselves, if they are of one kind."""
        kinds = (self.text, self.messages, self.prompt or self.completion)
        if sum(kind is not None for kind in kinds) > 1 or (self.prompt is None) != (self.completion is None):
            raise ValueError(
                f"{', '.join(map(repr, self.names))} cannot be learned together: give field= of a text, or messages= "
                "of a conversation, or both prompt= and completion=."
            )
        return self

    def found_in(self, record: Mapping[str, Any], place: Place) -> "Fields":
        """Themselves, or where none is named the usual ones that `record` has."""
        if self.names:
            return self
        for usual in USUAL:
            if all(name in record for name in usual.names):
                return usual
        raise ValueError(
            f"{place}: what to learn cannot be told from the fields {', '.join(map(repr, record)) or '(none)'}: name "
            "it with field=, with messages=, or with prompt= and completion=."
        )


def columns(fields: Fields, names: Sequence[str]) -> list[str]:
    """Which of a table's columns are needed; all of them where that cannot be told, and is said by the first record."""
    kinds = (fields,) if fields.names else USUAL
    needed = next((kind.names for kind in kinds if set(kind.names) <= set(names)), names)
    return [name for name in names if name in needed or name == TOOLS]


# What the assistant may call, in a field of its own beside the messages.
TOOLS = "tools"

# In this order: what is a conversation may have a text beside it.
USUAL = (Fields(messages="messages"), Fields(prompt="prompt", completion="completion"), Fields(text="text"))


def documents_of(
    records: Iterable[tuple[Place, Any]], encoder: Encoder, fields: Fields, learn: Learn, refusals: Refusals
) -> Iterator[Document]:
    """Documents in the order of the records, which are texts or have fields."""
    records = iter(records)
    try:
        first = next(records)
    except StopIteration:
        refusals.report()
        return
    place, record = first
    if isinstance(record, Mapping):
        fields = fields.checked().found_in(record, place)
    records = itertools.chain([first], records)
    chat = Chat(encoder, learn)
    if fields.messages is not None:
        yield from _conversations(records, chat, fields.messages, refusals)
    elif fields.prompt is not None and fields.completion is not None:
        yield from _pairs(records, chat, fields.prompt, fields.completion, refusals)
    else:
        yield from encoder.documents(_texts(records, fields.text, refusals))
    refusals.report()


def _texts(records: Iterable[tuple[Place, Any]], name: str | None, refusals: Refusals) -> Iterator[str]:
    for place, record in records:
        if isinstance(record, str):
            if _is_text(record, "the text", place, refusals):
                yield record
        elif _has(record, name, place, refusals) and _is_text(record[name], f"field {name!r}", place, refusals):
            yield record[name]


def _conversations(
    records: Iterable[tuple[Place, Any]], chat: Chat, name: str, refusals: Refusals
) -> Iterator[Document]:
    for place, record in records:
        if _has(record, name, place, refusals):
            tools = record.get(TOOLS) if isinstance(record.get(TOOLS), list) else None
            document = chat.conversation(record[name], place, refusals, tools=tools)
            if document is not None:
                yield document


def _pairs(
    records: Iterable[tuple[Place, Any]], chat: Chat, prompt: str, completion: str, refusals: Refusals
) -> Iterator[Document]:
    for place, record in records:
        if not (_has(record, prompt, place, refusals) and _has(record, completion, place, refusals)):
            continue
        asked, answered = record[prompt], record[completion]
        if isinstance(asked, list) and isinstance(answered, list):
            document = chat.conversation([*asked, *answered], place, refusals, given=len(asked))
            if document is not None:
                yield document
            continue
        fine = _is_text(asked, f"field {prompt!r}", place, refusals, empty=True)
        if fine and _is_text(answered, f"field {completion!r}", place, refusals):
            yield chat.completion(str(asked), answered)


def _has(record: Any, name: str | None, place: Place, refusals: Refusals) -> bool:
    if not isinstance(record, Mapping):
        refusals.refuse(place, f"a record must have fields, this is a {type(record).__name__}.")
        return False
    if name not in record:
        refusals.refuse(place, f"field {name!r} is missing: there are {', '.join(map(repr, record)) or 'none'}.")
        return False
    return True


def _is_text(value: Any, what: str, place: Place, refusals: Refusals, *, empty: bool = False) -> bool:
    if not isinstance(value, str):
        refusals.refuse(place, f"{what} must be a string, this is {_brief(value)}.")
    elif not empty and not value.strip():
        refusals.refuse(place, f"{what} is empty.")
    elif not encodable(value):
        refusals.refuse(place, f"{what} holds half of a surrogate pair, which no UTF-8 text has.")
    else:
        return True
    return False


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:40]}{'...' if len(shown) > 40 else ''} ({type(value).__name__})"
