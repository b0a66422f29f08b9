"""Every exception of the models: what the caller can mend, and what became of one call."""

from messenger import MessengerError, NotDelivered, OutcomeUnknown


class ModelError(MessengerError):
    """Base of every error of this package."""


class CommandFailed(ModelError):
    """A server answered that it could not do what it was asked; the text is the server's."""


class BadAnswer(ModelError):
    """What a server answered is not of the protocol. Whether the command ran is unknown."""


class ServerLost(ModelError, OutcomeUnknown):
    """The server's process ended, or it was lost, before it answered. The command may have run."""

    def __init__(self, text: str) -> None:
        super().__init__(text, 0)


class NoServer(ModelError, NotDelivered):
    """No server was there to take the command before its deadline. It certainly did not run."""

    def __init__(self, text: str) -> None:
        super().__init__(text, 0)


class Overloaded(ModelError):
    """More is waiting than can be answered in time. The call did not run.

    Attributes:
        retry_after_s: Seconds after which a retry has a chance.
    """

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class ModelFileInvalid(ModelError, ValueError):
    """A model's file or manifest is not what it should be. Nothing of it was loaded."""


class TrainingDataInvalid(ModelError, ValueError):
    """The data cannot be read, or no model can be trained on it."""


class ManagerStopped(ModelError, NotDelivered):
    """The manager is stopped. The command did not run."""

    def __init__(self, text: str) -> None:
        super().__init__(text, 0)


class TrainingCancelled(CommandFailed):
    """The training was cancelled. Its job ends as cancelled; this error is only how a server says so."""


class JobUnknown(CommandFailed):
    """The server has no such job; another one may have it."""


# What a server or a manager may say in the field `kind` of an answer.
_BY_KIND: dict[str, type[ModelError]] = {
    kind.__name__: kind
    for kind in (
        ModelFileInvalid,
        TrainingDataInvalid,
        TrainingCancelled,
        JobUnknown,
        ServerLost,
        NoServer,
        ManagerStopped,
        BadAnswer,
    )
}


def error_of(kind: str, text: str, retry_after_s: float) -> ModelError:
    """Return the error that an answer without success tells of."""
    if kind == Overloaded.__name__:
        return Overloaded(text, retry_after_s)
    return _BY_KIND.get(kind, CommandFailed)(text)
