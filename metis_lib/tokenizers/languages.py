"""What the languages other than English and Chinese need before and instead of espeak-ng; rules in languages.json."""

from __future__ import annotations

import importlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError

PUNCTUATION = ",.?!;:'…"
LANGUAGES = ("en", "zh", "de", "fr", "ja", "ko")
PACKAGES = {"pyopenjtalk": "pyopenjtalk-plus"}
"""Module to the package that carries it, where the names differ."""


@lru_cache(maxsize=1)
def rules() -> dict[str, Any]:
    """The tables of languages.json."""
    return json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))


def needed(module: str, purpose: str) -> Any:
    """A module of the extra ``languages``; MetisError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = PACKAGES.get(module, module)
        raise MetisError(f"{purpose} needs the package {name}: pip install {name} ({error})") from error


def detect_language(text: str) -> str:
    """The language of a text by langid, one of LANGUAGES; anything else counts as English, as released.

    Short texts are often mistaken ("e-mail me at home" is Danish): say the language where it is known.
    """
    found = needed("langid", "telling the language").classify(text)[0]
    return found if found in LANGUAGES else "en"


def normalise(text: str, language: str) -> str:
    """German, French or Korean text as espeak-ng should read it: abbreviations, letters and symbols replaced."""
    own = rules()["espeak"][language]
    names, letters = own.get("abbreviations", {}), own.get("letters", {})
    if names:
        pattern = rf"\b({'|'.join(map(re.escape, names))})(?!\w)\.?"
        text = re.sub(pattern, lambda m: names.get(m[1].lower(), m[0]), text, flags=re.IGNORECASE)
    for name in own.get("rules", ()):
        for pattern, replacement in rules()["rules"][name]:
            text = re.sub(pattern, replacement, text)
    if letters:  # short words in capitals are spelled: KBS; longer ones are left to espeak-ng
        pattern = r"(?<![A-Za-z])[A-Z]{1,4}(?![A-Za-z])"
        text = re.sub(pattern, lambda m: letters.get(m[0]) or "".join(letters[c] for c in m[0]), text)
    return text


def japanese(text: str) -> list[str]:
    """The phones of Japanese text by Open JTalk; punctuation is kept, but not within numbers.

    Raises:
        MetisError: pyopenjtalk or its dictionary is missing.
    """
    text = re.sub(r"[\x00-\x1f\ud800-\udfff]+", " ", text)
    marks = rf"(?<![0-9])[{PUNCTUATION}]|[{PUNCTUATION}](?![0-9])"
    found: list[str] = []
    for part in re.findall(rf"{marks}|(?:(?!{marks}).){{1,200}}", text):
        if part in PUNCTUATION:
            found.append(part)
            continue
        open_jtalk = needed("pyopenjtalk", "Japanese")
        try:
            said = open_jtalk.g2p(part, join=False) if part.strip() else []
        except (OSError, RuntimeError) as error:
            hint = "pip install pyopenjtalk-plus carries one, or set OPEN_JTALK_DICT_DIR"
            raise MetisError(f"Open JTalk has no dictionary: {hint} ({error})") from error
        line = " ".join(phone.lower() if phone in "AIUEO" else phone for phone in said if phone not in ("pau", "sil"))
        found += re.sub(r"h i\b|\S+", lambda m: rules()["japanese"].get(m[0], m[0]), line).split()
    return found
