"""Float models become quantized ones: convert, calibrate, distil."""
