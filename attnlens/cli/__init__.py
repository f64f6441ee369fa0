"""The command line, thin: commands, texts, progress, the main job and where its files go."""

from attnlens.cli.app import main

__all__ = ["main"]
