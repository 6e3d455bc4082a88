"""The genre in a sound file's own tags, read and written with mutagen; the original stays whole whatever fails."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mutagen
from mutagen.id3 import ID3, TCON

from musicgenre.errors import UserError
from musicgenre.files import replacing


def read_genre(path: str | os.PathLike[str]) -> list[str]:
    """Returns the genres that a file's tags name.

    Raises:
      UserError: the file is missing, or of a format that has no such tags.
    """
    return _genres(_opened(Path(path)))


def write_genre(path: str | os.PathLike[str], genres: Sequence[str]) -> None:
    """Sets the genres in a file's tags.

    A copy beside the file is changed, read back, and takes its place only then. A link stays a link.

    Args:
      path: mp3, flac, ogg, opus, wav or aiff.
      genres: what replaces the old ones.

    Raises:
      UserError: the format has no such tags, or the file cannot be written; it is as it was before.
    """
    path = Path(os.path.realpath(path))
    # By its name and not by the copy's, which has another ending.
    kind = type(_opened(path))
    with replacing(path) as temporary:
        shutil.copy2(path, temporary)
        try:
            file = kind(temporary)
            if file.tags is None:
                file.add_tags()
            if isinstance(file.tags, ID3):
                file.tags.setall("TCON", [TCON(encoding=3, text=list(genres))])
            else:
                file.tags["GENRE"] = list(genres)
            file.save()
            kept = _genres(kind(temporary))
        except mutagen.MutagenError as error:
            raise UserError(
                f"{path}: its tags cannot be written ({error}); the file is unchanged."
            ) from error
        if kept != list(genres):
            raise UserError(
                f"{path}: its tags do not keep the genre {', '.join(genres)}; the file is unchanged."
            )


def _opened(path: Path) -> Any:
    try:
        file = mutagen.File(path)
    except mutagen.MutagenError as error:
        raise UserError(f"{path}: its tags cannot be read ({error}).") from error
    if file is None:
        raise UserError(f"{path}: a file of this format has no genre tag that can be written.")
    return file


def _genres(file: Any) -> list[str]:
    if file.tags is None:
        return []
    if isinstance(file.tags, ID3):
        return [genre for frame in file.tags.getall("TCON") for genre in frame.genres]
    return [str(genre) for genre in file.tags.get("GENRE", [])]
