"""What is to be written, in the words of transformers' `GenerationConfig`, each of whose fields has its place here.

A field is one of four things. Most change what is written, and are settings of ours under the same name. Some only say
how transformers goes about it (its caches, its compilation), which changes no token: they are passed over. Some change
what is written and are not done here: they raise as soon as they are set to more than nothing. And a name that is none
of these is not a field.

What a call says comes before what the model's generation_config.json says; what neither says is as transformers has it,
apart from the length of an answer, see `DEFAULT_NEW_TOKENS`.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypedDict

# What is written at most where neither the call nor the model's generation config says. (transformers' default is 20
# tokens, the prompt's included.)
DEFAULT_NEW_TOKENS = 128

# How transformers works, or what it puts around an answer.
_NO_MATTER = frozenset({
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "use_cache", "cache_config", "max_cache_len", "low_memory", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "renormalize_logits", "use_mtp",
    # Of beams, of encoders and of assistants; those that ask for one are among the refused.
    "early_stopping", "length_penalty", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
})  # fmt: skip

# What is not done here, and the values at which it asks for nothing (None is one everywhere).
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "max_time": (),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "cache_implementation": ("dynamic", "static", "hybrid", "sliding_window", "offloaded", "offloaded_static"),
}


def known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that transformers knows. A checkpoint's file may have more, for code of its own: there as here they say
    nothing, while in a call a name that nobody knows is a mistake."""
    ours = {field.name for field in dataclasses.fields(Settings)}
    return {name: value for name, value in fields.items() if name in ours | _NO_MATTER | set(_REFUSED)}


class Options(TypedDict, total=False):
    """The fields of a `GenerationConfig` that a call may give by name."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    return_dict_in_generate: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be written after each prompt. `temperature` and what follows it count where `do_sample` is set."""

    max_new_tokens: int | None = None
    max_length: int | None = None  # the prompt's tokens and the new ones; max_new_tokens comes before it
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    return_dict_in_generate: bool = False

    @classmethod
    def of(cls, *layers: Any) -> Self:
        """Of mappings or `GenerationConfig`s, of which the later come before the earlier. None is not said."""
        said: dict[str, Any] = {}
        for layer in layers:
            fields: Mapping[str, Any] = layer.to_dict() if hasattr(layer, "to_dict") else dict(layer or {})
            said |= {name: value for name, value in fields.items() if value is not None}
        ours = {field.name for field in dataclasses.fields(cls)}
        for name, value in said.items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise ValueError(f"{name}={value!r} would change the answer, and tbjax does not do it: leave it out.")
            if name not in ours | _NO_MATTER | set(_REFUSED):
                known = ", ".join(sorted(ours))
                raise ValueError(f"{name}={value!r}: there is no such setting of generation; there are {known}.")
        return cls(**{name: _form(name, value) for name, value in said.items() if name in ours})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k", "num_return_sequences"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
                raise ValueError(f"{name}={value!r} must be an integer.")
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is negative.")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Real) or not math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a number.")
        for name in ("do_sample", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be positive: do_sample=False is what leaves nothing to chance."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be over 0 and at most 1: it is a share of the probability.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1: it is a share of the best token's probability.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 is none.")
        if self.num_return_sequences < 1:
            raise ValueError("num_return_sequences=0 asks for no answer: give 1 or more.")
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} would give the same answer each time: "
                "set do_sample=True, or leave it out."
            )
        if any(not isinstance(token, numbers.Integral) or isinstance(token, bool) for token in self.eos_token_id):
            given = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id)
            raise ValueError(f"eos_token_id={given!r} must be a token id or a list of them.")
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise ValueError(f"stop_strings={list(self.stop_strings)} must be texts, none of them empty.")

    def budget(self, prompt: int, positions: int) -> int:
        """How many tokens may follow a prompt of so many, in a model of so many positions."""
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
        elif self.max_length is not None:
            wanted = min(self.max_length, positions) - prompt
        else:
            return min(DEFAULT_NEW_TOKENS, max(0, positions - prompt))
        if wanted < 0:
            raise ValueError(
                f"a prompt has {prompt} tokens, which is more than max_length={self.max_length}: give max_new_tokens."
            )
        return wanted

    def least(self, prompt: int) -> int:
        """How many tokens there are before the first end token, at least."""
        if self.min_new_tokens is not None:
            return self.min_new_tokens
        return max(0, (self.min_length or 0) - prompt)

    @property
    def rules(self) -> dict[str, float]:
        """What scores go through before a token is chosen, by name, without what would change nothing."""
        rules = {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            rules["temperature"] = self.temperature
            rules |= {"top_k": float(self.top_k)} if self.top_k else {}
            rules |= {"top_p": self.top_p} if self.top_p < 1 else {}
            rules |= {"min_p": self.min_p} if self.min_p else {}
        return rules


def _form(name: str, value: Any) -> Any:
    """A field's value in the one form that it has here."""
    if name == "eos_token_id":
        return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if name == "stop_strings":
        return (value,) if isinstance(value, str) else tuple(value)
    return value
