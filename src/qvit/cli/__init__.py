"""The ``qvit`` command."""
