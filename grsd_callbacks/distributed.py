"""The processes that measure together: the only user of torch.distributed.

Every method but `alone` and `current` is a collective: all ranks call it, at the same point, whatever happened to them
since the last one. What a rank does in between is wrapped in `together`, so that a failure anywhere is everyone's.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
#: tensors smaller than this are broadcast in one message with their neighbours
_BUCKET_BYTES = 2**22


class RankError(RuntimeError):
    """A rank failed with an error that cannot be sent to the others as it is."""


class ElsewhereError(RuntimeError):
    """This rank is well, but another one failed; who and why is said by `Group.together`."""

    def __init__(self) -> None:
        super().__init__("another rank failed")


class Group:
    """Ranks 0 to size - 1; without torch.distributed one rank for which every collective is the identity.

    Attributes:
        rank, size: this process and how many there are.
        leads: whether this is rank zero.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self._device = device or torch.device("cpu")

    @classmethod
    def current(cls) -> Group:
        """All ranks of torch.distributed's default group, or this process alone where it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        by_nccl = "nccl" in str(dist.get_backend())
        device = torch.device("cuda", torch.cuda.current_device()) if by_nccl else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def leads(self) -> bool:
        """Whether this is rank zero."""
        return self.rank == 0

    def share_of(self, num: int) -> slice:
        """This rank's part of `num` things in a row; parts differ by at most one, the first ranks have more."""
        least, rest = divmod(num, self.size)
        start = self.rank * least + min(self.rank, rest)
        return slice(start, start + least + (self.rank < rest))

    # -- numbers -----------------------------------------------------------------------------------------

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        if self.size == 1:
            return flag
        unset = torch.tensor([not flag], dtype=torch.int64, device=self._device)
        dist.all_reduce(unset)
        return int(unset) == 0

    def sum(self, x: Tensor, *, everywhere: bool = False) -> Tensor:
        """Sum over ranks, on rank zero only (others get a tensor of no meaning) or everywhere; x may be overwritten."""
        if self.size == 1:
            return x
        y = x.detach().to(self._device).contiguous()
        if everywhere:
            dist.all_reduce(y)
        else:
            dist.reduce(y, dst=0)
        return y.to(x.device)

    def integers(self, values: Sequence[int]) -> list[int]:
        """Rank zero's integers (others give as many)."""
        if self.size == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.broadcast(x, src=0)
        return [int(v) for v in x.tolist()]

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        """Rank zero's values, in place, of tensors that have the same shapes and dtypes everywhere."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor.detach())
            if sum(map(_num_bytes, bucket)) >= _BUCKET_BYTES:
                self._overwrite(bucket)
                bucket = []
        if bucket:
            self._overwrite(bucket)

    def _overwrite(self, tensors: list[Tensor]) -> None:
        """As bytes: every dtype alike, bit by bit."""
        if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device == self._device:
            dist.broadcast(tensors[0].reshape(-1).view(torch.uint8), src=0)
            return
        flat = torch.cat([t.to(self._device).contiguous().reshape(-1).view(torch.uint8) for t in tensors])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(tensors, flat.split([_num_bytes(t) for t in tensors])):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    # -- objects -----------------------------------------------------------------------------------------

    def share(self, function: Callable[[], T]) -> T:
        """What rank zero's function returns, on every rank; tensors arrive on the CPU. If it fails, all fail."""
        if self.size == 1:
            return function()
        value, data = self.together(lambda: _with_bytes(function()) if self.leads else (None, b""))
        box = [data]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return value if self.leads else _from_bytes(box[0])  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's object, in rank order, on every rank; tensors arrive on the CPU."""
        return [value] if self.size == 1 else self._gather(self.together(lambda: _with_bytes(value))[1])

    def _gather(self, data: bytes) -> list[Any]:
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, data)
        return [_from_bytes(box) for box in boxes]

    # -- failures ----------------------------------------------------------------------------------------

    def together(self, function: Callable[[], T]) -> T:
        """Run this rank's own work; if it fails on any rank, every rank raises the first failing rank's error.

        The error has the same type everywhere, and its rank as the attribute `rank`, so that what is done about it is
        the same everywhere too. `function` may hold collectives only if it leaves them together with the other ranks.
        """
        if self.size == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        if self.all(error is None):
            return result
        found = self._first_of(error)
        if found is error:
            raise found
        raise found from error

    def _first_of(self, error: Exception | None) -> Exception:
        """The error of the first rank that failed by itself."""
        own = None if error is None or isinstance(error, ElsewhereError) else error
        sent_by = self._gather(_with_bytes(None if own is None else _portable(own, self.rank))[1])
        for rank, sent in enumerate(sent_by):
            if sent is not None:
                found = own if rank == self.rank and own is not None and type(own) is type(sent) else sent
                vars(found)["rank"] = rank
                return found
        return error if error is not None else ElsewhereError()


def failed_rank(error: BaseException) -> int | None:
    """The rank on which an error happened, if it was raised by `Group.together` on several ranks."""
    return getattr(error, "rank", None)


def _portable(error: Exception, rank: int) -> Exception:
    """The error itself if other ranks can rebuild it, else a `RankError` with its text."""
    try:
        copied = pickle.loads(pickle.dumps(error))
        if type(copied) is type(error) and str(copied) == str(error):
            return copied
    except Exception:  # classes of their own with arguments of their own
        pass
    return RankError(f"on rank {rank}: {type(error).__name__}: {error}")


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _with_bytes(value: T) -> tuple[T, bytes]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return value, buffer.getvalue()


def _from_bytes(data: Any) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
