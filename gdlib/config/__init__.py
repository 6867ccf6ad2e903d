"""The configuration as frozen, typed objects. Torch-free: Snakemake parses it again for every job.

It is a catalogue (what exists) and studies (named selections of it: what to run), in the files of
`gdlib.config.parts`. A study may shrink a recipe but never changes what a name means. A run is
(dataset, network, method, seed); `Config.run` gathers all that its training needs, and nothing
else, so that an edit of the configuration re-runs exactly what depends on it.
"""

from gdlib.config.catalogue import SEGMENTERS, TEACHER, Config, load
from gdlib.config.mistakes import ConfigError
from gdlib.config.recipe import Recipe
from gdlib.config.sections import RunSpec

__all__ = ["SEGMENTERS", "TEACHER", "Config", "ConfigError", "Recipe", "RunSpec", "load"]
