"""`limits`: what is no limit is refused, and says so."""

import pytest

from messenger import Limits


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "1"])
def test_a_limit_is_an_integer_of_at_least_1(value: object) -> None:
    with pytest.raises(ValueError, match=r"limits\.queue_msgs_max is .*, it must be an integer of at least 1"):
        Limits(queue_msgs_max=value)  # type: ignore[arg-type]


def test_limits_cannot_be_changed() -> None:
    limits = Limits(message_bytes_max=1)
    with pytest.raises(AttributeError):
        limits.message_bytes_max = 2  # type: ignore[misc]
