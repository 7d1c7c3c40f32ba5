__version__ = "0.1.0"

from . import versions as _versions  # reads the sources before any of them is loaded
