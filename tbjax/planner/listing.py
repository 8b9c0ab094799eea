"""`tbjax hardware` and `tbjax models`: what the planner knows by name.

tbjax hardware
tbjax hardware h100          one record, each figure with where it stands
tbjax models
tbjax models llama-3.1-8b    one model: its shape and its parameters
tbjax models qwen --json     those whose names hold a word, for a program
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from tbjax.terminal import Debug, Json, print_json, readable_errors

if TYPE_CHECKING:
    from tbjax.config import ModelConfig
    from tbjax.planner.device import Hardware


def hardware(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of the list: all that is known of it, with sources.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The GPUs and TPUs that can be planned for."""
    with readable_errors(debug=debug):
        from tbjax.planner import hardware as catalogue

        if name is None:
            records = [catalogue.hardware(known) for known in catalogue.names()]
            _print([_record(record) for record in records] if as_json else _all_hardware(records))
        else:
            record = catalogue.hardware(name)
            _print(_record(record) if as_json else _one_hardware(record))


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A model, a config.json, or a part of the names to list.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The models that can be planned by name, without the network."""
    with readable_errors(debug=debug):
        from tbjax.planner import models as known
        from tbjax.planning import model_config

        names = [model for model in known.names() if name is None or name.lower() in model.lower()]
        if name is not None and (not names or known.known(name)):
            config, called = model_config(name)  # of one model; or the error that says what is near
            _print(_model(called, config) if as_json else _one_model(called, config))
        else:
            found = [_model(model, model_config(model)[0]) for model in names]
            _print(found if as_json else _all_models(found))


# Hardware.


def _record(record: "Hardware") -> dict[str, Any]:
    return dataclasses.asdict(record)


def _all_hardware(records: Iterable["Hardware"]) -> RenderableType:
    columns = "#memory", "#memory/s", "#bfloat16/s", "#link/s", "#network/s", "fast fabric"
    rows = [
        (
            record.name,
            record.title,
            _gib(record.memory),
            _size(record.memory_bandwidth),
            _flops(record.flops["bfloat16"]),
            _size(record.link_bandwidth),
            _size(record.network_bandwidth),
            _fabric(record),
        )
        for record in records
    ]
    return _table(("name", "device", *columns), rows)


def _one_hardware(record: "Hardware") -> RenderableType:
    figures: dict[str, str] = {
        "memory": f"{_gib(record.memory)}, of which {_gib(record.reserved)} are the runtime's",
        "memory_bandwidth": f"{_size(record.memory_bandwidth)}/s",
        "flops": ", ".join(f"{dtype} {_flops(rate)}" for dtype, rate in record.flops.items()),
        "link_bandwidth": f"{_size(record.link_bandwidth)}/s one way{' and link' if record.torus else ''}",
        "link_latency": _microseconds(record.link_latency),
        "domain": _fabric(record),
        "network_bandwidth": f"{_size(record.network_bandwidth)}/s one way, a device's share",
        "network_latency": _microseconds(record.network_latency),
        "host_link": f"{_size(record.host_link)}/s",
        "host_memory": f"{_gib(record.host_memory)} for {record.devices_per_host} devices",
    }
    rows = [(name, figure, record.sources.get(name, "")) for name, figure in figures.items()]
    return _table((record.name, record.title, "source"), rows)


def _fabric(record: "Hardware") -> str:
    if record.torus:
        return f"{record.torus}-D torus of up to {record.domain:,}"
    return f"{record.domain} behind switches" if record.domain > 1 else "none"


# Models.


def _model(name: str, config: "ModelConfig") -> dict[str, Any]:
    from tbjax.planner.parameters import active_parameters, parameters

    moe = config.moe
    return {
        "name": name,
        "family": config.family,
        "parameters": parameters(config),
        "active_parameters": active_parameters(config),
        "layers": config.layers,
        "embed": config.embed,
        "mlp": config.mlp,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "experts": moe.experts if moe else 0,
        "experts_per_token": moe.experts_per_token if moe else 0,
        "max_positions": config.max_positions,
        "tie_embeddings": config.tie_embeddings,
    }


def _all_models(found: Sequence[dict[str, Any]]) -> RenderableType:
    columns = "#parameters", "#active", "#layers", "#embed", "#heads/kv", "#experts", "#positions"
    rows = []
    for model in found:
        active = model["active_parameters"] != model["parameters"]
        rows.append(
            (
                model["name"],
                model["family"],
                _parameters(model["parameters"]),
                _parameters(model["active_parameters"]) if active else "",
                str(model["layers"]),
                str(model["embed"]),
                f"{model['heads']}/{model['kv_heads']}",
                str(model["experts"] or ""),
                f"{model['max_positions']:,}",
            )
        )
    return _table(("model", "family", *columns), rows)


def _one_model(name: str, config: "ModelConfig") -> RenderableType:
    rows = [
        (field, f"{value:,}" if type(value) is int else str(value)) for field, value in _model(name, config).items()
    ]
    return _table((name, "#"), rows[1:])


# Words.


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """Columns whose titles begin with # hold numbers."""
    result = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        numbers = column.startswith("#")
        result.add_column(column.lstrip("#"), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def _print(what: Any) -> None:
    if isinstance(what, dict | list):
        print_json(what)
    else:
        Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(what)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


def _size(nbytes: float) -> str:
    from tbjax.placement import readable

    return readable(nbytes)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP"


def _microseconds(time: float) -> str:
    return f"{time * 1e6:.2g} µs"


def _parameters(number: int) -> str:
    from tbjax.planner.words import short_count

    return short_count(number)
