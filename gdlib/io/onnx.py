"""Networks as ONNX files of `gdlib export`: one JSON text with all that is needed to use them, and
a graph, which is run by ONNX Runtime.
"""

import json
from pathlib import Path
from typing import Any

from gdlib.io.failures import DataError
from gdlib.io.hdf5 import check_file

SUFFIX = ".onnx"
KEY = "gdlib"  # of the metadata, for the header of the weights
EXPORTED = "gdlib.json"  # the same as a file, in what is exported to an archive


def is_onnx(path: Path | str) -> bool:
    """Is this the name of an ONNX file?"""
    return Path(path).suffix.lower() == SUFFIX


def onnx_session(path: Path | str, threads: int = 1, *, optimised: bool = True) -> Any:
    """Open an ONNX file.

    Args:
        path: of the file.
        threads: of a run.
        optimised: not where nothing is to be run.

    Returns:
        An `onnxruntime.InferenceSession` on the CPU.

    Raises:
        DataError: the file cannot be used, or ONNX Runtime is not installed.
    """
    check_file(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError(
            f'{path}: ONNX files are run by ONNX Runtime: pip install "gdlib[export]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it logs, it also raises
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable ONNX file ({cause}); export it again") from error


def read_onnx_header(path: Path | str) -> dict[str, Any]:
    """Return the header of the weights that an ONNX file was made of.

    Raises:
        DataError: the file is damaged, or of another program.
    """
    about = onnx_session(path, optimised=False).get_modelmeta().custom_metadata_map
    try:
        header = json.loads(about.get(KEY, "null"))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DataError(
            f"{path}: this ONNX file was not written by `gdlib export`: nothing in it says what "
            "its "
            "outputs mean; run it with the program it is from, or export weights of gdlib"
        )
    return header
