"""Write the embeddings of sound files: what the network knows of a file before its last layer.

musicgenre embed album/ --out=album.npz

The file holds `path` [files], `embedding` float32 [files, d], and with --windows also `window_file` (row of the file),
`window_start`, `window_end` (seconds) and `window_embedding` [windows, d].
"""

import argparse
from typing import TYPE_CHECKING, Any

from musicgenre.cli.files import Tally, add_files, add_model, expand, load_tagger

if TYPE_CHECKING:
    from musicgenre.inference.windows import WindowScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_files(parser)
    add_model(parser)
    parser.add_argument("--out", required=True, help="the .npz file")
    parser.add_argument("--windows", action="store_true", help="the embedding of every window, too")


def run(arguments: argparse.Namespace) -> int:
    """Embeds every file; returns 3 where some failed, 2 where all did."""
    import numpy as np

    from musicgenre.errors import UserError
    from musicgenre.files import replacing

    if not arguments.out.endswith(".npz"):
        raise UserError(f"--out={arguments.out}: the name must end in .npz.")
    tally = Tally()
    files = expand(arguments.files, tally)
    paths: list[str] = []
    embeddings: list[np.ndarray] = []
    windows: list[WindowScores] = []
    if files:
        tagger = load_tagger(arguments)
        for scores in tagger.scores(
            files, step=tagger.model.frames, keep_windows=arguments.windows
        ):
            if scores.error:
                tally.fail(scores.error)
                continue
            if scores.embedding is None or not scores.embedding.size:
                raise UserError(
                    f"{arguments.model}: this network sows no embedding; see README, 'Your own network'."
                )
            tally.done += 1
            paths.append(scores.path)
            embeddings.append(scores.embedding)
            if scores.windows is not None:
                windows.append(scores.windows)
    if paths:
        arrays: dict[str, Any] = {"path": np.array(paths), "embedding": np.stack(embeddings)}
        if windows:
            arrays["window_file"] = np.repeat(
                np.arange(len(windows)), [len(part.starts) for part in windows]
            )
            arrays["window_start"] = np.concatenate([part.starts for part in windows])
            arrays["window_end"] = np.concatenate([part.ends for part in windows])
            arrays["window_embedding"] = np.concatenate([part.embeddings for part in windows])
        with replacing(arguments.out) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    return tally.exit_code()
