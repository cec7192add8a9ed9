"""A pytest plugin for ``make test-sanitize``: qvit._kernels is the module that QVIT_SANITIZED_KERNELS names."""

from __future__ import annotations

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("qvit._kernels", os.environ["QVIT_SANITIZED_KERNELS"])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["qvit._kernels"] = module
spec.loader.exec_module(module)
