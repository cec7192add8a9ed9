"""The training wing's modules: quantizer, linear layers, rectifiers, attention."""
