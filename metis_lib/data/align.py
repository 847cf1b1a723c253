"""When each phone of a recording with known text is said: espeak-ng says the text too, and time is warped.

espeak-ng (from the package espeakng-loader) gives speech and the moment each of its phones begins; dynamic time
warping of cepstra finds these moments in the recording: good enough to draw lips by (``results/data/lips.json``).
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import re
import shutil
import tempfile
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from metis_lib import audio
from metis_lib.audio import frame_db
from metis_lib.config import SSL_RATE
from metis_lib.errors import MetisError
from metis_lib.tokenizers.acoustic import mel_filters
from metis_lib.tokenizers.text import clean, expand_english, merge_phones

HOP = 0.01  # seconds between frames of the alignment; also the shortest phone
QUIET_DB, PAUSE_SECONDS = 35.0, 0.2  # nobody speaks so far under the loudest frame for so long
LONGEST_SECONDS = 60.0


class Timed(NamedTuple):
    """A phone of the project's inventory and when it is said, in seconds."""

    phone: str
    start: float
    end: float


class _Event(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("type", "id", "text_position", "length", "milliseconds", "sample")]
    _fields_ += [("user", ctypes.c_void_p), ("name", ctypes.c_char * 8)]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def speak(text: str, *, voice: str = "en-us", rate: int = 175, pitch: int = 50) -> tuple[np.ndarray, list[Timed]]:
    """espeak-ng's English speech, float32 [S] at 16 kHz, and its phones; the same for the same arguments.

    ``voice`` may name a variant (``en-us+f3``); ``rate`` is in words a minute, ``pitch`` 0 to 99.  MetisError if the
    text has nothing to say or there is no such voice.
    """
    import espeakng_loader

    pieces: list[np.ndarray] = []
    marks: list[tuple[int, str, int]] = []  # kind, name, sample
    said = re.sub(r"([,.?!;:…])", r"\1 ", clean(expand_english(text))).encode()

    @_CALLBACK
    def receive(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            marks.append((events[i].type, events[i].name.decode("utf-8", "ignore"), events[i].sample))
            i += 1
        return 0

    # Loaded anew, because what it said before changes how it speaks; a copy, because phonemizer holds the file open.
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        # 2: speech comes back in memory; 0x8003: phoneme events with IPA names, no exit on errors
        native = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8003)
        known = native > 0 and library.espeak_SetVoiceByName(voice.encode()) == 0
        if known:
            library.espeak_SetSynthCallback(receive)
            library.espeak_SetParameter(1, rate, 0)
            library.espeak_SetParameter(3, pitch, 0)
            library.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, 1, 0, 1, None, None)
        library.espeak_Terminate()
        getattr(_ctypes, "FreeLibrary" if os.name == "nt" else "dlclose")(library._handle)
    if not known:
        raise MetisError(f"espeak-ng has no voice {voice!r}, or its package espeakng-loader is damaged")
    phones: list[Timed] = []
    before = ""  # the phone before in the same word, as espeak-ng calls it; events of kind 7 are phones
    for (kind, name, start), (_, _, end) in pairwise([*marks, (0, "", sum(map(len, pieces)))]):
        name = name.strip("ˈˌ") if kind == 7 else ""
        both = merge_phones([before, name]) if before and name else []
        if len(both) == 1:
            phones[-1] = Timed(both[0], phones[-1].start, end / native)
        elif name and end > start:
            phones.append(Timed(merge_phones([name])[0], start / native, end / native))
        before = name
    if not phones or not any(map(str.isalnum, text)):
        raise MetisError(f"the text has nothing to say: {text[:60]!r}")
    return audio.load((np.concatenate(pieces), native), SSL_RATE).numpy(), phones


def cepstra(wav_16k: np.ndarray) -> np.ndarray:
    """[S] to [T, C] at 100 Hz: nine mel cepstra below 5 kHz and their slopes, normalised over loud frames."""
    from scipy.fft import dct

    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wav_16k, 200), 400)[:: int(HOP * SSL_RATE)]
    mel = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2 @ mel_filters(30, 512, SSL_RATE).numpy()[1:25].T
    mel = np.log(mel + 1e-3 * mel.max())
    values, level = dct(mel, norm="ortho")[:, :9], mel.mean(axis=1)
    loud = values[level > np.quantile(level, 0.95) - 6]
    values = (values - loud.mean(axis=0)) / (loud.std(axis=0) + 1e-3)
    return np.concatenate([values, 3 * np.gradient(values, axis=0)], axis=1).astype(np.float32)


def warp(a: np.ndarray, b: np.ndarray, *, band: float = 0.2, penalty: float = 0.5) -> np.ndarray:
    """Dynamic time warping of [N, C] to [M, C]: for each frame of ``b`` the mean frame of ``a``, [M].

    The path keeps within ``band`` of the straight line (as a part of the whole); a step along one side alone costs
    ``penalty`` mean distances more.
    """
    n, m = len(a), len(b)
    cost = np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
    extra, reach = penalty * float(cost.mean()), band + 2 / min(n, m)
    before, last = np.full((2, n + 1), np.inf)  # costs on the two diagonals behind i + j = k; entry i + 1 is row i
    before[0], choice = 0.0, np.zeros((n + m - 1, n), dtype=np.int8)
    for k in range(n + m - 1):
        i = np.arange(max(0, k - m + 1), min(n, k + 1))
        i = i[np.abs(i / max(n - 1, 1) - (k - i) / max(m - 1, 1)) <= reach]
        ways = np.stack([before[i], last[i] + extra, last[i + 1] + extra])  # from (i-1, j-1), (i-1, j), (i, j-1)
        choice[k, i], now = ways.argmin(0), np.full(n + 1, np.inf)
        now[i + 1] = ways.min(0) + cost[i, k - i] * np.where(choice[k, i] == 0, 2, 1)
        before, last = last, now
    total, count, row, column = np.zeros(m), np.zeros(m), n - 1, m - 1
    while row >= 0:
        total[column], count[column], step = total[column] + row, count[column] + 1, choice[row + column, row]
        row, column = row - (step != 2), column - (step != 1)
    return total / count


def align(wav: Any, sample_rate: int, text: str) -> list[Timed]:
    """When the phones of ``text`` are said in a recording [S].

    In order, without overlap, each at least 10 ms long, from where speech begins to where it ends; pauses are gaps.
    MetisError: the recording is none (silent, NaN) or longer than 60 s, or its speech is too short for the text.
    """
    heard = audio.load((wav, sample_rate), SSL_RATE, max_seconds=LONGEST_SECONDS).numpy()
    said, phones = speak(text)
    loud = [np.flatnonzero((db := frame_db(w, SSL_RATE)) > db.max() - QUIET_DB) for w in (heard, said)]
    (first, last), (begin, end) = ((int(frames[0]), int(frames[-1]) + 1) for frames in loud)
    if last - first < 2 * len(phones):
        raise MetisError(f"{len(phones)} phones in {(last - first) / 100:.2f} s; is this what it says: {text[:50]!r}")
    moments = (warp(cepstra(heard)[first:last], cepstra(said)[begin:end]) + first) * HOP
    times = np.interp([p[1:] for p in phones], np.arange(begin, end) * HOP, moments)  # [L, 2]
    least = HOP * np.arange(len(phones))
    starts = np.maximum.accumulate(times[:, 0] - least) + least
    starts = np.minimum(starts, last * HOP - least[::-1] - HOP)
    starts[0], following = first * HOP, np.append(starts[1:], last * HOP)
    ends = np.where(following - times[:, 1] < PAUSE_SECONDS, following, np.maximum(times[:, 1], starts + HOP))
    for k in np.flatnonzero(np.diff(loud[0]) * HOP > PAUSE_SECONDS):  # pauses that espeak-ng does not make
        quiet, again = (loud[0][k] + 1) * HOP, loud[0][k + 1] * HOP
        cut = (starts < quiet) & (quiet < ends) & ((ends <= again) | (quiet - starts >= ends - again))
        late = ~cut & (starts < again) & (again < ends)
        ends = np.where(cut, np.maximum(quiet, starts + HOP), ends)
        starts = np.where(late, np.minimum(again, ends - HOP), starts)
    return [Timed(p.phone, *map(float, when)) for p, when in zip(phones, np.stack([starts, ends], 1), strict=True)]
