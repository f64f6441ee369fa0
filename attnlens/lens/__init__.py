"""Lens = model + tokenizer + anatomy: run (keep tensors), measure (stream statistics), edit."""

from attnlens.lens.inputs import Batch, Inputs
from attnlens.lens.lens import Lens
from attnlens.lens.load import load
from attnlens.lens.trace import SiteTensors, Statistics, Trace

__all__ = ["Batch", "Inputs", "Lens", "SiteTensors", "Statistics", "Trace", "load"]
