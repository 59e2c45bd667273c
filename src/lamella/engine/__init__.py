"""From requests to tokens: scheduling, state, steps on the device, text."""
