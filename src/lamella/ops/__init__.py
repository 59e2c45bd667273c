"""Operations on tensors: each a package with a plain fp32 `reference` and the fast paths that must agree with it.

No operation waits for the device: sizes that a path needs on the host come with the `RaggedBatch`.
"""
