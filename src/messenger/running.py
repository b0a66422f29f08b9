"""Callbacks that go on after they have returned, as coroutines do: what of a session counts as processed meanwhile."""


class Running:
    """The messages of one session whose callbacks go on. They begin in the order of the messages and end in any."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._returned_through = 0

    def __bool__(self) -> bool:
        return bool(self._counts)

    def begin(self, number: int) -> None:
        """Note that a callback of a message goes on; a message may have two."""
        self._counts[number] = self._counts.get(number, 0) + 1

    def end(self, number: int) -> int:
        """Note that one has ended; return up to which number all are processed now, as far as is known."""
        left = self._counts.get(number, 1) - 1
        if left:
            self._counts[number] = left
            return self.limit(self._returned_through)
        return self.let_go(number)

    def let_go(self, number: int) -> int:
        """Count a message as processed though its callbacks go on; return what `end` returns."""
        self._counts.pop(number, None)
        return self.limit(self._returned_through)

    def limit(self, returned_through: int) -> int:
        """Note up to which number all callbacks have returned; return up to which none of them goes on."""
        self._returned_through = max(returned_through, self._returned_through)
        if not self._counts:
            return self._returned_through
        return min(self._returned_through, next(iter(self._counts)) - 1)
