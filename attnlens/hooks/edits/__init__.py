"""Interventions on heads and streams while a model runs; composable, printable, saved as JSON."""

from attnlens.hooks.edits.base import Edit, HeadEdit, StreamEdit
from attnlens.hooks.edits.editor import Editor
from attnlens.hooks.edits.heads import Identity, Mean, Scale, Uniform, Zero
from attnlens.hooks.edits.maps import Bias, Drop, Hide
from attnlens.hooks.edits.means import MeanZ
from attnlens.hooks.edits.patches import Patch, PatchStream, Steer, SteerStream
from attnlens.hooks.edits.saved import edits_from_json, edits_to_json

__all__ = [
    "Bias",
    "Drop",
    "Edit",
    "Editor",
    "HeadEdit",
    "Hide",
    "Identity",
    "Mean",
    "MeanZ",
    "Patch",
    "PatchStream",
    "Scale",
    "Steer",
    "SteerStream",
    "StreamEdit",
    "Uniform",
    "Zero",
    "edits_from_json",
    "edits_to_json",
]
