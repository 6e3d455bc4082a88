"""Networks: one file per architecture, a registry and shared layers."""

from musicgenre.models.apply import apply_model, normalise, probabilities
from musicgenre.models.registry import (
    InputLimits,
    build,
    hyperparameters,
    register,
    registered,
    resolve,
)

__all__ = [
    "InputLimits",
    "apply_model",
    "build",
    "hyperparameters",
    "normalise",
    "probabilities",
    "register",
    "registered",
    "resolve",
]
