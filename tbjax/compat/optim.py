"""`torch.optim`: the optimizer that the documents name, for a wrapped model (`tbjax.compat.wrapped`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from tbjax.api import CausalLM
from tbjax.compat.wrapped import Parameter
from tbjax.sharding import by_path, with_arrays
from tbjax.training.holding import adopt
from tbjax.training.optimizer import place_state
from tbjax.training.update import Update, apply, lay, norm_of


class AdamW:
    """PyTorch's AdamW, which decays all parameters alike and clips nothing."""

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        chosen = list(params)
        wrapped = {parameter.wrapped for parameter in chosen}
        if len(wrapped) != 1:
            raise ValueError(f"params are of {len(wrapped)} wrapped models: give the parameters() of one.")
        (self.wrapped,) = wrapped
        self.names = frozenset(parameter.name for parameter in chosen)
        self.rule = optax.adamw(lr, *betas, eps=eps, weight_decay=weight_decay)
        self.state: Any = None
        self._update = jax.jit(self._updated)

    def step(self) -> None:
        """Change the parameters by their gradients."""
        model, gradients = self.wrapped.module, self.wrapped.gradients
        if not gradients:
            raise RuntimeError("there are no gradients: call backward() on a loss before step().")
        if self.state is None:
            values = self._chosen(by_path(model))
            placed = place_state(jax.eval_shape(self.rule.init, values), model, model.sharding)
            self.state = jax.jit(self.rule.init, out_shardings=jax.tree.map(lambda a: a.sharding, placed))(values)
        values, self.state = self._update(model, self._chosen(gradients), self.state)
        adopt(model, with_arrays(model, by_path(model) | values))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; there is no other way of having none, whatever `set_to_none` says."""
        self.wrapped.gradients = {}

    def _chosen(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: array for name, array in arrays.items() if name in self.names}

    def _updated(self, model: CausalLM, gradients: dict[str, jax.Array], state: Any) -> Any:
        there = lay(gradients, model, model.sharding.strategy.cuts_optimizer)
        update = Update(self.rule, model, norm_of(there, model), None)
        return apply(update, there, state, self._chosen(by_path(model)), layerwise=False)
