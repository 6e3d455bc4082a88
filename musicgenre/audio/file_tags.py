"""The genre in a sound file's own tags, read and written with mutagen."""

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
    """Returns the genres in a file's tags.

    Raises:
      UserError: the file is missing, or its format has no genre tag.
    """
    return _genres(_open(Path(path)))


def write_genre(path: str | os.PathLike[str], genres: Sequence[str]) -> None:
    """Sets the genres in the tags of an mp3, flac, ogg, opus, wav or aiff file.

    A copy of the file is changed and read back, and then replaces the file. A link stays a link.

    Raises:
      UserError: the format has no genre tag, or the file cannot be written; it is unchanged.
    """
    path = Path(os.path.realpath(path))
    # mutagen goes by the file's ending, and the copy has another one.
    file_type = type(_open(path))
    with replacing(path) as temporary:
        shutil.copy2(path, temporary)
        try:
            file = file_type(temporary)
            if file.tags is None:
                file.add_tags()
            if isinstance(file.tags, ID3):
                file.tags.setall("TCON", [TCON(encoding=3, text=list(genres))])
            else:
                file.tags["GENRE"] = list(genres)
            file.save()
            kept = _genres(file_type(temporary))
        except mutagen.MutagenError as error:
            reason = f"its tags cannot be written ({error}); the file is unchanged."
            raise UserError(f"{path}: {reason}") from error
        if kept != list(genres):
            raise UserError(f"{path}: its tags do not keep the genre {', '.join(genres)}.")


def _open(path: Path) -> Any:
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
    return list(map(str, file.tags.get("GENRE", [])))
