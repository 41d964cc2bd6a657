"""Rows, splits and tokens: from the user's data to what the engine trains on."""

from softprompt.data.prepare import SPLITS, PreparedData, as_text, data_key, find_prepared, load_prepared, prepare
from softprompt.data.rows import read_file
from softprompt.data.tokens import Encoded, encode_inputs, encode_labels, encode_targets, render

__all__ = [
    "SPLITS",
    "Encoded",
    "PreparedData",
    "as_text",
    "data_key",
    "encode_inputs",
    "encode_labels",
    "encode_targets",
    "find_prepared",
    "load_prepared",
    "prepare",
    "read_file",
    "render",
]
