"""The door between the wings: a quantized model becomes a file."""
