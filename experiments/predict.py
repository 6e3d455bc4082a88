r"""Another name of `musicgenre tag`, whose flag --model is also called --workdir.

musicgenre predict --workdir=runs/conv1d song.mp3 album/ --top=3
musicgenre predict --workdir=runs/conv1d --format=csv --out=labels.csv album/
"""

from musicgenre.cli import app
from musicgenre.cli.tag import ARGUMENTS, FLAGS, main

__all__ = ["ARGUMENTS", "FLAGS", "main"]

if __name__ == "__main__":
    app.run(__name__)
