"""Operations (ops) on tensors: each is a package with a plain fp32 `reference` and fast backends that must match it.

Ops do not wait for the device: `RaggedBatch` has the sizes that backends need on the host. The exceptions are the
plain torch backends of recurrent mixers, which read the lengths of prompts on the host.
"""
