"""Mandarin text to the released phones: numbers written out, words, pinyin, tone rules, IPA-like symbols.

The released front end reads a lexicon of its own and settles characters of several readings by a neural
network; neither may be passed on.  Here words come from jieba and readings from pypinyin, so a rare reading
may differ; everything after the readings is the released algorithm.  Who has the released lexicon can give
its folder.  Tables and word lists are data, in ``chinese.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.tokenizers.languages import needed

CJK = "㐀-鿿"
LEXICON = "chinese_lexicon.txt"


@lru_cache(maxsize=1)
def _rules() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("chinese.json").read_text(encoding="utf-8"))


def numeral(digits: str) -> str:
    """A run of ASCII digits in characters: ``120`` is 一百二十; one by one with a leading zero or beyond 9 digits."""
    rules = _rules()
    names = rules["numerals"]
    if len(digits) > 9 or (len(digits) > 1 and digits[0] == "0"):
        return "".join(names[int(d)] for d in digits)
    said = ""
    for myriad, start in enumerate(range(len(digits), 0, -4)):  # groups of four digits, the last first
        group = ""
        for place, digit in zip(rules["places"], digits[max(0, start - 4) : start][::-1], strict=False):
            if digit != "0":
                group = names[int(digit)] + place + group
            elif group and group[0] != names[0]:
                group = names[0] + group
        said = f"{group}{rules['myriads'][myriad] if group else ''}{said}"
    return re.sub("^一十", "十", said) or names[0]


def expand_chinese(text: str) -> str:
    """Numbers written out: "2024年的3.5%" is "二零二四年的百分之三点五"."""
    names = _rules()["numerals"]
    text = re.sub(r"\d", lambda m: str(int(m[0])), text)  # full-width digits
    for pattern, replacement in _rules()["symbols"]:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"(?<![\d.])\d{4}(?=年)", lambda m: "".join(names[int(d)] for d in m[0]), text)
    decimal = r"(?<![\d.])(\d+)\.(\d+)(?![\d.]*\d)"
    text = re.sub(decimal, lambda m: numeral(m[1]) + "点" + "".join(names[int(d)] for d in m[2]), text)
    return re.sub(r"\d+", lambda m: numeral(m[0]), text)


def syllable(pinyin: str) -> list[str]:
    """The phones of a syllable such as ``zhong1`` or ``lv4`` (5 is the neutral tone); empty if it is none."""
    rules = _rules()
    body = pinyin[:-1].replace("u:", "ü").replace("v", "ü")
    mark = rules["tones"].get(pinyin[-1:])
    if mark is None:
        return []
    if body in rules["whole"]:
        return [rules["whole"][body] + mark]
    body = rules["spelling"].get(body, body)
    initial = next((body[:n] for n in (2, 1) if body[:n] in rules["initials"]), "")
    final = body[len(initial) :]
    if initial in ("j", "q", "x") and final.startswith("u"):
        final = "ü" + final[1:]
    if final not in rules["finals"]:
        return []
    return [*([rules["initials"][initial]] if initial else []), *f"{rules['finals'][final]}{mark}".split()]


def ends_like_chinese(phone: str) -> bool:
    """Whether a phone ends in a symbol that Chinese phones use or in ``ː``: the released code then sets a boundary."""
    values = (value for table in ("initials", "finals", "whole") for value in _rules()[table].values())
    return phone[-1] in "ː".join(values)


def sandhi(word: str, said: Sequence[str]) -> list[str]:
    """The syllables of a word with the tones that they take beside each other (儿, 不, 一, third tones)."""
    new = list(said)

    def turn(i: int, tone: int) -> None:
        new[i] = f"{new[i][:-1]}{tone}"

    numerals = f"{_rules()['numerals']}十百千万亿点"
    if len(word) > 1 and word[-1] == "儿" and word not in _rules()["full_er"].split():
        turn(-1, 5)
    for i, character in enumerate(word):
        following = new[i + 1][-1] if i + 1 < len(word) else ""
        if character in "不一" and len(word) == 3 and i == 1 and word[0] == word[2]:
            turn(i, 5)
        elif character == "不" and following == "4":
            turn(i, 2)
        elif character == "一":
            plain = not following or word[:2] in ("一月", "一日", "一号", "第一")
            if plain or (i and word[i - 1] in numerals) or word[i + 1] in f"{_rules()['numerals']}十":
                turn(i, 1)
            else:
                turn(i, 2 if following in "45" else 4)
    third = [s[-1] == "3" for s in new]
    if third != [True] * 3:  # the released code leaves words of three third tones as they are
        for i in range(len(new) - 1):
            if third[i] and third[i + 1]:
                turn(i, 2)
    return new


class Chinese:
    """Mandarin to phones.

    ``lexicon`` maps words and characters to pinyin with tone numbers (``{"你好": "ni3 hao3"}``); without it, or
    where it lacks a character, pypinyin reads.  ``choose(line, index)`` may name the reading of the character
    at ``index`` of a word that the lexicon lacks; None leaves it to the lexicon's own entry for the character.
    """

    def __init__(
        self, lexicon: Mapping[str, str] | None = None, choose: Callable[[str, int], str | None] | None = None
    ) -> None:
        self.lexicon = lexicon or {}
        self.choose = choose

    @classmethod
    def from_folder(cls, folder: str | Path) -> Chinese:
        """With the released ``chinese_lexicon.txt`` of a folder: a word, white space and its pinyin on each line.

        Raises:
            MetisError: the file is missing, not UTF-8, or no such list.
        """
        path = Path(folder) / LEXICON
        try:
            lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise MetisError(f"cannot read the Chinese lexicon {path}: {error}") from error
        lexicon = {line[0]: line[1].strip() for line in lines if len(line) == 2}
        if len(lexicon) < 0.9 * len(lines) or not any(map(syllable, " ".join(lexicon.values()).split()[:9])):
            raise MetisError(f"{path} is no lexicon: a word and its pinyin (ni3 hao3) are wanted on each line")
        return cls(lexicon)

    def _pinyin(self, line: str, word: str, start: int) -> list[str]:
        """The reading of each character of a word that stands at ``start`` of its line."""
        known = self.lexicon.get(word, "").split()
        if len(known) == len(word):
            return known
        pypinyin = needed("pypinyin", "Chinese")
        style = {"style": pypinyin.Style.TONE3, "neutral_tone_with_five": True, "errors": lambda c: list(c)}
        said = pypinyin.lazy_pinyin(word, **style)
        for i, character in enumerate(word if self.lexicon else ""):
            chosen = self.choose(line, start + i) if self.choose else None
            if chosen or (self.choose and character in self.lexicon):
                said[i] = chosen or self.lexicon[character]
        return said

    def phones(self, line: str) -> list[str]:
        """The phones of a cleaned line.  A character without a reading stands for itself.

        Raises:
            MetisError: a package is missing; it says what to install.
        """
        jieba = needed("jieba", "Chinese")
        jieba.setLogLevel("WARNING")
        found: list[str] = []
        for run in re.finditer(rf"[{CJK}]+|\S", line):
            for word, start, _ in jieba.tokenize(run[0]):
                said = self._pinyin(line, word, run.start() + start) if re.match(f"[{CJK}]", word) else [word]
                for character, pinyin in zip(word, sandhi(word, said), strict=True):
                    found += syllable(pinyin) or [character]
        return found
