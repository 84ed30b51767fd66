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
from grsd_callbacks.gram import ROW_MEMORY, Gram
from grsd_callbacks.gram.checks import TOTAL_TOLERANCE
from grsd_callbacks.gram.division import partial_gram
from grsd_callbacks.kernel import FORWARD_PATHS, NTKOperator
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import take

T = TypeVar("T")
_STOP, _VJP, _JVP, _PRODUCT, _GRAM, _OUTPUTS = range(6)
#: bytes of parameter-sized vectors that a product over ranks holds at a time
VECTOR_MEMORY = 2**28


class SharedOperator(NTKOperator):
    """J J^T on a probe that all ranks hold: samples are divided for products, terms for the exact kernel.

    To be made on every rank alike, and used inside `Team.session`: on rank zero like any operator, by `serve` on the
    others.

    Cost: a product sends v and one vector of P numbers over the ranks (J^T v: to rank zero; J w: from it; M v: summed
        on all), the exact kernel m x m float64. Each rank works on its share of the samples.

    Accuracy: sums over samples are split into one sum a rank: equal to one process to rounding.
    """

    def __init__(self, group: Group, model: nn.Module, inputs: Any, **options: Any) -> None:
        super().__init__(model, inputs, **options)
        self.group = group
        self.samples = group.share_of(self.num_samples)
        self.local: NTKOperator | None = None
        if self.samples.stop > self.samples.start:
            self.local = NTKOperator(model, take(inputs, self.samples, self.num_samples), **options)
            self.local.function = self.function  # the same copies
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
        columns = V.reshape(len(V), -1)
        width = max(1, VECTOR_MEMORY // (self.num_parameters * columns.element_size()))
        parts = []
        for part in columns.split(width, dim=1):
            parts.append(self._command(code, part.shape[1], path, part.contiguous()))
            self.num_products += products * part.shape[1]
        return torch.cat(parts, dim=1).reshape(-1, *V.shape[1:])

    def exact_gram(self, *, memory_limit: int | None = None) -> Gram:
        """The exact kernel, terms divided over ranks; by rank zero alone where the parts do not fit or fail the check.

        Cost: see `partial_gram`; one sum of m x m float64 over ranks.
        """
        limit = memory_limit or ROW_MEMORY
        while True:
            limits, gram = self._command(_GRAM, limit, 0)
            if gram is not None or min(limits) >= limit:
                break
            limit = min(limits)  # memory ran out somewhere: the same terms for everyone
        if gram is not None and gram.check_gap <= TOTAL_TOLERANCE.get(self.dtype, 1e-4):
            return gram
        return super().exact_gram(memory_limit=memory_limit)

    def divides(self) -> bool:
        """Whether the outputs of the parts, each by its rank, are those of the whole probe."""
        whole = self.outputs
        parts = self._command(_OUTPUTS, 0, 0).view_as(whole)
        eps = torch.finfo(whole.dtype).eps
        return torch.allclose(whole, parts, rtol=100 * eps**0.5, atol=eps**0.5, equal_nan=True)

    def _command(self, code: int, number: int, path: int, payload: Tensor | None = None) -> Any:
        self.in_command = True
        self.group.integers([code, number, path, self.shape[0]])
        result = self._execute(code, number, path, self.shape[0], payload)
        self.in_command = False
        return result

    def stop(self) -> None:
        """End `serve` on the other ranks; without effect in the middle of a command, which only a dying run leaves."""
        if not self.in_command:
            self.group.integers([_STOP, 0, 0, 0])

    # -- the other ranks ---------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take part in rank zero's commands until it stops.

        Raises:
            Exception: what this rank's own work ended with, after rank zero has stopped.
        """
        while True:
            code, number, path, m = self.group.integers([0] * 4)
            if code == _STOP:
                break
            with suppress(ElsewhereError):
                self._execute(code, number, path, m)
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

    def _execute(self, code: int, number: int, path: int, m: int, payload: Tensor | None = None) -> Any:
        if code == _GRAM:
            return self._gram(number)
        if code == _OUTPUTS:
            return self.group.sum(self._step(lambda: self._spread(m, lambda op: op.outputs.reshape(-1, 1))))
        rows = self.num_parameters if code == _JVP else m
        V = self._step(lambda: self._empty(rows, number) if payload is None else payload)
        self.group.overwrite([V])
        if code == _JVP:
            return self.group.sum(self._step(lambda: self._jvp_part(V, path, m)))
        W = self.group.sum(self._step(lambda: self._vjp_part(V, m)), everywhere=code == _PRODUCT)
        if code == _VJP:
            return W
        return self.group.sum(self._step(lambda: self._jvp_part(W, path, m)))

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

    def _vjp_part(self, V: Tensor, m: int) -> Tensor:
        if self.local is None:
            return torch.zeros(self.num_parameters, V.shape[1], dtype=self.dtype, device=self.device)
        return self.local.vjp(V[self._rows(m)])

    def _jvp_part(self, W: Tensor, path: int, m: int) -> Tensor:
        def part(op: NTKOperator) -> Tensor:
            op.adopt(replace(op.plan, path=FORWARD_PATHS[path]))
            return op.jvp(W)

        return self._spread(m, part, W.shape[1])

    def _spread(self, m: int, part: Callable[[NTKOperator], Tensor], width: int = 1) -> Tensor:
        """This rank's rows of an (m, width) matrix, zero elsewhere: the ranks' matrices add up to the whole."""
        whole = torch.zeros(m, width, dtype=self.dtype, device=self.device)
        if self.local is not None:
            whole[self._rows(m)] = part(self.local)
        return whole

    def _rows(self, m: int) -> slice:
        C = m // self.num_samples
        return slice(self.samples.start * C, self.samples.stop * C)

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self.device)

    def _gram(self, limit: int) -> tuple[list[int], Gram | None]:
        """The memory limit that each rank kept, and the kernel if all have planned the same parts."""
        group = self.group
        part = self._step(lambda: partial_gram(self.function, self.inputs, group.rank, group.size, memory_limit=limit))
        plans = group.gather((part.plan, part.memory_limit))
        fits = plans[0][0] is not None and all(plan == plans[0] for plan in plans)
        return [kept for _, kept in plans], part.total(group.sum(part.matrix)) if fits else None


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
        self.reason = ""

    @property
    def leads(self) -> bool:
        """Whether this rank runs the program, writes and warns."""
        return self.group.leads

    def operator(self, model: nn.Module, inputs: Any, **options: Any) -> NTKOperator:
        """The operator to measure with."""
        if self.divided:
            return SharedOperator(self.group, model, inputs, **options)
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

    def settle(self, make: Callable[[], NTKOperator]) -> None:
        """Find out once whether the samples of this model can be divided over ranks."""
        if not self.divided:
            return
        try:
            _, same = self.session(make, lambda op: isinstance(op, SharedOperator) and op.divides())
            self.reason = "" if self.group.share(lambda: same) else "samples are not independent of each other"
        except Exception as error:  # the same on every rank
            self.reason = f"the model does not run on a part of the probe: {str(error).splitlines()[0][:100]}"
        self.divided = not self.reason

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
