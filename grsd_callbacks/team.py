"""One measurement by several ranks: rank zero runs the program, the others do their part of each product.

Rank zero measures as if it were alone, with an operator whose products and exact kernel are commands to all ranks
(`SharedOperator`). The others wait for the next command and never decide anything, so that times, rounding and
eigensolvers may differ between ranks without their parting ways. A session is the same on every rank:

    make the operator, agree;  enter the guards, agree;  copies of rank zero;  commands ... stop;  agree

and so is a command: receive, agree, compute, agree, add up. A rank whose own work fails says so at the next agreement,
all leave the command together, rank zero ends the session, and every rank sees the same error.

Letters: n samples, C outputs, m = n C, P parameters; rank r holds the samples of `Group.share_of(n)`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grsd_callbacks.distributed import ElsewhereError, Group
from grsd_callbacks.gram import Gram
from grsd_callbacks.gram.checks import total_tolerance
from grsd_callbacks.gram.division import partial_gram
from grsd_callbacks.gram.verified import forget
from grsd_callbacks.kernel import FORWARD_PATHS, NTKOperator
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import take

T = TypeVar("T")
_STOP, _VJP, _JVP, _PRODUCT, _GRAM, _FORGET, _OUTPUTS = range(7)
#: a message is a command, a number, and a vector v of m numbers
_HEAD = 2


class SharedOperator(NTKOperator):
    """J J^T on a probe that all ranks hold: samples are divided for products, terms for the exact kernel.

    To be made on every rank alike, and used inside `Team.session`: on rank zero like any operator, by `serve` on the
    others.

    Cost: a product sends v and one vector of P numbers over the ranks (J^T v: to rank zero; J w: from it; M v: summed
        on all), the exact kernel m x m float64. Each rank works on its share of the samples.

    Accuracy: sums over samples are split into one sum a rank: equal to one process to rounding.
    """

    def __init__(self, group: Group, rows: int, model: nn.Module, inputs: Any, **options: Any) -> None:
        super().__init__(model, inputs, **options)
        self.group = group
        self.samples = group.share_of(self.num_samples)
        self.local: NTKOperator | None = None
        if self.samples.stop > self.samples.start:
            self.local = NTKOperator(model, take(inputs, self.samples, self.num_samples), **options)
            self.local.function = self.function  # the same copies
        wide = wide_dtype(self.device)
        self._message = torch.zeros(_HEAD + rows, dtype=wide, device=self.device)  # command and v
        self._sum = torch.zeros(max(rows, self.num_parameters) + 1, dtype=self.dtype, device=self.device)
        self._vector = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        width = rows // self.num_samples
        self._rows = slice(self.samples.start * width, self.samples.stop * width)
        self.error: Exception | None = None
        self.in_command = False
        self.is_shared = False

    # -- rank zero: as any operator ----------------------------------------------------------------------

    @property
    def outputs(self) -> Tensor:
        """f on the whole probe, detached, shape (n, ...)."""
        if self._outputs is None:
            found = super().outputs
            super().release()  # products use the parts' graphs
            return found
        return self._outputs

    def choose_forward(self, *, timed: bool = True) -> str:
        """The path for J w, chosen on rank zero's samples; the others follow."""
        assert self.local is not None
        path = self.local.choose_forward(timed=timed)
        self.plan = self.local.plan
        return path

    def adopt(self, plan: ProductPlan) -> None:
        """Take what was found on the same model and probe before."""
        super().adopt(plan)
        if self.local is not None:
            self.local.adopt(plan)

    def release(self) -> None:
        """Drop the retained graphs."""
        super().release()
        if self.local is not None:
            self.local.release()

    def vjp(self, V: Tensor) -> Tensor:
        """J^T V, on rank zero."""
        return self._commanded(_VJP, self._vectors(V, self.shape[0], "V"), 0.5)

    def jvp(self, W: Tensor) -> Tensor:
        """J W, on rank zero."""
        return self._commanded(_JVP, self._vectors(W, self.num_parameters, "W"), 0.5)

    def __matmul__(self, V: Tensor) -> Tensor:
        return self._commanded(_PRODUCT, self._vectors(V, self.shape[0], "V"), 1.0)

    def _commanded(self, code: int, V: Tensor, products: float) -> Tensor:
        path = 0 if code == _VJP else FORWARD_PATHS.index(self.choose_forward())
        parts = []
        for column in V.reshape(len(V), -1).unbind(1):
            parts.append(self._command(code, path, column))
            self.num_products += products
        return parts[0] if V.dim() == 1 else torch.stack(parts, dim=1)

    def exact_gram(self, *, memory_limit: int | None = None) -> Gram:
        """The exact kernel, terms divided over ranks; by rank zero alone where the parts do not fit or fail the check.

        Cost: see `partial_gram`; one sum of m x m float64 over ranks.
        """
        limit = memory_limit or self.gram_memory
        while True:
            limits, gram = self._command(_GRAM, limit)
            if gram is not None or min(limits) >= limit:
                break
            limit = min(limits)  # memory ran out somewhere: the same terms for everyone
        if gram is not None and gram.check_gap <= total_tolerance(self.dtype, self.gram_dtype):
            return gram
        self._command(_FORGET)  # what ranks remember of the model's graphs may be out of date, or differ
        return super().exact_gram(memory_limit=memory_limit)

    def divides(self) -> bool:
        """Whether the outputs of the parts, each by its rank, are those of the whole probe."""
        whole = self.outputs
        parts = self._command(_OUTPUTS).view_as(whole)
        eps = torch.finfo(whole.dtype).eps
        return torch.allclose(whole, parts, rtol=100 * eps**0.5, atol=eps**0.5, equal_nan=True)

    def _command(self, code: int, number: int = 0, vector: Tensor | None = None) -> Any:
        self.in_command = True
        self._message[0], self._message[1] = code, number
        if vector is not None and code != _JVP:
            self._message[_HEAD:] = vector
        self.group.overwrite([self._message])
        result = self._execute(code, number, vector)
        self.in_command = False
        return result.clone() if isinstance(result, Tensor) else result

    def stop(self) -> None:
        """End `serve` on the other ranks; without effect in the middle of a command, which only a dying run leaves."""
        if not self.in_command:
            self._message[0] = _STOP
            self.group.overwrite([self._message])

    # -- the other ranks ---------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take part in rank zero's commands until it stops.

        Raises:
            Exception: what this rank's own work ended with, after rank zero has stopped.
        """
        while True:
            self.group.overwrite([self._message])
            code, number = (int(x) for x in self._message[:_HEAD].tolist())
            if code == _STOP:
                break
            with suppress(ElsewhereError):
                self._execute(code, number)
        if self.error is not None:
            raise self.error

    # -- all ranks ---------------------------------------------------------------------------------------

    def share_copies(self) -> None:
        """Rank zero's parameters and buffers in everyone's copies, once: running statistics differ between ranks."""
        if self.is_shared:
            return
        self.is_shared = True
        with torch.no_grad():
            self.group.overwrite([t for t in self.function.copies if t.layout == torch.strided])

    def _execute(self, code: int, number: int, vector: Tensor | None = None) -> Any:
        if code == _GRAM:
            return self._gram(number)
        if code == _FORGET:
            return forget(self.function)
        rows = len(self._message) - _HEAD
        if code == _OUTPUTS:
            return self._added(rows, self._rows, lambda op: op.outputs.reshape(-1))
        if code == _JVP:
            if vector is not None:
                self._vector.copy_(vector)
            self.group.overwrite([self._vector])
        else:
            own = slice(_HEAD + self._rows.start, _HEAD + self._rows.stop)
            pulled = self._added(
                self.num_parameters, slice(None), lambda op: op.vjp(self._message[own]), everywhere=code == _PRODUCT
            )
            if code == _VJP:
                return pulled
            self._vector.copy_(pulled)
        return self._added(rows, self._rows, lambda op: _along(op, number, self._vector))

    def _added(
        self, length: int, where: slice, part: Callable[[NTKOperator], Tensor], everywhere: bool = False
    ) -> Tensor:
        """Sum over ranks of vectors that each fills `where` it has something, in memory that the next sum will take.

        One number more than they hold says whether a rank has failed.

        Raises:
            Exception: this rank's own failure, on rank zero; `ElsewhereError` where another rank's is seen.
        """
        total, error = self._sum[: length + 1], None
        total.zero_()
        try:
            if self.local is not None:
                total[:length][where] = part(self.local)
        except Exception as caught:
            error = caught
            self.error = self.error or caught
            total[length] = 1.0
        total = self.group.sum(total, everywhere=everywhere)
        if (everywhere or self.group.leads) and float(total[length]) > 0:
            self.in_command = False  # all ranks have left the command
            raise error if error is not None and self.group.leads else ElsewhereError()
        return total[:length]

    def _step(self, function: Callable[[], T]) -> T:
        """This rank's own work; all ranks leave the command here if it fails on one of them."""
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:
            error = caught
            self.error = self.error or caught
        if self.group.all(error is None):
            return result
        self.in_command = False
        raise error if error is not None and self.group.leads else ElsewhereError()

    def _gram(self, limit: int) -> tuple[list[int], Gram | None]:
        """The memory limit that each rank kept, and the kernel if all have planned the same parts."""
        group = self.group
        options: dict[str, Any] = {"memory_limit": limit, "sums": self.gram_dtype}
        part = self._step(lambda: partial_gram(self.function, self.inputs, group.rank, group.size, **options))
        plans = group.gather((part.plan, part.memory_limit))
        fits = plans[0][0] is not None and all(plan == plans[0] for plan in plans)
        return [kept for _, kept in plans], part.total(group.sum(part.matrix)) if fits else None


def _along(op: NTKOperator, path: int, w: Tensor) -> Tensor:
    """J w by the path that rank zero has chosen."""
    op.adopt(replace(op.plan, path=FORWARD_PATHS[path]))
    return op.jvp(w)


class Team:
    """The ranks behind one monitor.

    Attributes:
        group: the ranks.
        divided: whether measurements are divided; else rank zero does all the work and the others wait.
        reason: why they are not.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.divided = group.size > 1
        self.rows = 0
        self._plan = ProductPlan()  # what this rank has found out about its samples
        self.reason = ""

    @property
    def leads(self) -> bool:
        """Whether this rank runs the program, writes and warns."""
        return self.group.leads

    def operator(self, model: nn.Module, inputs: Any, **options: Any) -> NTKOperator:
        """The operator to measure with."""
        if self.divided:
            made = SharedOperator(self.group, self.rows, model, inputs, **options)
            made.adopt(self._plan)
            return made
        return NTKOperator(model, inputs, **options)

    def session(self, make: Callable[[], NTKOperator], lead: Callable[[NTKOperator], T]) -> tuple[Any, Any]:
        """One piece of work with an operator made on every rank: the operator and the result, None but on rank zero.

        Raises:
            Exception: the first failing rank's error, on every rank.
        """
        op = self.group.together(make if self.divided or self.leads else _nothing)
        return op, self.group.together(lambda: self._run(op, lead))

    def _run(self, op: NTKOperator | None, lead: Callable[[NTKOperator], T]) -> T | None:
        if not isinstance(op, SharedOperator):
            return None if op is None else lead(op)
        entered = False

        def inside() -> Any:
            nonlocal entered
            entered = True
            if not self.group.all(True):
                raise ElsewhereError
            op.error = None
            op.share_copies()
            if not self.leads:
                return op.serve()
            try:
                return lead(op)
            finally:
                op.stop()

        try:
            return op.run(inside)
        except Exception:
            if not entered:
                self.group.all(False)
            raise
        finally:
            self._plan = op.plan if op.local is None else op.local.plan

    def settle(self, model: nn.Module, inputs: Any, **options: Any) -> None:
        """Find out once whether the samples of this model can be divided over ranks.

        Raises:
            ValueError: the ranks do not train the same model.
        """
        if self.group.size == 1:
            return
        self.divided, self.reason = True, ""
        self.rows = self.group.share(lambda: NTKOperator(model, inputs, **options).shape[0])
        made = self.group.together(lambda: self.operator(model, inputs, **options))
        layouts = self.group.gather([(tuple(t.shape), str(t.dtype)) for t in made.function.copies])
        other = next((rank for rank, layout in enumerate(layouts) if layout != layouts[0]), None)
        if other is not None:
            raise ValueError(
                f"the model on rank {other} has other parameters or buffers than on rank 0; measure the same model on "
                "every rank, or give distributed=False on the one that measures"
            )
        try:
            _, same = self.session(lambda: made, lambda op: isinstance(op, SharedOperator) and op.divides())
            same = self.group.share(lambda: bool(same)) and not made.function.interacting
            self.reason = "" if same else "samples are not independent of each other"
        except Exception as error:  # the same on every rank
            self.reason = f"the model does not run on a part of the probe: {str(error).splitlines()[0][:100]}"
        self.divided = not self.reason

    def forget(self) -> None:
        """The model is another one than before: find out anew how to compute its products."""
        self._plan = ProductPlan()

    def describe(self) -> str:
        """One line for the report; empty where there is one rank."""
        size = self.group.size
        if size == 1:
            return ""
        if not self.divided:
            return f"rank 0 of {size} measures, the others wait ({self.reason})"
        return f"{size}: samples of the probe for products, terms of the exact kernel; rank 0 decides and writes"


def _nothing() -> None:
    """What a rank makes that only waits."""
