"""Synthetic sound files for the benchmarks."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from musicgenre.datasets.synthetic import STYLES, render_clip

RENDERED_STYLES = tuple(STYLES)[:4]


@dataclasses.dataclass(frozen=True)
class FileType:
    """A type of sound file: suffix without dot, rate in Hz, channels."""

    ending: str
    rate: int
    channels: int

    def __str__(self) -> str:
        return f"{self.ending}, {self.rate} Hz, {self.channels} ch"


WAV, MP3 = FileType("wav", 22_050, 1), FileType("mp3", 44_100, 2)


def write_clips(folder: Path, types: Sequence[FileType], count: int, seconds: float) -> list[Path]:
    """Writes clips of alternating types and returns their paths.

    Four clips per type are rendered, one in each of four styles; the others are copies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number in range(count):
        file_type, rendered = types[number % len(types)], number // len(types)
        paths.append(folder / f"{number:05d}.{file_type.ending}")
        if rendered >= len(RENDERED_STYLES):
            shutil.copy(paths[-1 - len(RENDERED_STYLES) * len(types)], paths[-1])
            continue
        style = RENDERED_STYLES[rendered]
        mono = render_clip(style, seed=0, seconds=seconds, sample_rate=file_type.rate)
        sides = [mono, np.roll(mono, 441)][: file_type.channels]
        soundfile.write(paths[-1], np.stack(sides, axis=1), file_type.rate)
    return paths
