"""Metis Workbench: masked generative speech models with one pre-trained backbone and five tasks.

``from metis_lib import Metis; Metis.from_pretrained("nano").enhance("noisy.wav")``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metis_lib.audio import Speech as Speech
    from metis_lib.errors import MetisError as MetisError
    from metis_lib.pipeline import Metis as Metis

__version__ = "0.1.0"
__all__ = ["Metis", "MetisError", "Speech", "__version__"]

_HOMES = {"Metis": "metis_lib.pipeline", "Speech": "metis_lib.audio", "MetisError": "metis_lib.errors"}


def __getattr__(name: str) -> Any:
    """Import the public names at first use, so that ``import metis_lib`` costs nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
