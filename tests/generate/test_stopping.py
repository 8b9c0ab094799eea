"""Stopping and streaming: text is looked at as a whole, and given out once it is settled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.generate.stopping import Answer


def of_bytes(tokens):
    """A tokenizer of bytes, as byte-level ones fall back to."""
    return bytes(tokens).decode(errors="replace")


def of_parts(parts):
    """A tokenizer of given parts, by number."""
    return lambda tokens: "".join(parts[token] for token in tokens)


def taken(answer, tokens, block):
    """The pieces of an answer that comes a block at a time."""
    pieces = []
    for start in range(0, len(tokens), block):
        answer.take(tokens[start : start + block])
        pieces.append(answer.piece())
    return pieces


@given(st.text(max_size=30), st.integers(1, 7))
def test_pieces_are_the_text_and_never_split_a_character(text, block):
    tokens = list(text.encode(errors="ignore"))
    whole = bytes(tokens).decode()
    answer = Answer(max(1, len(tokens)), (), of_bytes)
    pieces = taken(answer, tokens, block)
    assert "".join(pieces) == whole
    assert all(whole.startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "abb", "é"]), max_size=20), st.integers(1, 5))
def test_an_answer_ends_before_the_first_stop_string_wherever_tokens_begin_and_end(parts, block):
    text, stops = "".join(parts), ["abba", "bé"]
    places = [text.find(stop) for stop in stops if stop in text]
    wanted = text[: min(places)] if places else text
    answer = Answer(len(parts) + 1, (), of_parts(parts), stops)
    streamed = "".join(taken(answer, list(range(len(parts))), block))
    # The first to be complete ends the answer; of two that overlap that may be the one that begins later.
    assert answer.text == wanted or any(text.startswith(answer.text + stop) for stop in stops)
    assert wanted.startswith(streamed) or answer.text.startswith(streamed)
    assert (answer.end == "stop") == bool(places)
    if places:
        assert streamed == answer.text
        assert of_parts(parts)(answer.tokens) == answer.text[: len(of_parts(parts)(answer.tokens))]


def test_a_token_that_a_stop_string_begins_within_is_not_part_of_the_answer():
    answer = Answer(9, (), of_parts(["one", " two", "th", "ree."]), ["oth"])
    answer.take([0, 1, 2, 3])
    assert (answer.text, answer.tokens, answer.end) == ("one tw", [0], "stop")


def test_what_may_become_a_stop_string_is_held_back_and_then_given():
    answer = Answer(9, (), of_parts(["a", "#", "#", "b"]), ["###"])
    assert taken(answer, [0, 1, 2, 3], 1) == ["a", "", "", "##b"]
    assert answer.new_tokens() == [0, 1, 2, 3]


def test_a_stop_string_that_never_comes_ends_with_the_budget():
    answer = Answer(3, (), of_parts("abcd"), ["xyz"])
    assert taken(answer, [0, 1, 2, 3], 2) == ["ab", "c"]
    assert (answer.text, answer.end, answer.missing) == ("abc", "length", 0)


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_what_comes_together_with_the_end_is_read_too(block):
    tokens = [*b"hello", 0]
    for budget, eos, text in ((9, (0,), "hello"), (3, (0,), "hel"), (5, (), "hello")):
        answer = Answer(budget, eos, of_bytes)
        assert "".join(taken(answer, tokens, block)) == answer.text == text
        assert answer.end == ("eos" if budget == 9 else "length")


def test_an_end_token_is_not_part_of_the_answer_and_nothing_follows_it():
    answer = Answer(9, [7], None)
    answer.take([1, 2, 7, 3], [-1.0, -2.0, -3.0, -4.0])
    assert (answer.tokens, answer.log_probabilities, answer.end) == ([1, 2], [-1.0, -2.0], "eos")


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_is_kept(budget):
    answer = Answer(budget)
    answer.take([1, 2])
    assert (answer.tokens, answer.end) == ([1, 2][:budget], "length")
