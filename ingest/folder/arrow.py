"""pyarrow's compute functions under a name that type checkers ask no questions about: pyarrow makes them as it is imported."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
