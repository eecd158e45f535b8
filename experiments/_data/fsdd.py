"""The Free Spoken Digit Dataset: recordings of single digits, and the strings that are made of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments._data import archive, files, sound

RATE = 8000
"""Samples a second."""

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")

LONGEST = 6
"""Digits of the longest string."""


class Recordings(NamedTuple):
    """Recordings of one digit each."""

    sound: tuple[np.ndarray, ...]
    """float32 [samples] in [-1, 1), each of its own length, 8,000 samples a second."""
    digit: np.ndarray
    """int32 [n]."""
    speaker: np.ndarray
    """int32 [n], a place in `SPEAKERS`."""


class Spoken(NamedTuple):
    """The recordings of all speakers but one, and those of that one."""

    train: Recordings
    test: Recordings


@functools.cache
def spoken_digits(held_out: str = "jackson") -> Spoken:
    """3,000 recordings of the digits 0 to 9, 50 each of six speakers, of whom one is held out.

    Args:
      held_out: one of `SPEAKERS`.

    Raises:
      MissingDataError, CorruptDataError: as `files.read`.
      ValueError: no such speaker.

    Source: Jackson et al., Free Spoken Digit Dataset (2018); CC BY-SA 4.0.
    """
    if held_out not in SPEAKERS:
        raise ValueError(f"got the speaker {held_out!r}; legal is one of {', '.join(SPEAKERS)}")
    parts: tuple[list, list] = [], []
    for name, wav in archive.recordings(files.read("spoken_digits")["recordings"]).items():
        digit, speaker, _ = name.split("_")
        parts[speaker == held_out].append((sound.pcm16(wav, RATE), int(digit), SPEAKERS.index(speaker)))
    return Spoken(*map(_recordings, parts))


def _recordings(found: list[tuple[np.ndarray, int, int]]) -> Recordings:
    sounds, digits, speakers = zip(*found, strict=True)
    return Recordings(sounds, np.array(digits, np.int32), np.array(speakers, np.int32))


def strings(
    recordings: Recordings,
    chosen: Sequence[Sequence[int] | np.ndarray],
    random: np.random.Generator,
    seconds: float,
    stretch: float = 0.0,
    masked: int = 0,
) -> dict[str, np.ndarray]:
    """Strings of spoken digits: recordings one after the other, with 0.05 to 0.15 seconds of silence round each.

    Each band of each string is shifted and scaled to mean 0 and deviation 1 over the string: what is the same in all of
    it is the microphone and the voice.

    Args:
      recordings: of single digits.
      chosen: for each string which recordings, at most six; those that would end after `seconds` are left out.
      random: draws silences, speeds and the noise under all (−40 dB: a digital silence tells where a recording ends).
      seconds: of every string; what is left over is padding.
      stretch: each string is played faster or slower by up to this share, as if by a smaller or taller speaker.
      masked: twice, up to so many neighbouring bands of each string are set to 0 (Park et al., SpecAugment, 2019).

    Returns:
      mel float32 [B, T, 40]; frames int32 [B], the first so many of which are no padding; digits int32 [B, 6];
      length int32 [B], the first so many of which are no padding.
    """
    whole = round(seconds * RATE)
    wave_BxN = random.normal(scale=1e-3, size=(len(chosen), whole)).astype(np.float32)
    digits_BxL = np.zeros((len(chosen), LONGEST), np.int32)
    length_B, end_B = np.zeros((2, len(chosen)), np.int32)
    for row, picks in enumerate(chosen):
        speed = 1 + random.uniform(-stretch, stretch)
        silences = (random.uniform(0.05, 0.15, LONGEST + 1) * RATE).astype(int)
        at = silences[0]
        for place, pick in enumerate(picks):
            digit = played(recordings.sound[pick], speed)
            if at + len(digit) + silences[place + 1] > whole:
                break
            wave_BxN[row, at : at + len(digit)] += 0.1 * digit / np.sqrt(np.square(digit).mean() + 1e-12)
            at += len(digit) + silences[place + 1]
            digits_BxL[row, place] = recordings.digit[pick]
            length_B[row] = place + 1
        end_B[row] = at
    mel_BxTxM = sound.log_mel(wave_BxN, RATE)
    frames_B = np.minimum(end_B // round(sound.HOP * RATE), mel_BxTxM.shape[1]).astype(np.int32)
    for row, frames in enumerate(frames_B):
        heard = mel_BxTxM[row, :frames]
        mel_BxTxM[row] = (mel_BxTxM[row] - heard.mean(0, keepdims=True)) / (heard.std(0, keepdims=True) + 1e-3)
        mel_BxTxM[row, frames:] = 0
        for bands in random.integers(masked + 1, size=2):
            first = random.integers(sound.BANDS - bands + 1)
            mel_BxTxM[row, :, first : first + bands] = 0
    return {"mel": mel_BxTxM, "frames": frames_B, "digits": digits_BxL, "length": length_B}


def played(recording: np.ndarray, speed: float) -> np.ndarray:
    """A recording at another speed, by linear interpolation; higher where it is faster."""
    places = np.arange(0, len(recording) - 1, speed)
    return np.interp(places, np.arange(len(recording)), recording).astype(np.float32)
