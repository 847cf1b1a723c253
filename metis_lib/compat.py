"""torchaudio beside a CPU build of torch.

The registry's torchaudio wheel is linked against CUDA.  Beside CPU torch its native library does not
load, and then ``import torchaudio`` fails and with it ``import peft`` and ``import speechbrain``.
What we use of it (resampling, mel spectrograms) is pure Python, so a stub of the module that holds the
native library is enough.  The installed files stay as they are, and where the library loads nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from metis_lib.errors import MetisError

_EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """Import torchaudio, with the stub extension only if the native library does not load.

    Raises:
        MetisError: torchaudio is not installed, or does not import even with the stub.
    """
    if importlib.util.find_spec("torchaudio") is None:
        raise MetisError("torchaudio is not installed; install the extra 'eval' (pip install -e '.[eval]')")
    stub = ModuleType(_EXTENSION)
    stub.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, loader=None)
    vars(stub).update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False)
    vars(stub).update(fail_if_no_align=lambda function: function, _check_cuda_version=lambda: None)
    reason: Exception | None = None
    for replaced in ({}, {_EXTENSION: stub}):
        sys.modules.update(replaced)
        try:
            return importlib.import_module("torchaudio")
        except Exception as error:
            reason = error
            for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
                del sys.modules[name]
    raise MetisError(f"torchaudio does not import beside this torch ({reason}); see constraints.txt") from reason


def is_stubbed() -> bool:
    """Whether torchaudio runs on the stub, without its native library."""
    return _EXTENSION in sys.modules and not getattr(sys.modules[_EXTENSION], "__file__", None)


def prepare_torchaudio() -> None:
    """Call this before importing peft or speechbrain; does nothing where torchaudio is not installed."""
    if importlib.util.find_spec("torchaudio") is not None:
        import_torchaudio()
