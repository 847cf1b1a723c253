"""Text to phones, the text tokens of zero-shot TTS (MaskGCT appendix A.6), by the rules of the released front end.

English, German, French and Korean are read by espeak-ng (no stress); Chinese by :mod:`.chinese`, Japanese by
Open JTalk.  In English abbreviations and numbers are written out and some pairs merged into one phone; ``_``
stands between words, and punctuation is kept as phones.  Text in English or Chinese may hold words of the other.
Differences, all where the released code fails or drops input: a text of digits alone is spoken, line breaks are
spaces, numbers of any length work, a text with nothing to say is an error, and phones outside the table are
reported.  A language's packages are loaded by its first text.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.tokenizers.chinese import CJK, Chinese, ends_like_chinese, expand_chinese
from metis_lib.tokenizers.languages import LANGUAGES, PUNCTUATION, japanese, normalise, rules
from metis_lib.tokenizers.languages import detect_language as detect_language

WORD_BOUNDARY = "_"
VOICES = {"en": "en-us"}
"""Languages that nano's table was made for, and so the training texts, to espeak-ng voice."""
VOCAB_SHA256 = "0f5c44e05f79df8ae4fd77d7772950436a8bacc83d134fdf0ae3c72412b5676a"
"""The released vocab.json."""

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
    text = _ABBREVIATED.sub(lambda m: _ABBREVIATIONS.get(m[0].lower(), m[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)  # type: ignore[arg-type]
    return text


def merge_phones(phones: list[str]) -> list[str]:
    """Apply the released merges and replacements, rule after rule (``t ɹ`` becomes ``tɹ``)."""
    line = f"|{'||'.join(phones)}|"  # every phone between bars of its own
    for pattern, replacement in _ENGLISH["merges"]:
        line = line.replace(f"|{pattern.replace(' ', '||')}|", f"|{replacement}|")
    return [phone for phone in line.split("|") if phone]


def plain(text: str) -> str:
    """Full-width and curly punctuation made plain."""
    text = text.translate(_PLAIN)
    for dots in ("···", "・・・", "..."):
        text = text.replace(dots, "…")
    return text


def clean(text: str) -> str:
    """Full-width and curly punctuation made plain, other symbols dropped, no space around punctuation."""
    text = plain(text)
    text = re.sub(rf"[^\w\s{PUNCTUATION}]", "", text)
    text = re.sub(rf"\s*([{PUNCTUATION}])\s*", r"\1", text)
    return " ".join(text.split())


def split_phones(spoken: str, merge: bool = True) -> list[str]:
    """What espeak-ng said (phones separated by ``|``, words by ``|_|``) as phones; ``merge`` for English."""
    parts = re.sub(rf"([{PUNCTUATION}])", r"|\1|", spoken).split("|")
    found = [phone for phone in parts if phone.strip()]
    while found and found[-1] == WORD_BOUNDARY:
        found.pop()
    return merge_phones(found) if merge else found


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


def segments(text: str) -> list[tuple[str, str]]:
    """English and Chinese runs of a text as (language, run); other characters stay with the run before them.

    Those in front belong to the first run; a text without a letter of either has no runs.
    """
    runs = re.findall(rf"[{CJK}][^A-Za-z]*|[A-Za-z][^{CJK}]*", text)
    if runs:
        runs[0] = text[: text.index(runs[0][0])] + runs[0]
    return [("zh" if re.search(f"[{CJK}]", run) else "en", run) for run in runs]


def _say(line: str, voice: str, merge: bool = False) -> list[str]:
    """The phones of a cleaned line by an espeak-ng voice."""
    from phonemizer.separator import Separator

    separator = Separator(word="|_|", syllable="-", phone="|")
    return split_phones("|".join(espeak(voice).phonemize([line], separator=separator, strip=True)), merge)


_END = re.compile(r"([.?!…;]+(?:\s»(?=\s|$)|[\"'”’“»«)\]])*)(?=\s|$)|[。！？；]+[”’」』）]*|…+(?=[\u3000-\uffff])|\n")


def sentences(text: str, language: str = "en") -> list[str]:
    """The sentences of a text, for speaking a long one piece by piece; nothing but white space is lost.

    They end at . ? ! … ; and their full-width forms and at line breaks, but not after abbreviations and initials
    ("Dr. J. Who"), before a small letter, or within numbers.  A piece with nothing to say joins its neighbour.
    """
    known = rules()["no_sentence_end"].get(language, "").split()
    pieces, start = [""], 0
    for match in [*_END.finditer(text), None]:
        end = match.end() if match else len(text)
        if match and match[0][0] == "." and len(match[1]) == 1:
            word = re.split(r"[\s(\"'“‘«]", text[max(0, match.start() - 24) : match.start()])[-1]
            following = text[end : end + 9].lstrip(" ")[:1]
            initial = re.fullmatch(r"(?:.*\.)?[A-Z]", word) and following.isupper()
            ordinal_day = language == "de" and re.fullmatch(r"\d{1,2}", word) and following.isupper()
            if word.lower() in known or initial or ordinal_day or following.islower():
                continue
        piece, start = " ".join(text[start:end].split()), end
        if any(character.isalnum() for character in pieces[-1]) and any(map(str.isalnum, piece)):
            pieces.append(piece)
        else:
            pieces[-1] = f"{pieces[-1]} {piece}".strip()
    return [piece for piece in pieces if piece]


class PhoneTokenizer:
    """Text to phone ids on one table.

    ``vocab`` maps phones to ids and ``size`` is the number of rows of the embedding, whose last row is
    padding (``pad_id``).  Without ``vocab``: nano's table (128 rows).  The released table (:meth:`from_vocab`)
    has 363 phones in 1024 rows.  ``chinese`` reads Chinese; by default pypinyin's readings.
    """

    def __init__(
        self, vocab: Mapping[str, int] | None = None, size: int | None = None, chinese: Chinese | None = None
    ) -> None:
        if vocab is None:
            vocab, size = nano_table()
        self.vocab = dict(vocab)
        self.size = 1024 if size is None else size
        self.pad_id = self.size - 1
        if not self.vocab or not all(0 <= i < self.pad_id for i in self.vocab.values()):
            raise MetisError(f"the ids of a phone table must lie in 0..{self.pad_id - 1}")
        self.chinese = chinese or Chinese()
        self.last_unknown: list[str] = []
        """Phones of the last text encoded that the table lacks, in order."""
        self._warned: set[str] = set()

    @classmethod
    def from_vocab(cls, path: str | Path, chinese: Chinese | None = None) -> PhoneTokenizer:
        """The released table from its ``vocab.json``: 1024 rows, padding is 1023.

        Raises:
            MetisError: the file is missing or is not the released one.
        """
        try:
            content = Path(path).read_bytes()
            vocab = json.loads(content)["vocab"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetisError(f"cannot read the phone table {path}: {error}") from error
        if hashlib.sha256(content).hexdigest() != VOCAB_SHA256:
            raise MetisError(f"{path} is not the released phone table: its SHA-256 differs")
        return cls(vocab, 1024, chinese)

    def phones(self, text: str, language: str = "en") -> list[str]:
        """The phones of a text.

        Raises:
            MetisError: the language is not supported, one of its packages is missing, or the text has nothing to say.
        """
        if language not in LANGUAGES:
            raise MetisError(f"unknown language {language!r}; supported: {', '.join(LANGUAGES)}")
        parts = segments(text) if language in ("en", "zh") else []
        found: list[str] = []
        for kind, part in parts or [(language, text)]:
            if found and kind == "zh" and ends_like_chinese(found[-1]):
                found.append(WORD_BOUNDARY)
            found += self._phones(part, kind)
        if all(phone in PUNCTUATION or phone == WORD_BOUNDARY for phone in found):
            raise MetisError(f"the text has nothing to say: {text[:60]!r}")
        return found

    def _phones(self, text: str, language: str) -> list[str]:
        if not any(character.isalnum() for character in text):
            return []
        if language == "ja":
            return japanese(plain(text))
        if language == "zh":
            return self.chinese.phones(clean(expand_chinese(text)))
        if language == "en":
            return _say(clean(expand_english(text)), "en-us", merge=True)
        own = rules()["espeak"][language]
        found = _say(clean(normalise(plain(text), language)), own["voice"])
        return [own.get("newer", {}).get(phone, phone) for phone in found]

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
