"""eSpeak NG through ctypes: text to 16 kHz audio with no system package (the `synthesis` extra)."""

from __future__ import annotations

import _ctypes
import ctypes
import threading
from pathlib import Path

import numpy as np

from lors.errors import InputError

__all__ = ["VOICES", "speak"]

# The natural-sounding among eSpeak NG's variants: no robots, no whispers, no jokes. Left out besides: f2, f3, f5,
# Alicia, caleb, sandro and victor, all that set `breath`: their samples change from process to process (eSpeak then
# reads memory that nothing wrote).
VOICES = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f4 Alex Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario "
    "Michael Mike adam anika antonio aunty belinda benjamin boris david ed edward gustave ian iven john linda marcelo "
    "max michel miguel norbert pablo paul pedro quincy rob robert shelby steph travis zac"
).split()

_AUDIO_OUTPUT_SYNCHRONOUS, _CHARS_UTF8, _RATE, _PITCH = 2, 1, 1, 3
_DONT_EXIT = 0x8000  # without its data, eSpeak would else end the whole process
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


_lock = threading.Lock()


def speak(text: str, language: str, voice: str, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """Say `text`: ((samples,) float32, sample rate). Same arguments, same samples, from any thread.

    `voice` is one of `VOICES`, `pitch` is 0 to 99. An unknown language or voice raises InputError.
    """
    if voice not in VOICES:  # eSpeak would take its default voice without a word
        raise InputError(f"the synthetic corpus has no voice {voice!r}: choose from {', '.join(VOICES)}")
    try:
        import espeakng_loader
    except ImportError as error:
        raise InputError(
            "the synthetic corpus needs eSpeak NG, which is not installed: run `pip install 'lors[synthesis]'`"
        ) from error
    chunks: list[np.ndarray] = []

    def receive(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int | None) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    # eSpeak keeps phases and flutter from one utterance to the next, even over espeak_Terminate, and has no call that
    # resets them: only loading the library anew (8 ms) makes an utterance independent of those before it.
    with _lock:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            # It wants the folder that holds `espeak-ng-data`, not that folder.
            parent = str(Path(espeakng_loader.get_data_path()).parent)
            rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, parent.encode(), _DONT_EXIT)
            if rate <= 0:
                raise InputError(f"eSpeak NG did not start from {parent}: reinstall the `espeakng-loader` package")
            callback = _CALLBACK(receive)
            library.espeak_SetSynthCallback(callback)
            if library.espeak_SetVoiceByName(f"{language}+{voice}".encode()) != 0:
                raise InputError(f"eSpeak NG does not speak {language!r}: choose another language for the corpus")
            library.espeak_SetParameter(_RATE, words_per_minute, 0)
            library.espeak_SetParameter(_PITCH, pitch, 0)
            data = text.encode()
            library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
    samples = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int16)
    return samples.astype(np.float32) / 32768.0, rate
