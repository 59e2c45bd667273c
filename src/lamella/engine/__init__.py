"""Engine: request admission, scheduling, steps on the device, and outputs."""
