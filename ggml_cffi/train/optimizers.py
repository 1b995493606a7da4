"""Optimizers: forward, backward and the optimizer's step in one graph, on any devices.

The steps are ggml's own (``ggml_opt_step_adamw``, ``ggml_opt_step_sgd``). ggml's ``ggml_opt`` around them is not used:
it ends the process when memory runs out, holds 2048 nodes at most, and keeps its inputs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import ops
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.train.gradients import gradients


class Optimizer(Closing):
    """An optimizer, which makes a loss smaller step by step; base of :class:`AdamW` and :class:`SGD`.

    Parameters
    ----------
    scheduler
        The scheduler that computes the steps. It is not closed with the optimizer.
    loss
        One F32 element.
    params
        Weights to fit: contiguous F32 tensors with memory (``Context.alloc``), on any devices of the scheduler.
    outputs
        Further tensors to read after a step. Their values are those before the step.

    Raises
    ------
    ValueError
        If a parameter is not contiguous F32 with memory, or the loss does not depend on it.
    UnsupportedOpError
        If an operation on the way has no gradient.
    """

    n_state = 0
    """Number of state tensors per weight, each of the weight's size."""

    def __init__(
        self, scheduler: Scheduler, loss: Tensor, params: Sequence[Tensor], outputs: Sequence[Tensor] = ()
    ) -> None:
        self.scheduler, self.loss, self.params = scheduler, loss, tuple(params)
        self.steps_done = 0
        """Steps since the start or the last :meth:`reset`."""
        self._ctx = Context()
        try:
            for p in self.params:
                if not p.is_allocated:
                    raise ValueError(f"{p!r} has no memory: use Context.alloc before the optimizer is made")
            self._state = [[self._zeros(p) for _ in range(self.n_state)] for p in self.params]
            self._numbers = self._ctx.new_tensor(Type.F32, (len(self._settings()),), name="optimizer")
            found = gradients(loss, self.params, ctx=self._ctx)
            steps = [self._step(p, g, state) for p, g, state in zip(self.params, found, self._state, strict=True)]
            # The steps come last: no weight may be written before all gradients that need it are computed.
            self.graph = Graph(loss, *outputs, *found, *steps)
            """The graph of a step."""
        except BaseException:
            self._ctx.close()
            raise

    def _zeros(self, p: Tensor) -> Tensor:
        kind = p.buffer_type
        assert kind is not None
        t = self._ctx.new_tensor(Type.F32, p.shape)
        self._ctx.alloc(kind, [t])
        return t

    def _settings(self) -> list[float]:
        """Return the hyperparameters that ggml takes for the next step."""
        raise NotImplementedError

    def _step(self, p: Tensor, grad: Tensor, state: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def step(self) -> float:
        """Compute loss and gradients for the current inputs, and change the weights.

        Returns
        -------
        float
            The loss before the change.
        """
        with self.scheduler.lock:
            self.alloc()
            self._numbers.set(self._settings())
            self.scheduler.compute(self.graph)
            self.steps_done += 1
            return float(self.loss.numpy().reshape(()))

    def alloc(self) -> None:
        """Allocate the inputs, so that they can be set. Otherwise the first :meth:`step` allocates them."""
        if self.scheduler.graph is not self.graph:
            self.scheduler.alloc(self.graph)

    def reset(self) -> None:
        """Clear the optimizer's state from earlier steps."""
        self.steps_done = 0
        for state in self._state:
            for t in state:
                t.set(t.numpy() * 0)

    def close(self) -> None:
        """Release the graph and the state. The weights stay."""
        if self.scheduler.graph is self.graph and not self.scheduler.closed:
            self.scheduler.reset()
        self.graph.close()
        self._ctx.close()


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Parameters
    ----------
    lr
        Learning rate, above 0. This and the other settings may be changed between steps.
    betas
        Decay rates of the running means of the gradient and of its square, 0 to below 1.
    eps
        Added to the root of the mean square.
    weight_decay
        Fraction of each weight that is subtracted per unit of ``lr``, 0 to 1.

    Others as :class:`Optimizer`. C: ``ggml_opt_step_adamw``. Source: Loshchilov & Hutter, Decoupled Weight Decay
    Regularization, 2019.
    """

    n_state = 2

    def __init__(
        self,
        scheduler: Scheduler,
        loss: Tensor,
        params: Sequence[Tensor],
        outputs: Sequence[Tensor] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps_done = 0
        super().__init__(scheduler, loss, params, outputs)

    def _settings(self) -> list[float]:
        _check_settings(self.lr, self.weight_decay)
        beta1, beta2 = self.betas
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1) or not self.eps >= 0:
            raise ValueError(f"betas must be 0 to below 1 and eps at least 0, not {self.betas} and {self.eps}")
        t = self.steps_done + 1
        corrections = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
        return [self.lr, beta1, beta2, self.eps, self.weight_decay, *corrections]

    def _step(self, p: Tensor, grad: Tensor, state: list[Tensor]) -> Tensor:
        m, v = state
        return ops.opt_step_adamw(p, grad, m, v, self._numbers)


class SGD(Optimizer):
    """Gradient descent: ``w = (1 - lr * weight_decay) * w - lr * gradient``.

    Parameters as for :class:`AdamW`. C: ``ggml_opt_step_sgd``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        loss: Tensor,
        params: Sequence[Tensor],
        outputs: Sequence[Tensor] = (),
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        super().__init__(scheduler, loss, params, outputs)

    def _settings(self) -> list[float]:
        _check_settings(self.lr, self.weight_decay)
        return [self.lr, self.weight_decay]

    def _step(self, p: Tensor, grad: Tensor, _state: list[Any]) -> Tensor:
        return ops.opt_step_sgd(p, grad, self._numbers)


def _check_settings(lr: float, weight_decay: float) -> None:
    if not lr > 0 or not 0 <= weight_decay <= 1:
        raise ValueError(f"lr must be above 0 and weight_decay 0 to 1, not {lr} and {weight_decay}")
