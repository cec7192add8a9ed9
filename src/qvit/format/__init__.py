"""The packed file: header, entries, codes. No PyTorch here."""
