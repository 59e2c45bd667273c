"""What layers remember between steps: specs, allocators and the tensors behind them."""
