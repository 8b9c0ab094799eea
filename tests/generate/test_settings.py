"""Settings: every field of transformers' GenerationConfig is done, of no matter, or refused."""

import dataclasses

import pytest
from transformers import GenerationConfig

from tbjax.generate import settings
from tbjax.generate.settings import Options, Settings


def test_every_field_of_transformers_has_its_place():
    ours = {field.name for field in dataclasses.fields(Settings)}
    assert set(vars(GenerationConfig())) <= ours | settings._NO_MATTER | set(settings._REFUSED)
    assert not ours & settings._NO_MATTER
    assert not (ours | settings._NO_MATTER) & set(settings._REFUSED)
    assert set(Options.__annotations__) == ours


def test_what_neither_says_is_as_transformers_has_it():
    theirs, ours = GenerationConfig._get_default_generation_params(), Settings()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences"):
        assert getattr(ours, name) == theirs[name], name
    assert Settings.of(GenerationConfig()) == ours
    assert Settings.of(theirs | {"max_length": None}) == dataclasses.replace(ours, min_length=0)


def test_the_later_come_before_the_earlier_and_none_says_nothing():
    made = Settings.of({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}, {"temperature": 0.8}, {"top_p": None})
    assert (made.temperature, made.top_p, made.eos_token_id) == (0.8, 0.9, (2,))
    assert Settings.of({"eos_token_id": [2, 3], "stop_strings": "."}).eos_token_id == (2, 3)
    assert Settings.of({"stop_strings": "ab"}).stop_strings == ("ab",)


def test_a_checkpoints_file_may_say_more_than_anyone_knows():
    said = {"chat_format": "chatml", "temperature": 0.5, "num_beams": 2}
    assert settings.known(said) == {"temperature": 0.5, "num_beams": 2}
    with pytest.raises(ValueError, match="chat_format='chatml': there is no such setting"):
        Settings.of(said)


def test_rules_are_those_that_change_something():
    assert Settings(temperature=0.5, top_p=0.3).rules == {}  # nothing is drawn
    assert Settings(do_sample=True).rules == {"temperature": 1.0, "top_k": 50.0}
    assert Settings(do_sample=True, top_k=0, top_p=0.5, min_p=0.1).rules == {
        "temperature": 1.0, "top_p": 0.5, "min_p": 0.1,
    }  # fmt: skip
    assert Settings(repetition_penalty=1.1).rules == {"repetition_penalty": 1.1}


def test_budgets():
    assert Settings().budget(10, 4096) == settings.DEFAULT_NEW_TOKENS
    assert Settings().budget(10, 100) == 90
    assert Settings(max_length=30).budget(10, 4096) == 20
    assert Settings(max_length=30, max_new_tokens=5).budget(10, 4096) == 5
    assert Settings(min_length=12).least(10) == 2
    with pytest.raises(ValueError, match="40 tokens, which is more than max_length=30: give max_new_tokens"):
        Settings(max_length=30).budget(40, 4096)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 would change the answer"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 would change"),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"output_scores": True}, "output_scores"),
        ({"temprature": 1.0}, "temprature=1.0: there is no such setting.*temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be an integer"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan must be a number"),
        ({"top_p": 0.0}, "top_p=0.0 must be over 0"),
        ({"min_p": 2}, "min_p=2 must be from 0 to 1"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
        ({"num_return_sequences": 2}, "the same answer each time"),
        ({"stop_strings": [""]}, "none of them empty"),
        ({"stop_strings": [3]}, "must be texts"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        ({"do_sample": "yes"}, "do_sample='yes' must be True or False"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(said, words):
    with pytest.raises(ValueError, match=words):
        Settings.of(said)


def test_what_asks_for_nothing_is_passed_over():
    assert Settings.of({"num_beams": 1, "use_cache": False, "pad_token_id": 0, "typical_p": 1.0}) == Settings()
