"""Sound as numpy arrays: a WAVE file read, and the log-mel features of a speech recogniser. All of it is float32."""

from __future__ import annotations

import functools
import io
import wave

import numpy as np
import scipy.fft

WINDOW, HOP, BANDS = 0.025, 0.010, 40
"""Seconds of a window, seconds from one to the next, mel bands: what recognisers have used since HTK."""


def pcm16(wav: bytes, rate: int) -> np.ndarray:
    """A mono WAVE file of 16-bit samples: float32 [samples] in [-1, 1).

    Raises:
      ValueError: it is no such file, or has another rate.
    """
    try:
        with wave.open(io.BytesIO(wav)) as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            samples = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"it is no WAVE file ({error})") from error
    if found != (1, 16, rate):
        raise ValueError(f"got {found[0]} channels of {found[1]} bits at {found[2]} Hz; legal is 1 of 16 at {rate}")
    return np.frombuffer(samples, "<i2").astype(np.float32) / 32768


def log_mel(sound_BxN: np.ndarray, rate: int) -> np.ndarray:
    """The logarithm of the energy in each mel band of each window, a Hann window over a power spectrum: float32 [B, T, 40].

    Energies are squares and span ten powers of ten, and 1e-6, which keeps the logarithm finite, is under the smallest
    normal float16: so no half precision here, whatever the policy. The rest of the sound, shorter than a hop, is left out.

    Source: Davis and Mermelstein, Comparison of Parametric Representations for Monosyllabic Word Recognition (1980).
    """
    width, hop = round(WINDOW * rate), round(HOP * rate)
    window_BxTxW = np.lib.stride_tricks.sliding_window_view(sound_BxN, width, axis=-1)[:, ::hop]
    size = 1 << (width - 1).bit_length()
    spectrum_BxTxF = scipy.fft.rfft(window_BxTxW * np.hanning(width).astype(np.float32), size)
    power_BxTxF = np.square(spectrum_BxTxF.real) + np.square(spectrum_BxTxF.imag)
    flat_NxM = power_BxTxF.reshape(-1, power_BxTxF.shape[-1]) @ mel_filters(rate, size)  # one product, not one a row
    return np.log(flat_NxM + np.float32(1e-6)).reshape(*power_BxTxF.shape[:2], BANDS)


@functools.cache
def mel_filters(rate: int, size: int) -> np.ndarray:
    """Triangles over the bins of a spectrum of `size` samples, evenly spaced in mel from 60 Hz to half the rate: [F, 40].

    mel(f) = 2595 log10(1 + f / 700), as O'Shaughnessy has it (1987).
    """
    lowest, highest = (2595 * np.log10(1 + f / 700) for f in (60.0, rate / 2))
    edge_M2 = 700 * (10 ** (np.linspace(lowest, highest, BANDS + 2) / 2595) - 1)
    bin_Fx1 = np.arange(size // 2 + 1)[:, None] * rate / size
    rising = (bin_Fx1 - edge_M2[None, :-2]) / (edge_M2[1:-1] - edge_M2[:-2])[None]
    falling = (edge_M2[None, 2:] - bin_Fx1) / (edge_M2[2:] - edge_M2[1:-1])[None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
