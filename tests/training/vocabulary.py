"""A tokenizer that needs no file: one token for each byte, and three for the ends of things."""

from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

END, SAYS, SAID = "<end>", "<|im_start|>", "<|im_end|>"

# The template of many models, which repeats nothing and leaves nothing out.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    """Each call makes one; `options` are those of transformers' class."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, additional_special_tokens=[SAYS, SAID], **options
    )
    made.chat_template = template
    return made
