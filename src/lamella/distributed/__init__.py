"""One model on several devices of one host: who holds what of it, and the processes that compute together."""
