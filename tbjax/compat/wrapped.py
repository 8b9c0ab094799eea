"""PyTorch's wrappers of a model for training, DDP and FSDP, and the loop that is written around them.

    model = FullyShardedDataParallel(model, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in batches:
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

PyTorch remembers what was computed and walks it backwards. JAX compiles a loss and its gradients as one program, so
`model(batch)` computes nothing until it is asked: for `.logits`, for the loss's `.item()`, or for `.backward()`, which
runs that one program. It is the library's own loss and gradient (`tbjax.training.gradients`), on the model's mesh.
`tbjax.train` compiles the update into the same program too and needs less memory: this loop is for what is written so
already.

`torch` is `tbjax.compat.torch`: PyTorch's own optimizers take its tensors alone, and refuse a
`tbjax.compat.wrapped.Parameter` by that name. What is wrapped may be a model of tbjax's, or of transformers'.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.api import CausalLM
from tbjax.compat.devices import check_local
from tbjax.compat.training import mesh_of, with_defaults
from tbjax.dtypes import float_dtype
from tbjax.elsewhere import told_by_name
from tbjax.sharding import ShardingStrategy, by_path, with_arrays
from tbjax.training.config import Defaults
from tbjax.training.gradients import gradients_of
from tbjax.training.holding import adopt
from tbjax.training.loss import IGNORED
from tbjax.training.precision import DTYPES, Precision, reduction
from tbjax.training.state import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """In which dtypes weights that are held in float32 are computed with, and gradients are summed over devices.

    A dtype is PyTorch's, JAX's or a text. There are no buffers here: what PyTorch keeps in them, the tables of rotary
    embeddings, is computed where it is used and always in float32, which no `buffer_dtype` makes worse.
    """

    param_dtype: Any = None
    reduce_dtype: Any = None
    buffer_dtype: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                name = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
                object.__setattr__(self, field.name, float_dtype(name, f"MixedPrecision.{field.name}").name)
        reduction(self.precision, self.reduce_dtype)  # raises where they do not go together

    @property
    def precision(self) -> Precision:
        """The same in one of tbjax's words."""
        words: dict[str | None, Precision] = {None: "float32", "float32": "float32", "bfloat16": "mixed"}
        words["float16"] = "float16"
        return words[self.param_dtype]


@dataclasses.dataclass(frozen=True)
class CPUOffload:
    """Whether parameters, and with them gradients and the optimizer's state, lie in the host's memory."""

    offload_params: bool = False


class Wrapped:
    """A model that is trained in PyTorch's words. `module` is the model itself, trained in place."""

    def __init__(
        self,
        module: Any,
        strategy: ShardingStrategy,
        precision: MixedPrecision | None = None,
        defaults: Defaults | None = None,
    ) -> None:
        if "torch" in sys.modules and isinstance(module, sys.modules["torch"].nn.Module):
            from interop.torch_bridge import from_torch

            module = from_torch(module, (1, 1, 1) if jax.device_count() == 1 else None)
        if not isinstance(module, CausalLM):
            raise TypeError(f"{type(self).__name__} wraps a model of tbjax's or transformers', not {module!r}.")
        self.precision = precision or MixedPrecision()
        self.module = module.moved(mesh_of(module, strategy), sharding=strategy)
        held = DTYPES[self.precision.precision][0]
        adopt(self.module, jax.tree.map(lambda a: a.astype(held), self.module))
        with_defaults(self.module, Defaults(precision=self.precision.precision))
        with_defaults(self.module, defaults or Defaults())
        self.gradients: dict[str, jax.Array] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r})"

    def __call__(self, batch: Any = None, attention_mask: Any = None, labels: Any = None, **more: Any) -> "Output":
        """What the model makes of a batch: a mapping with `input_ids`, `labels` and `attention_mask`, or these."""
        if isinstance(batch, Mapping):
            more = {**batch, **more}
        elif batch is not None:
            more["input_ids"] = batch
        more |= {n: v for n, v in (("attention_mask", attention_mask), ("labels", labels)) if v is not None}
        known = ("input_ids", "labels", "attention_mask", "position_ids")
        unknown = [name for name in more if name not in known]
        if unknown or "input_ids" not in more:
            said = f"has {unknown[0]!r}" if unknown else "has no 'input_ids'"
            raise ValueError(f"the batch {said}: it is of {', '.join(known)}.")
        return Output(self, {name: np.asarray(value) for name, value in more.items() if value is not None})

    forward = __call__

    def named_parameters(self) -> Iterator[tuple[str, "Parameter"]]:
        return ((path, Parameter(self, path)) for path in by_path(self.module))

    def parameters(self) -> Iterator["Parameter"]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> "StateDict":
        """The parameters as they are now, by path: later steps do not touch them."""
        return StateDict(self.module)

    def train(self, mode: bool = True) -> "Wrapped":
        """Nothing here runs otherwise in training: there is no dropout."""
        return self

    def eval(self) -> "Wrapped":
        return self


@told_by_name
class FullyShardedDataParallel(Wrapped):
    """FSDP: what `sharding_strategy` says of parameters, gradients and optimizer state is shared out over the devices.

    `device_id` is checked, as a process drives all of its devices. Parameters keep their names and shapes
    (`use_orig_params`).
    """

    def __init__(
        self,
        module: Any,
        *,
        sharding_strategy: ShardingStrategy | str = ShardingStrategy.FULL_SHARD,
        mixed_precision: MixedPrecision | None = None,
        cpu_offload: CPUOffload | None = None,
        device_id: int | None = None,
        use_orig_params: bool = True,
    ) -> None:
        if device_id is not None:
            check_local(device_id, "device_id")
        if not use_orig_params:
            raise ValueError("use_orig_params=False: parameters are not made one flat array here. Leave it out.")
        offload = ("optimizer", "parameters") if cpu_offload and cpu_offload.offload_params else None
        super().__init__(module, ShardingStrategy(sharding_strategy), mixed_precision, Defaults(offload=offload))


@told_by_name
class DistributedDataParallel(Wrapped):
    """DDP: every device has the whole model and its share of the batch.

    `device_ids` are checked. Parameters that a loss does not depend on have gradients of zero, whatever
    `find_unused_parameters` says.
    """

    def __init__(
        self, module: Any, device_ids: list[int] | None = None, *, find_unused_parameters: bool = False
    ) -> None:
        for number in device_ids or []:
            check_local(number, "device_ids")
        super().__init__(module, ShardingStrategy.NO_SHARD)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """One of a wrapped model's parameters, where it lies now."""

    wrapped: Wrapped
    name: str

    @property
    def data(self) -> jax.Array:
        return by_path(self.wrapped.module)[self.name]

    @property
    def grad(self) -> jax.Array | None:
        return self.wrapped.gradients.get(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def numel(self) -> int:
        """How many numbers it has, on all devices together."""
        return self.data.size

    def element_size(self) -> int:
        return self.data.dtype.itemsize


class StateDict(Mapping[str, jax.Array]):
    """A model's parameters by path, as they were when this was made: `model` has these, `source` may have gone on."""

    def __init__(self, source: CausalLM) -> None:
        self.source = source
        self.model = with_arrays(source, by_path(source))
        self._arrays = by_path(self.model)

    def __getitem__(self, path: str) -> jax.Array:
        return self._arrays[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """What a wrapped model makes of a batch, computed when it is asked for."""

    wrapped: Wrapped
    batch: Mapping[str, np.ndarray]

    @property
    def logits(self) -> jax.Array:
        given = (self.batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        return self.wrapped.module(*given)

    @property
    def loss(self) -> "Loss":
        """The mean over all tokens that follow another and have a label (negative ones are none)."""
        if "labels" not in self.batch:
            raise ValueError("a loss needs labels: give `labels`, the tokens themselves and -100 where there are none.")
        return Loss(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """The loss of a batch, times `factor`."""

    output: Output
    factor: float = 1.0

    def __mul__(self, factor: float) -> "Loss":
        return dataclasses.replace(self, factor=self.factor * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Loss":
        return self * (1 / divisor)

    def backward(self) -> None:
        """Add the gradients to those that are there already, if any."""
        wrapped, (_, found) = self.output.wrapped, self._computed
        scaled = {path: gradient * self.factor for path, gradient in found.items()}
        before = wrapped.gradients
        wrapped.gradients = {path: before[path] + g if path in before else g for path, g in scaled.items()}

    def item(self) -> float:
        return float(self._computed[0]) * self.factor

    __float__ = item

    def detach(self) -> "Loss":
        return self

    @functools.cached_property
    def _computed(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its gradients: one program, so one for the price of the other."""
        wrapped = self.output.wrapped
        model, defaults = wrapped.module, wrapped.module.training_defaults or Defaults()
        if defaults.offload:
            raise ValueError(
                f"offload={defaults.offload}: loss.backward() needs parameters and gradients on the devices. "
                "tbjax.train(model.module, data, config) trains with them in the host's memory."
            )
        if wrapped.precision.precision == "float16":
            raise ValueError(
                "param_dtype float16 needs a loss scale, which loss.backward() has not: take bfloat16, or "
                'tbjax.train with precision="float16".'
            )
        return _gradients(model, _batch(self.output.batch), wrapped.precision, defaults.remat or "none")


@functools.partial(jax.jit, static_argnames=("precision", "remat"))
def _gradients(
    model: CausalLM, batch: Batch, precision: MixedPrecision, remat: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    word = precision.precision
    over_devices, _ = reduction(word, precision.reduce_dtype)
    loss, gradients, _ = gradients_of(
        model, batch, dtype=DTYPES[word][1], remat=remat, microbatches=1, over_devices=over_devices
    )
    return loss, gradients


def _batch(given: Mapping[str, np.ndarray]) -> Batch:
    """Each token's target is the label of the next one."""
    labels = given["labels"]
    if labels.shape != given["input_ids"].shape:
        raise ValueError(f"labels are {list(labels.shape)}, input_ids {list(given['input_ids'].shape)}.")
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], axis=1)
    return Batch(*map(_whole, (given["input_ids"], targets, given.get("attention_mask"), given.get("position_ids"))))


def _whole(array: np.ndarray | None) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)


def checkpoint_wrapper(module: Callable[..., Any]) -> Callable[..., Any]:
    """`module`, run again in the backward pass rather than remembered."""
    return jax.checkpoint(module)


def apply_activation_checkpointing(
    model: CausalLM | Wrapped,
    *,
    checkpoint_wrapper_fn: Callable[..., Any] = checkpoint_wrapper,
    check_fn: Callable[[Any], bool] = lambda _: True,
) -> None:
    """Have the layers for which `check_fn` is true run again in the backward pass; the others keep what they computed.

    `check_fn` sees the model's layers (`tbjax.model.Block`) without their numbers. Where it picks some of them, that
    share of the layers is run again, spread evenly.
    """
    if checkpoint_wrapper_fn is not checkpoint_wrapper:
        raise ValueError(f"checkpoint_wrapper_fn={checkpoint_wrapper_fn!r}: layers are wrapped in tbjax's own only.")
    model = model.module if isinstance(model, Wrapped) else model
    layers = [jax.eval_shape(lambda m, n=n: m.layers[n], model) for n in range(len(model.layers))]
    picked = sum(bool(check_fn(layer)) for layer in layers)
    if not picked:
        raise ValueError(
            f"check_fn is true of none of the {len(layers)} layers, which are {type(layers[0]).__name__}s."
        )
    with_defaults(model, Defaults(remat="full" if picked == len(layers) else f"full:{picked / len(layers):g}"))
