"""Trains and serves models in supervised processes, over the Messenger. The extra is `[models]`."""

from .client import ModelClient
from .errors import (
    BadAnswer,
    CommandFailed,
    ManagerStopped,
    ModelError,
    ModelFileInvalid,
    NoServer,
    Overloaded,
    ServerLost,
    TrainingDataInvalid,
)
from .jobs import Inference, Job, Progress, Training
from .manager import ModelServerManager
from .peers import ManagerStatus, ServerStatus
from .store import Listed, Manifest

__all__ = [
    "BadAnswer",
    "CommandFailed",
    "Inference",
    "Job",
    "Listed",
    "ManagerStatus",
    "ManagerStopped",
    "Manifest",
    "ModelClient",
    "ModelError",
    "ModelFileInvalid",
    "ModelServerManager",
    "NoServer",
    "Overloaded",
    "Progress",
    "ServerLost",
    "ServerStatus",
    "Training",
    "TrainingDataInvalid",
]
