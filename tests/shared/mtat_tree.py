"""A small folder in MagnaTagATune's exact layout with synthetic audio.

Also a script: python tests/shared/mtat_tree.py FOLDER [AN_MP3_TO_ADD]
"""

import gzip
import shutil
import sys
from pathlib import Path

import soundfile

from musicgenre.datasets.synthetic import STYLES, render_clip

SAMPLE_RATE = 16000
STYLE_TAGS = {
    "pulsar": ("techno", "electronic", "beat", "drums"),
    "quartz": ("techno", "electronic", "drums", "fast"),
    "lantern": ("guitar", "strings", "slow", "ambient"),
    "thicket": ("guitar", "strings", "fast"),
    "harbour": ("beat", "slow", "electronic"),
    "ferrous": ("rock", "guitar", "drums", "fast"),
    "velvet": ("piano", "rock", "drums", "beat"),
    "tundra": ("ambient", "slow", "electronic"),
    "carousel": ("classical", "strings", "piano"),
    "cascade": ("classical", "piano", "beat"),
}
# The column order of the table; every tag is one of MTAT's most frequent fifty.
TAGS = "piano rock ambient slow drums beat techno guitar classical strings fast electronic"


def make_mtat_tree(
    root: str | Path,
    *,
    clips: int = 96,
    seconds: float = 3.0,
    seed: int = 0,
    audio: bool = True,
    quoted: bool = True,
    empty: int = 0,
    real_clip: str | Path | None = None,
) -> Path:
    """Writes folders 0-9, a-f with mp3s (16 kHz, mono) and the label table; returns `root`.

    Two clips are one track. The tracks are in ten styles in turn, and every ten tracks are in other
    folders: the first ten in 0-b, the next in c, the next in d-f, all others in 0-b. So 60 clips
    are enough for every tag in every split of the "clean" protocol, which for 96 clips has
    56 / 20 / 20.

    Args:
      root: the folder; created if needed.
      clips: an even number.
      seconds: length of a clip, an integer number of seconds.
      seed: of the music.
      audio: whether the mp3s are written, or the table alone.
      quoted: the original form of the table, or the gzipped one without quotes and with its tags
        by frequency.
      empty: number of further clips, in folder 0, whose mp3 is empty.
      real_clip: an mp3 that is copied into folder e, with the tags techno and electronic.
    """
    root = Path(root)
    rows: list[tuple[str, tuple[str, ...]]] = []
    length = round(seconds)
    for track in range(clips // 2):
        style, number = list(STYLES)[track % 10], track // 10
        folder = {1: "c", 2: "def"[track % 3]}.get(number, "0123456789ab"[track % 12])
        name = f"{folder}/the_{style}_{number}-made_up-{track + 1:02d}-piece_{track}"
        paths = [f"{name}-{begin}-{begin + length}.mp3" for begin in (0, length)]
        rows += [(path, STYLE_TAGS[style]) for path in paths]
        if audio:
            (root / folder).mkdir(parents=True, exist_ok=True)
            samples = render_clip(style, seed, 2.0 * length, SAMPLE_RATE, number)
            for path, part in zip(paths, samples.reshape(2, -1), strict=True):
                options = {"subtype": "MPEG_LAYER_III", "format": "MP3"}
                soundfile.write(root / path, part, SAMPLE_RATE, **options)
    for number in range(empty):
        rows.append((f"0/nobody-nothing-01-silence_{number}-0-{length}.mp3", ("slow",)))
        if audio:
            (root / "0").mkdir(parents=True, exist_ok=True)
            (root / rows[-1][0]).touch()
    if real_clip:
        rows.append((f"e/{Path(real_clip).name}", ("techno", "electronic")))
        (root / "e").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real_clip, root / rows[-1][0])
    _write_table(root, rows, quoted)
    return root


def _write_table(root: Path, rows: list[tuple[str, tuple[str, ...]]], quoted: bool) -> None:
    tags, mark = TAGS.split(), '"' if quoted else ""
    if not quoted:
        tags.sort(key=lambda tag: -sum(tag in own for _, own in rows))
    table = [["clip_id", *tags, "mp3_path"]]
    for i, (path, own) in enumerate(rows):
        # The ids have gaps and more digits later: their order as numbers is not that as text.
        table.append([str(2 + 7 * i), *("01"[tag in own] for tag in tags), path])
    lines = ["\t".join(f"{mark}{field}{mark}" for field in row) + "\n" for row in table]
    root.mkdir(parents=True, exist_ok=True)
    if quoted:
        (root / "annotations_final.csv").write_text("".join(lines), encoding="utf-8")
    else:
        (root / "annotations_final.csv.gz").write_bytes(gzip.compress("".join(lines).encode()))


if __name__ == "__main__":
    print(make_mtat_tree(sys.argv[1], empty=1, real_clip=(sys.argv[2:] or [None])[0]))
