"""Text to phones, the text tokens of zero-shot TTS (Metis section 3.3.2): espeak-ng and the released rules.

The English front end of the released code: abbreviations and numbers written out, espeak-ng (voice en-us, no
stress), some pairs merged into one phone, ``_`` between words, punctuation kept as phones.  Differences, all
where the released code fails or drops input: a text of digits alone is spoken, line breaks are spaces,
numbers of any length work, and phones outside the table are reported.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.tokenizers.numbers import expand_english

PUNCTUATION = ",.?!;:'…"
WORD_BOUNDARY = "_"
VOICES = {"en": "en-us"}
"""Language to espeak-ng voice."""

_PLAIN = str.maketrans(dict(zip("，。！？；：、‘’⋯", ",.!?;:,''…", strict=True)))
_MERGES = (
    (("t", "ɹ"), "tɹ"),
    (("d", "ɹ"), "dɹ"),
    (("t", "s"), "ts"),
    (("d", "z"), "dz"),
    (("ɪ", "ɹ"), "ɪɹ"),
    (("ɐ",), "ɚ"),
    (("ᵻ",), "ɪ"),
    (("əl",), "l"),
    (("x",), "k"),
    (("ɬ",), "l"),
    (("ʔ",), "t"),
    (("n̩",), "n"),
    (("oː", "ɹ"), "oːɹ"),
)


def merge_phones(phones: list[str]) -> list[str]:
    """Apply the released merges and replacements, rule after rule (``t ɹ`` becomes ``tɹ``)."""
    for pattern, replacement in _MERGES:
        if pattern[0] not in phones:
            continue
        merged, i = [], 0
        while i < len(phones):
            if phones[i] == pattern[0] and tuple(phones[i : i + len(pattern)]) == pattern:
                merged.append(replacement)
                i += len(pattern)
            else:
                merged.append(phones[i])
                i += 1
        phones = merged
    return phones


def clean(text: str) -> str:
    """Full-width and curly punctuation made plain, other symbols dropped, no space around punctuation."""
    text = text.translate(_PLAIN)
    for dots in ("···", "・・・", "..."):
        text = text.replace(dots, "…")
    text = re.sub(rf"[^\w\s{PUNCTUATION}]", "", text)
    text = re.sub(rf"\s*([{PUNCTUATION}])\s*", r"\1", text)
    return " ".join(text.split())


def split_phones(spoken: str) -> list[str]:
    """What espeak-ng said (phones separated by ``|``, words by ``|_|``) as merged phones and punctuation."""
    parts = re.sub(rf"([{PUNCTUATION}])", r"|\1|", spoken).split("|")
    found = merge_phones([phone for phone in parts if phone.strip()])
    while found and found[-1] == WORD_BOUNDARY:
        found.pop()
    return found


@lru_cache(maxsize=8)
def _backend(voice: str) -> Any:
    """The espeak-ng backend of one voice, from the library that the package espeakng-loader carries."""
    import logging

    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    quiet = logging.getLogger("metis_lib.espeak")
    quiet.setLevel(logging.ERROR)
    return EspeakBackend(
        voice,
        punctuation_marks=PUNCTUATION,
        preserve_punctuation=True,
        with_stress=False,
        language_switch="remove-flags",
        words_mismatch="ignore",
        logger=quiet,
    )


@lru_cache(maxsize=1)
def nano_table() -> tuple[dict[str, int], int]:
    """The phone table of the nano system: (phone to id, number of rows); the last row is padding."""
    stored = json.loads((Path(__file__).parent / "phones_nano.json").read_text(encoding="utf-8"))
    return stored["phones"], stored["size"]


class PhoneTokenizer:
    """Text to phone ids on one table.

    ``vocab`` maps phones to ids and ``size`` is the number of rows of the embedding, whose last row is
    padding (``pad_id``).  Without ``vocab``: nano's table (128 rows).  The released table has 363 phones in
    1024 rows.
    """

    def __init__(self, vocab: Mapping[str, int] | None = None, size: int | None = None) -> None:
        if vocab is None:
            vocab, size = nano_table()
        self.vocab = dict(vocab)
        self.size = 1024 if size is None else size
        self.pad_id = self.size - 1
        if not self.vocab or not all(0 <= i < self.pad_id for i in self.vocab.values()):
            raise MetisError(f"the ids of a phone table must lie in 0..{self.pad_id - 1}")
        self.last_unknown: list[str] = []
        """Phones of the last text encoded that the table lacks, in order."""
        self._warned: set[str] = set()

    def phones(self, text: str, language: str = "en") -> list[str]:
        """The phones of a text.

        Raises:
            MetisError: the language is not supported, or the text has nothing to say.
        """
        if language not in VOICES:
            raise MetisError(f"unknown language {language!r}; supported: {', '.join(VOICES)}")
        line = clean(expand_english(text))
        if not any(character.isalnum() for character in line):
            raise MetisError(f"the text has nothing to say: {text[:60]!r}")
        from phonemizer.separator import Separator

        separator = Separator(word="|_|", syllable="-", phone="|")
        spoken = _backend(VOICES[language]).phonemize([line], separator=separator, strip=True)
        found = split_phones("|".join(spoken))
        if all(phone in PUNCTUATION or phone == WORD_BOUNDARY for phone in found):
            raise MetisError(f"the text has nothing to say: {text[:60]!r}")
        return found

    def encode(self, text: str, language: str = "en") -> list[int]:
        """The ids of a text's phones.  Phones that the table lacks are left out, with one warning for each.

        Raises:
            MetisError: as :meth:`phones`, or the table has none of the text's phones.
        """
        found = self.phones(text, language)
        self.last_unknown = [phone for phone in found if phone not in self.vocab]
        news = sorted(set(self.last_unknown) - self._warned)
        if news:
            self._warned.update(news)
            warnings.warn(f"phones outside the table are left out: {' '.join(news)}", stacklevel=2)
        ids = [self.vocab[phone] for phone in found if phone in self.vocab]
        if not ids:
            raise MetisError(f"the text has nothing to say with this phone table: {text[:60]!r}")
        return ids
