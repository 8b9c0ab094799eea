"""Prompts: every form of a question, and the answer in the same form."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tbjax.prompts import asked

HELLO = [{"role": "user", "content": "hi"}]


class Letters:
    """A tokenizer whose tokens are letters; its chat template writes each message after its role's initial."""

    chat_template = "(in code)"

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, *, add_generation_prompt, continue_final_message, tokenize, return_dict):
        assert (tokenize, return_dict) == (True, True)
        text = "".join(f"{message['role'][0].upper()}{message['content']}" for message in messages)
        return self(text + ("A" if add_generation_prompt else "") + ("..." if continue_final_message else ""))

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids))


def ask(prompt, vocab_size=256):
    made = asked(prompt, Letters, vocab_size)
    return made.rows, made.form([made.read_as([ord("x")]) if made.read_as else [ord("x")] for _ in made.rows])


def spelled(prompt):
    rows, answer = ask(prompt)
    return ["".join(map(chr, row)) for row in rows], answer


def test_a_text_is_answered_by_a_text_and_several_by_several():
    assert spelled("abc") == (["abc"], "x")
    assert spelled(["abc", "d"]) == (["abc", "d"], ["x", "x"])
    assert spelled(("abc",)) == (["abc"], ["x"])


def test_a_chat_is_answered_and_chats_too():
    assert spelled(HELLO) == (["UhiA"], "x")
    assert spelled([HELLO, HELLO]) == (["UhiA", "UhiA"], ["x", "x"])
    assert spelled([HELLO, "plain"]) == (["UhiA", "plain"], ["x", "x"])


def test_what_the_assistant_began_is_continued():
    assert spelled([*HELLO, {"role": "assistant", "content": "well"}]) == (["UhiAwell..."], "x")


@pytest.mark.parametrize(
    "row",
    [[1, 2], (1, 2), np.array([1, 2], np.uint16), jnp.array([1, 2]), torch.tensor([1, 2]), [np.int8(1), jnp.int32(2)]],
)
def test_token_ids_of_any_kind(row):
    assert ask(row) == ([[1, 2]], [ord("x")])
    assert ask([row, row]) == ([[1, 2], [1, 2]], [[ord("x")], [ord("x")]])
    assert all(type(token) is int for token in asked(row, Letters, 256).rows[0])


def test_a_table_of_token_ids():
    assert ask(torch.tensor([[1, 2], [3, 4]])) == ([[1, 2], [3, 4]], [[ord("x")], [ord("x")]])


def test_rows_of_different_lengths_and_kinds():
    assert ask([[1, 2, 3], np.array([4])])[0] == [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "must be a text"),
        (7, "must be a text"),
        (b"abc", "must be a text"),
        (HELLO[0], "a chat is a list of messages"),
        (["abc", 3], "mixes kinds \\(int, str\\)"),
        (["abc", [1, 2]], "mixes kinds \\(list, str\\)"),
        ([[1, 2], [3.5]], "mixes kinds"),
        ([True, False], "mixes kinds"),
        (np.ones((1, 1, 1), np.int32), "not \\[1, 1, 1\\]"),
        (np.array([1.0, 2.0]), "must be integers, not float64"),
        ([[1, 2], [256]], "token id 256 is outside the vocabulary of 256"),
        ([-1], "token id -1 is outside"),
    ],
)
def test_what_is_no_prompt_is_refused_in_words(prompt, message):
    with pytest.raises(ValueError, match=message):
        ask(prompt)


def test_a_chat_needs_a_template():
    class Plain(Letters):
        chat_template = None

    with pytest.raises(ValueError, match="no chat template: give the prompt as a text"):
        asked(HELLO, Plain, 256)


def test_token_ids_need_no_tokenizer():
    def none():
        raise ValueError("there is none")

    assert asked([1, 2], none, 256).rows == [[1, 2]]
    with pytest.raises(ValueError, match="there is none"):
        asked("text", none, 256)
