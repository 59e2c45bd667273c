"""The faults that `mutate.py` must see noticed, the tests of the vLLM plugin, and the faults that change nothing.

A fault is located by its function and an expression in it, so that moved and renamed files do not lose it. `where` is a
part of the path, needed where several modules have a function of this name.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    function: str
    old: str
    new: str
    where: str = ""


LISTED = (
    # ops: windows, chunks, taps, heads
    Fault("attend", "keys <= queries - window", "keys < queries - window", "attention/reference"),
    Fault("attend", "keys > queries", "keys >= queries", "attention/reference"),
    Fault("attend", "keys < queries // chunk * chunk", "keys <= queries // chunk * chunk", "attention/reference"),
    Fault("attend", "repeat_interleave(group, dim=1)", "repeat(1, group, 1)", "attention/reference"),
    Fault("paged_attention", "position - window + 1", "position - window + 2", "attention/reference"),
    Fault("pieces", "position // chunk * chunk", "(position - 1) // chunk * chunk"),
    Fault("seen_blocks", "start += count", "start += count + 1"),
    Fault("_decode", "seen = min(seen, window)", "seen = min(seen, window - 1)", "attention/sdpa"),
    Fault("_decode", "back <= behind", "back < behind", "attention/sdpa"),
    Fault("_attend", "distance < window", "distance <= window", "attention/sdpa"),
    Fault("_cache_rows", "positions % block_size", "(positions + 1) % block_size"),
    Fault("short_conv", "batch.positions >= offset", "batch.positions >= offset - 1", "short_conv/reference"),
    Fault("short_conv", "taps[:, width - 1 - offset]", "taps[:, offset]", "short_conv/reference"),
    Fault("short_conv", "local >= offset", "local > offset", "short_conv/reference"),
    Fault("_next_history", "batch.seq_lens[:, None] - 1", "batch.seq_lens[:, None]", "short_conv/reference"),
    Fault("rotate", "first * cos - second * sin", "first * cos + second * sin", "rotary/reference"),
    Fault("temperature", "(positions + 1) // floor_scale", "positions // floor_scale", "rotary/reference"),
    Fault("angles", "positions % period", "positions", "rotary/reference"),
    Fault("delta_rule", "v[token].float() - kept", "v[token].float()", "delta_rule/reference"),
    Fault("l2_norm", ".sum(-1, keepdim=True)", ".mean(-1, keepdim=True)"),
    Fault("selective_scan", "+ d.float() * x_fp32[token]", "+ x_fp32[token]", "selective_scan/reference"),
    Fault("route", "chosen.sigmoid()", "chosen.softmax(-1)", "moe/reference"),
    Fault("RaggedBatch.from_lengths", "if n != 1", "if n > 2"),
    Fault("rms_norm", "mean(-1, keepdim=True) + eps", "mean(-1, keepdim=True)", "rms_norm/reference"),
    Fault("_decode_prepared", "(channels + PAIRS) % (2 * PAIRS)", "(channels + 1) % (2 * PAIRS)", "triton_decode_few"),
    Fault("_decode_prepared", "newest = index == first + count - 1", "newest = index == first", "triton_decode_few"),
    Fault("_plan_kernel", "whole = tl.maximum(counts - 1, 0)", "whole = tl.maximum(counts, 0)"),
    # layers
    Fault("Attention.forward", "q.float() * positions.temperature(self.temperature)[:, None, None]", "q.float()"),
    Fault(
        "Attention.normalize",
        "self.q_norm(q).flatten(-2), self.k_norm(k).flatten(-2)",
        "self.k_norm(q).flatten(-2), self.q_norm(k).flatten(-2)",
    ),
    Fault("GatedDeltaNet.core", "self.A_log,\n            self.dt_bias", "self.dt_bias,\n            self.A_log"),
    Fault("RowLinear.forward", "self.group.partition.rank == 0", "True"),
    Fault("SplitHead.forward", "[..., : self.vocab_size]", "[..., : self.vocab_size - 1]"),
    Fault("SplitEmbedding.forward", "input_ids >= self.stop", "input_ids > self.stop"),
    Fault("SplitRMSNorm.forward", "/ self.group.partition.size", ""),
    Fault("_llama3", "(rotations - low) / (high - low)", "(rotations - high) / (high - low)"),
    Fault("_yarn", "base / scaling.factor * (1 - kept)", "base * (1 - kept)", "layers"),
    Fault("MaskedBatch.from_mask", "whole.seq_lens.masked_fill(others, 1)", "whole.seq_lens"),
    Fault("GatheredBatch.scatter", "out[self.tokens] = mixed", "out[: len(mixed)] = mixed"),
    Fault(
        "DecoderLayer.apply_mixer",
        "return mixer(positions, entry), entry.residual",
        "return mixer(positions, entry), residual",
    ),
    # state: bookkeeping, prefixes
    Fault("PagedState.first_visible", "position - self.window + 1", "position - self.window + 2"),
    Fault(
        "PagedState.first_visible", "position // self.chunk * self.chunk", "(position + 1) // self.chunk * self.chunk"
    ),
    Fault("StateManager._start", "self._copies.append((hit.snapshot, slot))", "pass"),
    Fault("StateManager._start", "pool.add_reference(block)", "pass"),
    Fault("StateManager.match", "if snapshot is not None or not self.has_slot_state", "if True"),
    Fault("StateManager.mark_computed", "tokens % self.block_size == 0", "True"),
    Fault(
        "StateManager.mark_computed",
        "expired > allocation.num_freed[index]",
        "expired > allocation.num_freed[index] + 1",
    ),
    Fault("StateManager.peak_blocks", "+ 1)", "- 1)"),
    Fault("StateManager.release", "self.slot_pool.free([allocation.slot])", "pass"),
    Fault("Pool.allocate", "next(iter(self._cached))", "next(reversed(self._cached))"),
    Fault("Pool.touch", "self._cached[entry] = None", "self._cached = {entry: None, **self._cached}"),
    Fault("Pool.free", "self._references[entry] -= 1", "self._references[entry] -= 2"),
    Fault("chain_keys", "block + content(index)", "block"),
    Fault("StateMemory.copy_slots", "_foreach_copy_(targets, sources)", "_foreach_copy_(sources, targets)"),
    # engine: scheduling, steps, ends of requests, sampling
    Fault("Scheduler.schedule", "len(self.running) < self.max_num_seqs", "len(self.running) <= self.max_num_seqs"),
    Fault("Scheduler._lookup_keys", "request.num_tokens - 1", "request.num_tokens"),
    Fault("Scheduler._lookup_keys", "if request.needs_prompt_logprobs", "if False"),
    Fault("Scheduler._preempt_youngest", "request.num_computed = 0", "pass"),
    Fault("Scheduler._preempt_youngest", "self.waiting.appendleft(request)", "self.waiting.append(request)"),
    Fault("Scheduler._chunk_size", "stop = stop // size * size", "pass"),
    Fault("StepInputs.fill", 'arrays["query_start_loc"][used + 1 :] = tokens + 1 + np.arange(num_padding)', "pass"),
    Fault("StepInputs.fill", "blocks * size + positions % size", "blocks * size + (positions + 1) % size"),
    Fault("StepInputs.fill", 'arrays["slots"][used:] = slots, 0', 'arrays["slots"][used:] = slots, 1'),
    Fault("StepInputs.fill", "request.num_in_flight:", "False:"),
    Fault("RequestRows.slot", "self._allocations[slot] is not allocation", "self._allocations[slot] is None"),
    Fault("Engine._launch", "self.memory.copy_slots(copies)", "pass"),
    Fault("Admission.make_job", "seed=seed + index", "seed=seed"),
    Fault("Placements.assign", "variant.placement, job.salt", "variant.placement"),
    Fault("Placements.assign", "variant.placement, job.salt", "job.salt"),
    Fault("DecodeGraphs.replay", "(self._buffer + 1) % _BUFFERS", "self._buffer"),
    Fault("Completion._append", "params.stop_token_ids or ()", "()"),
    Fault("Completion._append", "count >= request.max_tokens", "count > request.max_tokens"),
    Fault("Completion.append_prompt_logprobs", "len(self.prompt_logprobs) - start", "0"),
    Fault("IncrementalDetokenizer._find_stop", "old - len(stop) + 1", "old"),
    Fault("uniform", "(step + 1) * _GOLDEN", "_GOLDEN"),
    Fault("process_logits", "y > 0, y / repetition, y * repetition", "y > 0, y * repetition, y / repetition"),
    Fault("process_logits", "frequency * count", "frequency * used"),
    Fault("_truncate", "before < top_p * total", "before <= top_p * total"),
    Fault("_truncate", "clamp_(min=1)", "clamp_(min=0)"),
    Fault(
        "_score", "(logprobs > logprob).sum(-1, keepdim=True) + 1", "(logprobs >= logprob).sum(-1, keepdim=True) + 1"
    ),
    # distributed: what a rank holds
    Fault("Partition.even", "self.rank * part, (self.rank + 1) * part", "0, part"),
    Fault("Partition.kv_heads", "self.rank * full // self.size", "self.rank"),
    Fault("Partition.nearly_even", "min(self.rank, more)", "self.rank"),
    Fault("StepDecoder.decode", "request.num_in_flight = in_flight", "pass"),
    Fault("StepEncoder._new_tokens", "request.output_token_ids[start:]", "request.output_token_ids[start + 1 :]"),
    # checkpoint: names, rows, scales
    Fault("ParameterLayout.tensors", "self.splits[1:]), start, stop)", "self.splits[1:]), 0, rows.size)"),
    Fault("rename", "range(longest, 0, -1)", "range(1, longest + 1)"),
    Fault("check_names", "sorted(expected - present)", "[]"),
    Fault("check_names", "sorted(present - expected - redundant - leftovers)", "[]"),
    Fault("check_shape", "shape != target.shape", "False"),
    Fault("Scales._spread", "index // block", "index % block"),
    Fault("Scales.dequantize", "value -= ", "value += "),
    Fault("Linear.dense_weight", "type(method).apply is DenseMethod.apply", "True"),
    Fault("MethodChooser.choose", "if any(name not in", "if all(name not in"),
    Fault("SafetensorsFolder.opened", "if name in handles", "if False"),
    Fault("_is_newer", "changed > max(others)", "changed < min(others)"),
    Fault("KeyRules.why_ignored", "if _is_one_of(value, values)", "if True"),
    # failures: roll-back, numbers
    Fault("StateManager.roll_back", "pool.drop_key(key)", "pass"),
    Fault("StateManager.confirm_copies", "self._copying.clear()", "pass"),
    Fault("Engine._launch", "self.state.confirm_copies()", "pass"),
    Fault("ModelRunner.reset", "leave_batch()", "pass"),
    Fault("Completion._drop_interrupted", "del tokens[self._num_appended :]", "pass"),
    Fault("Choice.read", "if not isfinite(highest)", "if highest != highest"),
    Fault("_ordered", 'float("inf")', 'float("-inf")'),
    Fault(
        "placeholder_tokens",
        "[(-1 - input_ids).clamp(min=0)].clamp(min=0)",
        "[(-1 - input_ids).clamp(min=0)]",
        "sampling/reference",
    ),
    Fault("checked_int", "number > high", "number > high + 1"),
    # parity: the judge itself
    Fault("_ratio", "if not math.isfinite(floor)", "if False"),
    Fault("_kl", "p == -torch.inf", "p != -torch.inf"),
    Fault("compare_scores", "(ours.delta.abs() <= limit)", "(ours.delta.abs() >= limit)"),
    Fault("_jackknife", "(count - 1) / count", "1 / count"),
    # the plugin
    Fault(
        "StateMetadata._make_batch",
        "positions, token_request = lengths - 1, index",
        "positions, token_request = lengths, index",
    ),
    Fault("StateMetadata._make_batch", "right=True", "right=False"),
    Fault("StateLayer.compute", "out[count:].zero_()", "pass"),
    Fault("VllmStateModule.current", "start += padded_bytes(spec)", "start += spec.bytes_per_request + 16"),
    Fault("VllmKit.merged_linear", "start += width", "start += 0"),
    Fault("WeightFiller.fill", "expected - seen", "set()"),
    Fault("WeightFiller.fill", "if name in seen", "if False"),
    Fault("VllmAttention.__init__", "per_layer_sliding_window=window", "per_layer_sliding_window=None"),
)

# The plugin's own files run by these, in this order, until one notices the fault.
VLLM_TESTS = (
    "tests/vllm_plugin/test_plugin_state.py",
    "tests/vllm_plugin/test_plugin_loading.py",
    "tests/vllm_plugin/test_plugin_checks.py",
    "tests/vllm_plugin/test_plugin_contract.py",
    "tests/vllm_plugin/test_plugin_registration.py",
    "tests/vllm_plugin/test_plugin_engine.py::test_prompts_in_one_batch_with_any_chunks",
    "tests/vllm_plugin/test_plugin_engine.py::test_cached_prefixes",
    "tests/vllm_plugin/test_plugin_engine.py::test_compiled",
    "tests/vllm_plugin/test_plugin_apriel2.py::test_chunks_batches_and_reuse",
    "tests/vllm_plugin/test_plugin_apriel2.py::TestSupernet",
    "tests/vllm_plugin/test_plugin_llama4.py::test_chunks_and_batches",
    "tests/vllm_plugin/test_plugin_llama4_experts.py",
)

# (function, old, new, which of the equal expressions of the function, from 0) -> why nothing can notice it.
EQUIVALENT: dict[tuple[str, str, str, int], str] = {
    ("Checkpoint.has_own_head", "<=", "<", 0): "a model has more tensors than the embedding and the head",
    ("SharedEngine.exclusive", "time.sleep(_PAUSE_SECONDS)", "pass", 0): "other threads get the lock later",
    ("linear", "==", "!=", 0): "the size of a tile changes the speed only",
    ("finish", "==", "!=", 1): "programs that run one after the other combine the parts again until all are there",
}
