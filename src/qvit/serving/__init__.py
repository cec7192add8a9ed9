"""Packed models behind HTTP: one process, several engines. Needs the extra ``serve``, and no PyTorch."""
