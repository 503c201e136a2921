"""dvq-rt: a runtime for image generators that code images by their content, a dynamic number of tokens or of places.

>>> import dvq_rt
>>> samples = dvq_rt.Generator().sample(n=4, labels="faces", seed=1)
>>> samples.grid().save("faces.png")
"""

from dvq_rt import packages  # noqa: F401  first, because importing it refuses a stranger named runtimes
from dvq_rt.codes import Codes, load_codes, save_codes
from dvq_rt.generator import Generator, Preview, Samples, Score
from dvq_rt.sampling import SamplingParams
from runtimes.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    DvqError,
    EngineError,
    ExportError,
    InputError,
)

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CheckpointError",
    "Codes",
    "ConfigError",
    "DataError",
    "DvqError",
    "EngineError",
    "ExportError",
    "Generator",
    "InputError",
    "Preview",
    "Samples",
    "SamplingParams",
    "Score",
    "load_codes",
    "save_codes",
]
