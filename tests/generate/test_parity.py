"""Greedy answers are transformers', token for token, on any mesh: a real model, 32 prompts, 128 tokens each.

Two float32 programs that sum in another order differ in the last bits of a score, and so choose differently where the
two best scores lie closer together than that. Such a tie is recognised by the scores at the first token that differs:
both choices must be the two best of transformers' own, and the gap between them must be no more than twice the largest
difference between our scores and transformers' for that very prefix. From there on the two answer different texts, so
the row is compared up to there; and most rows must have no tie at all.
"""

import jax
import numpy as np
import pytest

import tbjax
from benchmarks.checkpoints import SMOLLM2
from tbjax.mesh import make_mesh

TOPICS = ("the sea", "a clock", "winter", "bread", "the old library", "electricity", "a small dog", "mathematics")
FORMS = (
    "Write about {}.",
    "The best thing about {} is",
    "Here is a short story. Once there was a traveller who knew nothing of {}, until one day",
    "Q: What is special about {}? Explain it to a child.\nA:",
)
PROMPTS = [form.format(topic) for topic in TOPICS for form in FORMS]
NEW = 128
MOST = 28  # of the 32 rows: without a tie

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model in float32, its tokenizer, and what it answers to each prompt alone."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("smollm2")
    made = tbjax.load(SMOLLM2, (1, 8, 1), dtype="float32", progress=False)
    made.save_pretrained(folder, overwrite=True)
    tokenizer = made.tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(**encoded, **options)[:, encoded["input_ids"].shape[1] :].tolist()

    def scores(tokens):
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0, -1].numpy()

    return folder, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], out, scores


@pytest.mark.parametrize(
    "mesh", [(1, 1, 1), (1, 1, 8), (2, 2, 2), {"pp": 2}], ids=["one", "tp8", "dp2-fsdp2-tp2", "pp2"]
)
def test_answers_are_transformers_token_for_token(theirs, mesh):
    folder, prompts, wanted, scores = theirs
    count = int(np.prod(list(mesh.values()) if isinstance(mesh, dict) else mesh))
    model = tbjax.load(folder, make_mesh(mesh, jax.devices()[:count]), progress=False)
    # transformers forbids the end token with min_new_tokens, and so do we.
    found = model.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW)
    ties = 0
    for prompt, ours, whole in zip(prompts, found, wanted, strict=True):
        assert len(ours) == NEW
        place = next((n for n, (a, b) in enumerate(zip(ours, whole, strict=True)) if a != b), None)
        if place is None:
            continue
        ties += 1
        prefix = [*prompt, *whole[:place]]
        of_theirs = scores(prefix)
        of_ours = np.asarray(model(np.asarray([prefix], np.int32)))[0, -1]
        noise = np.abs(of_ours - of_theirs).max()
        best = np.argsort(of_theirs)[::-1]
        chosen = [token for token in best if token != model.tokenizer.eos_token_id][:2]
        assert {ours[place], whole[place]} == set(map(int, chosen)), place
        assert of_theirs[chosen[0]] - of_theirs[chosen[1]] <= 2 * noise, (place, noise)
    assert len(PROMPTS) - ties >= MOST
