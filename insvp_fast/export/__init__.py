"""Models as files that run without this package, or keep its operations: ``export_model`` writes, ``load`` reads.

graph.py captures a model, with preprocessing.py before it; onnx.py, openvino.py and programs.py write and load the
formats; facts.py is what every file says of itself; parity.py compares a file with the model.
"""

from insvp_fast.export.facts import ExportedModel, Facts
from insvp_fast.export.formats import FORMATS, export_model, load
from insvp_fast.export.parity import Loss, Parity, measure_loss

__all__ = ["FORMATS", "ExportedModel", "Facts", "Loss", "Parity", "export_model", "load", "measure_loss"]
