"""The runtime wing: packed models run in integer arithmetic. NumPy, safetensors and Pillow; never PyTorch."""
