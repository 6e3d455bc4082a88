"""One file an architecture, a registry and shared layers."""

from musicgenre.models.registry import InputLimits, apply_model, build, hyperparameters, register, registered, resolve

__all__ = ["InputLimits", "apply_model", "build", "hyperparameters", "register", "registered", "resolve"]
