"""Text to phones, the text tokens of zero-shot TTS (MaskGCT appendix A.6): espeak-ng and the released rules.

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

PUNCTUATION = ",.?!;:'…"
WORD_BOUNDARY = "_"
VOICES = {"en": "en-us"}
"""Language to espeak-ng voice."""

_PLAIN = str.maketrans(dict(zip("，。！？；：、‘’⋯", ",.!?;:,''…", strict=True)))
_ENGLISH = json.loads(Path(__file__).with_name("english.json").read_text(encoding="utf-8"))
_ABBREVIATIONS: dict[str, str] = _ENGLISH["abbreviations"]
_ABBREVIATED = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\b", re.IGNORECASE)


@lru_cache(maxsize=1)
def _inflect() -> Any:
    """The number speller that the released front end uses; loaded by the first number of a process."""
    import inflect

    return inflect.engine()


def cardinal(digits: str, with_and: bool = False) -> str:
    """A run of ASCII digits as words: ``12500`` is "twelve thousand, five hundred".

    ``with_and`` says "one hundred and one".  More than 18 digits are read one by one.
    """
    digits = digits.lstrip("0") or "0"
    if len(digits) > 18:
        return _inflect().number_to_words(digits, group=1).replace(", ", " ")
    return _inflect().number_to_words(digits, andword="and" if with_and else "")


def ordinal(digits: str) -> str:
    """A run of ASCII digits as an ordinal number: ``112`` is "one hundred and twelfth"."""
    return _inflect().ordinal(cardinal(digits, with_and=True))


def _number(match: re.Match[str]) -> str:
    """A plain number; 1001 to 2999 are read as years."""
    digits = match[0].lstrip("0")
    year = int(digits) if len(digits) == 4 else 0
    if not 1000 < year < 3000 or year == 2000 or 2000 < year < 2010:
        return f" {cardinal(digits)} "
    if year % 100 == 0:
        return f" {cardinal(digits[:2])} hundred "
    return f" {_inflect().number_to_words(digits, group=2, zero='oh').replace(', ', ' ')} "


def _dollars(match: re.Match[str]) -> str:
    parts = match[1].split(".")
    if len(parts) > 2:
        return f" {match[1]} dollars "
    amounts = []
    for digits, unit in zip(parts, ("dollar", "cent"), strict=False):
        digits = digits.lstrip("0")
        if digits:
            amounts.append(f"{digits} {unit}{'' if digits == '1' else 's'}")
    return f" {', '.join(amounts) or 'zero dollars'} "


def _fraction(match: re.Match[str]) -> str:
    top, bottom = (digits.lstrip("0") or "0" for digits in match.groups())
    part = {"2": ("half", "halves"), "4": ("quarter", "quarters")}.get(bottom, (ordinal(bottom),) * 2)
    if top == "1" and bottom in ("2", "4"):
        return f" one {part[0]} "
    return f" {cardinal(top, True)} {part[1]} "


# A look-behind keeps the time linear in the length of a number.
_RULES = (
    (re.compile(r"[0-9][0-9,]+[0-9]"), lambda m: m[0].replace(",", "")),
    (re.compile(r"£([0-9,]*[0-9]+)"), r"\1 pounds"),
    (re.compile(r"\$([0-9.,]*[0-9]+)"), _dollars),
    (re.compile(r"(?<![0-9])([0-9]+)/([0-9]+)"), _fraction),
    (re.compile(r"(?<![0-9])[0-9]+\.[0-9]+"), lambda m: m[0].replace(".", " point ")),
    (re.compile(r"(?<![0-9.,])[0-9.,]*[0-9]%"), lambda m: m[0].replace("%", " percent ")),
    (re.compile(r"(?<![0-9])([0-9]+)(?:st|nd|rd|th)"), lambda m: f" {ordinal(m[1])} "),
    (re.compile(r"[0-9]+"), _number),
)


def expand_english(text: str) -> str:
    """Abbreviations and numbers written out: "Dr. Who paid $5" is "doctor. Who paid  five  dollars "."""
    text = _ABBREVIATED.sub(lambda m: _ABBREVIATIONS[m[0].lower()], text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)  # type: ignore[arg-type]
    return text


def merge_phones(phones: list[str]) -> list[str]:
    """Apply the released merges and replacements, rule after rule (``t ɹ`` becomes ``tɹ``)."""
    line = f"|{'||'.join(phones)}|"  # every phone between bars of its own
    for pattern, replacement in _ENGLISH["merges"]:
        line = line.replace(f"|{pattern.replace(' ', '||')}|", f"|{replacement}|")
    return [phone for phone in line.split("|") if phone]


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
def espeak(voice: str, stress: bool = False) -> Any:
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
        voice, punctuation_marks=PUNCTUATION, preserve_punctuation=True, with_stress=stress,
        language_switch="remove-flags", words_mismatch="ignore", logger=quiet,
    )  # fmt: skip


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
        spoken = espeak(VOICES[language]).phonemize([line], separator=separator, strip=True)
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
