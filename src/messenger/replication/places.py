"""The places where a primary may be: asked one after the other, over and over, until one answers as the primary.

Who is asked and is not the primary may name another place, which is asked next; then it goes on where it was. So no
place is left out, whoever names whom.
"""

from collections.abc import Iterable, Sequence

from messenger import Destination, DestinationInvalid

from .limits import DESTINATIONS_MAX


class Places:
    """The places that one replica asks. Changed with the follower's lock held.

    Args:
        destinations: At least one.
    """

    def __init__(self, destinations: Sequence[Destination | str | int]) -> None:
        self._all = [Destination.parse(destination) for destination in destinations]
        self._turn = 0
        # The place that is asked out of turn, because somebody named it.
        self._named: Destination | None = None

    @property
    def all(self) -> list[Destination]:
        """All that are asked."""
        return list(self._all)

    @property
    def current(self) -> Destination:
        """The one that is followed, or asked now."""
        return self._named or self._all[self._turn % len(self._all)]

    def go_on(self) -> None:
        """Ask another one next."""
        if self._named is None:
            self._turn += 1
        self._named = None

    def add(self, texts: Iterable[str], *, is_first: bool = True) -> int:
        """Take in places that somebody named, as far as there is room; return how many are none.

        Args:
            is_first: Whether to ask the last of them next, also if it was known. Not where a place that was itself
                asked out of turn names another: two that name each other would be asked for ever.
        """
        malformed_count = 0
        for text in texts:
            try:
                place = Destination.parse(text)
            except DestinationInvalid:
                malformed_count += 1
                continue
            is_known = place in self._all
            if not is_known:
                if len(self._all) >= DESTINATIONS_MAX:
                    break
                self._all.append(place)
            if is_first or not is_known:
                self._named = place
        return malformed_count

    @property
    def is_out_of_turn(self) -> bool:
        """Whether the one that is asked now was named by another."""
        return self._named is not None
