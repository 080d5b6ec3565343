"""From a forward pass and its losses to labels: capture, derivatives, verification."""

from bayesagg.reading.batch import Batch, Labels, Part
from bayesagg.reading.hooks import Call, Capture, Slot, flatten, unflatten
from bayesagg.reading.reader import Reader

__all__ = ["Batch", "Call", "Capture", "Labels", "Part", "Reader", "Slot", "flatten", "unflatten"]
