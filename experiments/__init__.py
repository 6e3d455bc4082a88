"""The research commands, one short main per file; `musicgenre <command>` runs the same code."""
