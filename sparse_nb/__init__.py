__version__ = "0.2.0"

from .study import versions as _versions  # reads the sources before any of them is loaded
