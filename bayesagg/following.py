"""Steps that may not be taken: evidence waits for the optimizer that takes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from bayesagg.engine import BayesAgg

__all__ = ["Following", "has_gradients"]


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter has a gradient that is not zero."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return any(g is not None and bool(g.any()) for g in gradients)


class Following:
    """The optimizer that an engine follows, if any; neither keeps the other alive."""

    def __init__(self) -> None:
        self._optimizer: Callable[[], Optimizer | None] | None = None
        self._handle: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type[Following], tuple[()]]:
        return Following, ()  # hooks of an optimizer are not copied with it

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it exists."""
        return None if self._optimizer is None else self._optimizer()

    def start(self, optimizer: Optimizer, engine: BayesAgg) -> None:
        """Have the evidence that waits in ``engine`` counted at every step of ``optimizer``.

        Raises:
            TypeError: if it is no ``torch.optim.Optimizer``.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}: "
                f"pass the one inside of what the trainer hands out."
            )
        if self._handle is not None:
            self._handle.remove()
        owner = weakref.ref(engine)

        def stepped(*_: object) -> None:
            this = owner()
            if this is not None:
                this._commit()

        self._handle = optimizer.register_step_post_hook(stepped)
        self._optimizer = weakref.ref(optimizer)
