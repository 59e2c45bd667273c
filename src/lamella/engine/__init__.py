"""From prompts to tokens: requests, scheduling, steps on the device, sampling, text."""
