"""Numbers, amounts of money and abbreviations of English text, written out the way the released code does."""

from __future__ import annotations

import re

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
_SMALL += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = ["", "thousand", "million", "billion", "trillion", "quadrillion"]
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_ABBREVIATIONS = {
    "mrs": "misess",
    "mr": "mister",
    "dr": "doctor",
    "st": "saint",
    "co": "company",
    "jr": "junior",
    "maj": "major",
    "gen": "general",
    "drs": "doctors",
    "rev": "reverend",
    "lt": "lieutenant",
    "hon": "honorable",
    "sgt": "sergeant",
    "capt": "captain",
    "esq": "esquire",
    "ltd": "limited",
    "col": "colonel",
    "ft": "fort",
    "etc": "et cetera",
    "btw": "by the way",
}
_ABBREVIATED = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\b", re.IGNORECASE)


def _below_thousand(n: int, joint: str) -> str:
    hundreds, rest = divmod(n, 100)
    if rest < 20:
        low = _SMALL[rest]
    else:
        low = _TENS[rest // 10] + (f"-{_SMALL[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return low
    return f"{_SMALL[hundreds]} hundred" + (joint + low if rest else "")


def cardinal(digits: str, with_and: bool = False) -> str:
    """A run of ASCII digits as words: ``12500`` is "twelve thousand, five hundred".

    ``with_and`` says "one hundred and one".  More than 18 digits are read one by one.
    """
    digits = digits.lstrip("0") or "0"
    if len(digits) > 3 * len(_SCALES):
        return " ".join(_SMALL[int(digit)] for digit in digits)
    number, joint = int(digits), " and " if with_and else " "
    if number < 1000:
        return _below_thousand(number, joint)
    groups = []
    for scale in range(len(_SCALES) - 1, 0, -1):
        value = number // 1000**scale % 1000
        if value:
            groups.append(f"{_below_thousand(value, joint)} {_SCALES[scale]}")
    text, last = ", ".join(groups), number % 1000
    if not last:
        return text
    return text + (joint if last < 100 else ", ") + _below_thousand(last, joint)


def ordinal(digits: str) -> str:
    """A run of ASCII digits as an ordinal number: ``112`` is "one hundred and twelfth"."""
    head, joint, last = re.fullmatch(r"(.*?)([- ]?)([a-z]+)", cardinal(digits, with_and=True)).groups()  # type: ignore[union-attr]
    if last in _ORDINALS:
        last = _ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return head + joint + last


def _number(match: re.Match[str]) -> str:
    """A plain number; 1001 to 2999 are read as years."""
    digits = match[0].lstrip("0")
    year = int(digits) if len(digits) == 4 else 0
    if not 1000 < year < 3000:
        return f" {cardinal(match[0])} "
    if year == 2000:
        return " two thousand "
    if 2000 < year < 2010:
        return f" two thousand {_SMALL[year % 100]} "
    if year % 100 == 0:
        return f" {cardinal(digits[:2])} hundred "
    second = f"oh {_SMALL[year % 10]}" if digits[2] == "0" else cardinal(digits[2:])
    return f" {cardinal(digits[:2])} {second} "


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
    if bottom == "2":
        return " one half " if top == "1" else f" {cardinal(top, True)} halves "
    if bottom == "4":
        return " one quarter " if top == "1" else f" {cardinal(top, True)} quarters "
    return f" {cardinal(top, True)} {ordinal(bottom)} "


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
