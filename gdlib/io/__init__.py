"""Every file contract of the project: who writes what, where, in which type.

| file | content |
|---|---|
| samples `.h5` | per sample: `image` (C, [Z,] Y, X) uint8/uint16/float32, |
| | `label` ([Z,] Y, X) uint32, 0 = background; |
| | where some voxels do not count, `ignore` ([Z,] Y, X) bool; |
| | attributes `source` and, if known, `voxel_size_nm` |
| predictions `.h5` | per sample: `affinity` (K, [Z,] Y, X) uint8 = round(255 a), |
| | `foreground` ([Z,] Y, X) uint8 |
| segmentations `.h5` | per sample: `label` ([Z,] Y, X) uint32, consecutive |
| weights `.safetensors` | parameters; the header holds one JSON text with all that is needed |
| | to run the network alone |
| beside them `.int8.safetensors` | OpenVINO's form of the same network in 8 bits, as bytes |
| exported `.onnx` | a graph; one of its metadata holds the same JSON text |
| history, metrics `.csv` | long form |

All writers are atomic: a file either is complete or does not exist. Equal content gives equal
bytes, so that a file that is written again does not re-run what depends on it. What was damaged
later is noticed when it is read (compressed and checked pieces in HDF5, checksums in weights and
states), and nothing in a file is executed or leads to another file.
"""

from gdlib.io.failures import ACCESS, SPACE, DataError, WriteError, writing
from gdlib.io.files import atomic, atomic_folder, beside, code_sha256, sha256, write_text
from gdlib.io.hdf5 import (
    BLOCK,
    HDF5_SUFFIXES,
    check_file,
    check_inside,
    create_h5,
    h5_file,
    is_hdf5,
    open_h5,
    put,
    readable,
    split_h5_path,
)
from gdlib.io.onnx import EXPORTED, is_onnx, onnx_session
from gdlib.io.samples import Sample, read_array, read_attrs, read_samples, sample_ids, write_samples
from gdlib.io.tables import HISTORY_COLUMNS, METRIC_COLUMNS, write_rows
from gdlib.io.weights import (
    HEADER,
    INT8_OF,
    PLUGINS,
    check_header,
    check_trusted,
    int8_beside,
    load_arrays,
    load_state,
    load_weights,
    read_header,
    save_state,
    save_weights,
)

__all__ = [
    "ACCESS",
    "BLOCK",
    "EXPORTED",
    "HDF5_SUFFIXES",
    "HEADER",
    "HISTORY_COLUMNS",
    "INT8_OF",
    "METRIC_COLUMNS",
    "PLUGINS",
    "SPACE",
    "DataError",
    "Sample",
    "WriteError",
    "atomic",
    "atomic_folder",
    "beside",
    "check_file",
    "check_header",
    "check_inside",
    "check_trusted",
    "code_sha256",
    "create_h5",
    "h5_file",
    "int8_beside",
    "is_hdf5",
    "is_onnx",
    "load_arrays",
    "load_state",
    "load_weights",
    "onnx_session",
    "open_h5",
    "put",
    "read_array",
    "read_attrs",
    "read_header",
    "read_samples",
    "readable",
    "sample_ids",
    "save_state",
    "save_weights",
    "sha256",
    "split_h5_path",
    "write_rows",
    "write_samples",
    "write_text",
    "writing",
]
