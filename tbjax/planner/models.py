"""The models that people name, described without a network or an access token.

`models.json` holds what a model's `config.json` says once `transformers` has filled in the defaults, as far as the
translation in `interop.families` reads it. Two things are said more briefly than there: `layer_types` is the pattern
that repeats over the layers, and `{"like": NAME, ...}` is another entry with the fields beside it changed. The values
are those of the checkpoints on the Hugging Face hub; tests hold every entry against `transformers` and against the
published number of parameters.

A Gemma 3 entry from 4B up is the text part of a model that also sees.

    describe("meta-llama/Llama-2-70b-hf")["hidden_size"]    # 8192
    describe("llama-2-70b-HF")                              # the same: capitals and the owner may be left out
"""

import copy
import difflib
import functools
import importlib.resources
import itertools
import json
from collections.abc import Mapping
from typing import Any


class UnknownModel(ValueError):
    """A name that is not among the built-in descriptions."""


def describe(name: str) -> dict[str, Any]:
    """The config of the built-in model `name`, as `interop.families` reads it."""
    key = _index().get(_normal(name))
    if key is None:
        raise UnknownModel(
            f"model {name!r} has no built-in description. {closest(name)} Otherwise give the path of its config.json, "
            "or the hub id (owner/name) of a repository that has one."
        )
    return _config(key)


def closest(name: str) -> str:
    """The names nearest to one that is unknown; where none is near, whose models are known."""
    near = difflib.get_close_matches(_normal(name), _index(), n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(dict.fromkeys(_index()[match] for match in near))}?"
    owners = dict.fromkeys(known.partition("/")[0] for known in names())
    return f"There are {len(names())} of them, by {', '.join(owners)}: `tbjax models` lists them."


def names() -> tuple[str, ...]:
    """The models described, by their hub ids; variants that are like another are left out."""
    return tuple(name for name, entry in _entries().items() if "like" not in entry)


def known(name: str) -> bool:
    """Whether `describe` has that model."""
    return _normal(name) in _index()


def _normal(name: str) -> str:
    return name.strip().lower()


@functools.cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(importlib.resources.files("tbjax.planner").joinpath("models.json").read_text(encoding="utf-8"))


@functools.cache
def _index() -> Mapping[str, str]:
    """What a user may write, in lower case, and the entry meant: the hub id, and its part after the owner."""
    whole = {_normal(name): name for name in _entries()}
    return {_normal(name.rpartition("/")[2]): name for name in _entries()} | whole


def _config(name: str) -> dict[str, Any]:
    entry = copy.deepcopy(dict(_entries()[name]))
    if "like" not in entry:
        types = entry.get("layer_types")
        return entry | ({"layer_types": _repeat(types, entry["num_hidden_layers"])} if types else {})
    return _config(entry.pop("like")) | entry


def _repeat(pattern: list[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(pattern), count))
