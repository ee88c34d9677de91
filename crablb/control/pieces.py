"""What is made of a tap, piece by piece, for a reader who may go at any time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Generic, Self, TypeVar

from crablb.dataplane.tap import Tap

__all__ = ["Pieces"]

T = TypeVar("T")
U = TypeVar("U")


class Pieces(Generic[T]):
    """Pieces of a generator; the tap that it takes from is closed with them, also if none was ever taken.

    Whoever reads no more calls :meth:`aclose`.
    """

    def __init__(self, tap: Tap, made: AsyncGenerator[T, None]) -> None:
        self._tap, self._made = tap, made

    def each(self, make: Callable[[T], U]) -> Pieces[U]:
        """The same, each piece made into another; in place of these."""

        async def pieces() -> AsyncGenerator[U, None]:
            async for piece in self._made:
                yield make(piece)

        return Pieces(self._tap, pieces())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await anext(self._made)
        except BaseException:
            self._tap.close()
            raise

    async def aclose(self) -> None:
        """Idempotent."""
        self._tap.close()
        await self._made.aclose()
