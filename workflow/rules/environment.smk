"""What jobs may use and how they are started, for both workflows; `ROOT`, the folder of the project, is set before."""

import json
import math
import os
import shlex
import sys

from gdlib.devices import has_nvidia

# A network's job asks for a GPU where there is one. Where there is none it asks for nothing but its threads, and students
# train side by side on the cores. On the head node of a cluster: --set-resources train_student:gpu=1 and so on.
GPU = int(has_nvidia())
# Such a job counts as one core and goes first: were it to wait for several cores to be free at once, a queue of jobs without
# a GPU would leave the GPU idle.
THREADS = 1 if GPU else 8

# Jobs are `python -m gdlib step ...` with this interpreter and this copy of gdlib, whether or not the environment is
# activated. With --use-conda a rule's own environment goes before this PATH; PYTHONPATH it removes, hence the prefix.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()])
)
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={shlex.quote(ROOT)}${{{{PYTHONPATH:+:$PYTHONPATH}}}}; "
    # A cluster kills jobs at their time limit, so they stop before it and save; on this machine they have all the time.
    + ("export CLUSTER_JOB=1; " if workflow.remote_exec else "")
)


def compact(value):
    """JSON that is equal for equal content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def option(name, value):
    """A part of a command that is only there if there is a value."""
    return [name, str(value)] if value else []


def grow(amount):
    """More of a resource at every attempt (see --retries)."""
    return lambda wildcards, attempt: math.ceil(amount) * attempt


def of_blocks(folder, names):
    """The files of these blocks in a folder."""
    return [f"{folder}/{name}.h5" for name in names]
