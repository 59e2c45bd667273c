"""Operations on tensors: each a package with a plain fp32 `reference` and the fast paths that must agree with it.

No operation waits for the device: sizes that a path needs on the host come with the `RaggedBatch`.
But for the plain torch forms of recurrent mixers, which read the lengths of prompts where no kernel serves.
"""
