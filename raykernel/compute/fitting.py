"""Pieces of work that fit the memory: as estimated, and halved where it runs out all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from raykernel.compute import memory, process
from raykernel.config import ComputeConfig
from raykernel.errors import OutOfMemoryError, is_out_of_memory
from raykernel.ntk.product import ProductBytes

SizeT = TypeVar("SizeT")
FoundT = TypeVar("FoundT")


class Fitting(Generic[SizeT]):
    """The size of pieces, halved for good whenever memory runs out.

    Args:
        size: as estimated.
        smaller: the size below one; of the smallest, that itself.
        compute: memory and device.

    Attributes:
        size: of the pieces from now on.
        halved: times that memory ran out so far.
    """

    def __init__(
        self, size: SizeT, smaller: Callable[[SizeT], SizeT], compute: ComputeConfig
    ) -> None:
        self.size = size
        self.halved = 0
        self._smaller = smaller
        self._compute = compute

    def run(
        self,
        work: Callable[[SizeT], FoundT],
        *,
        doing: str,
        lower: str,
        forget: Callable[[], object] = lambda: None,
    ) -> FoundT:
        """Do some work, again in smaller pieces if memory runs out.

        Args:
            work: of pieces of a size.
            doing: what it does in the smallest pieces, for the message.
            lower: settings that need less memory, for the message.
            forget: frees what is kept of larger pieces.

        Returns:
            What the work returned.

        Raises:
            OutOfMemoryError: if memory runs out in the smallest pieces.
        """
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if (smaller := self._smaller(self.size)) == self.size:
                    raise OutOfMemoryError(
                        f"Memory ran out {doing}. Expected {self._compute.memory_gb:g} GiB for "
                        f"this worker (compute.memory_gb). Free memory, or lower {lower}."
                    ) from error
            # Outside the handler: its traceback would keep the tensors of the failed attempt.
            self.size = smaller
            self.halved += 1
            forget()
            process.release(self._compute.device)


def fitting_batch(held: int, product: ProductBytes, compute: ComputeConfig) -> Fitting[int]:
    """Examples of a pass of J w and Jᵀ α; the number follows from the spec alone.

    Args:
        held: bytes of the model, and of what is held beside it.
        product: bytes of a product.
        compute: memory and largest batch.

    Returns:
        The batch size.
    """
    return Fitting(memory.product_batch(held, product, compute), half, compute)


def half(batch: int) -> int:
    """The number of examples below one; of one, that itself."""
    return max(1, batch // 2)
