"""HTML report: one well-formed, self-contained page that no content can break."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lamella.parity.report.html import render

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta"}


class Page(HTMLParser):
    """Check that every tag is closed correctly; record tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.shown))

    def count(self, tag: str) -> int:
        return sum(tag == name for name, _ in self.tags)


def summary(scale: float = 1.0) -> dict[str, Any]:
    return {
        "n": 2288,
        "bias": 0.00021 * scale,
        "bias_error": 0.00034,
        "rms": 0.0163 * scale,
        "p50": 0.0074 * scale,
        "p95": 0.0335 * scale,
        "p99": 0.0528 * scale,
        "p999": 0.0911 * scale,
        "max": 0.1437 * scale,
        "kl_mean": 0.000173 * scale,
        "kl_max": 0.0021,
        "agreement": 0.9943,
        "flips": 13,
        "near_tie_flips": 12,
    }


def bisect_row(site: str, layer: int | None, op: str, ratio: float) -> dict[str, Any]:
    return {
        "site": site,
        "layer": layer,
        "op": op,
        "max": 0.043 * ratio,
        "rms": 0.0061 * ratio,
        "relative": 0.0031 * ratio,
        "explained": 0.0061,
        "ratio": ratio,
        "out_of_line": ratio > 3,
        "position": 5,
        "channel": 37,
    }


def bisect_rows(layers: int = 4) -> list[dict[str, Any]]:
    """Rows that are correct up to layer 2, whose rotary embedding is wrong."""
    ops = (
        ("mixer_norm", "norm"),
        ("qkv", "projection"),
        ("rope", "rope"),
        ("mixer", "attention"),
        ("mlp", "feed_forward"),
    )
    rows = [
        bisect_row(f"layers.{layer}.{site}", layer, op, 35.2 if (layer, op) == (2, "rope") else 0.8 + 0.03 * index)
        for layer in range(layers)
        for index, (site, op) in enumerate(ops)
    ]
    return [bisect_row("embedding", None, "embedding", 0.0), *rows, bisect_row("lm_head", None, "projection", 1.1)]


def path_cell(path: str, status: str, error: float | None, why: str | None = None) -> dict[str, Any]:
    return {
        "path": path,
        "status": status,
        "why": why,
        "bitwise": None if error is None else error == 0,
        "logprob_max": error,
        "logprob_rms": None if error is None else error / 9,
        "agreement": None if error is None else 1 - error,
        "state_max": error,
        "state_worst": "layers.1.cache.key" if error else None,
    }


def token(delta: float, **given: Any) -> dict[str, Any]:
    return {
        "sequence": 3,
        "position": 17,
        "phase": "decode 3",
        "token": 12345,
        "text": " token",
        "context": "a line\nand the next",
        "context_ids": list(range(40, 70)),
        "reference_logprob": -2.5,
        "engine_logprob": -2.5 + delta,
        "delta": delta,
        "reference_top": 501,
        "engine_top": 502,
        **given,
    }


def full_report() -> dict[str, Any]:
    """Return a report with data in every section."""
    bell = [round(400 * math.exp(-(((i - 22) / 6) ** 2))) for i in range(36)]
    return {
        "verdict": "fail",
        "noise_floor_ratio": 0.8312,
        "reasons": ["decode 3: the bias 0.012 is beyond 0.01"],
        "model": "lamella/tiny-canon",
        "architecture": "LlamaCanon",
        "config_hash": "9f31c0de",
        "engine": "lamella",
        "oracle": "hf",
        "dtype": "bfloat16",
        "reference_dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "inputs": {
            "source": "bundled text",
            "sequences": 16,
            "predictions": 2288,
            "prompt_len": 128,
            "decode_len": 16,
            "vocabulary": "whole",
        },
        "versions": {
            "lamella": "0.1.0",
            "torch": "2.13.0",
            "transformers": None,
            "python": "3.11.2",
            "commit": "0123abc",
        },
        "tolerances": {"noise_floor_ratio": 1.25, "bias": 0.01},
        "stats": {
            "noise_floor_ratio": 0.8312,
            "noise_floor_ratio_error": 0.021,
            "p999_ratio": 0.913,
            "engine": summary(),
            "engine_prefill": summary(0.97),
            "engine_decode": summary(1.1),
            "floor": {"eager": summary(1.2), "sdpa": summary(1.15)},
            "positions": [{"step": step, **summary(1 + 0.01 * step)} for step in range(16)],
            "slope": {"per_step": 0.00012, "standard_error": 0.00031},
            "curve": [
                {
                    "start": start,
                    "stop": start + 16,
                    "engine_rms": 0.0163 + 0.002 * math.sin(start),
                    "floor_rms": 0.0191 + 0.002 * math.cos(start),
                }
                for start in range(0, 144, 16)
            ],
            "histogram": {
                "edges": [10 ** (-5 + 5 * i / 36) for i in range(37)],
                "engine": bell,
                "floor": [2 * count for count in (*bell[2:], 0, 0)],
            },
            "outliers": {"limit": 0.1, "count": 4, "share": 0.0017},
        },
        "worst_tokens": [token(-0.1437), token(0.12, text=None, context=None), token(0.11, engine_top=501)],
        "paths": {
            "limits": {"logprob_max": 0.05},
            "cells": [
                path_cell("batch of one", "pass", 0.0),
                path_cell("chunked, cut at 3", "fail", 0.0817),
                path_cell("compiled", "unavailable", None, why="no compiler here"),
            ],
        },
        "bisect": {"first": bisect_rows()[13], "rows": bisect_rows(), "plan": "8 + 5 + 1 + 1 tokens"},
        "free_running": {
            "positions": [
                {"step": step, "n": 64 - step, "match": 0.95, "mean": 0.04, "p50": 0.01, "p95": 0.11, "max": 0.4}
                for step in range(4)
            ],
            "overall": {
                "match": 0.9312,
                "mean": 0.0415,
                "std": 0.0611,
                "p10": 0.002,
                "p50": 0.013,
                "p90": 0.08,
                "p95": 0.12,
                "p99": 0.31,
                "max": 0.44,
                "outliers": 3,
                "outlier_share": 0.0029,
                "outliers_same_text": 1,
            },
            "hazard": 0.0164,
        },
        "seconds": 12.34,
    }


def without_numbers(value: Any, replacement: float | None) -> Any:
    """Return the same report with every float replaced by NaN or None."""
    if isinstance(value, dict):
        return {key: without_numbers(item, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [without_numbers(item, replacement) for item in value]
    return replacement if isinstance(value, float) else value


SECTIONS = {
    "stats": ("Error against position", "Distribution of the error", "Summary"),
    "paths": ("Execution paths",),
    "bisect": ("Layer by layer",),
    "worst_tokens": ("Worst tokens",),
    "free_running": ("Free running",),
    "tolerances": ("Tolerances",),
}


def test_page_is_well_formed_and_whole() -> None:
    source = render(full_report())
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert page.count("svg") == 3
    for titles in SECTIONS.values():
        assert all(title in page.text for title in titles)


def test_page_needs_nothing_else() -> None:
    source = render(full_report())
    for reference in ("http://", "https://", "<script", "<link", "<img", "@import", "url(", " src=", " href="):
        assert reference not in source
    assert "default-src 'none'" in source.replace("&#x27;", "'")


def test_numbers_are_on_the_page() -> None:
    text = Page(render(full_report())).text
    for number in (
        "0.83 ± 0.02",  # ratio
        "2.1e-4 ± 3.4e-4",  # bias
        "13 (12)",  # flips
        "0.0817",  # a path
        "99.43 %",  # agreement
        "4 (0.17 %)",  # outliers
        "-0.144",  # the worst token
        "1.64 %",  # hazard
        "1.25",  # a tolerance
    ):
        assert number in text
    assert "2,288 predictions" in text
    assert "decode 15" in text
    assert "transformers" not in text
    assert "decode 3: the bias 0.012 is beyond 0.01" in text


def test_status_is_in_words_too() -> None:
    text = Page(render(full_report())).text
    for words in ("✗ fail", "✓ pass", "○ unavailable", "no compiler here", "✗ out of line"):
        assert words in text


def test_bisect_names_the_first_that_is_out_of_line() -> None:
    report = full_report()
    assert "First out of line: layer 2, rope , position 5, channel 37" in Page(render(report)).text
    report["bisect"] = {"first": None, "rows": [row for row in bisect_rows() if not row["out_of_line"]], "plan": "8"}
    text = Page(render(report)).text
    assert "The error of every sub-block is in line with rounding" in text
    assert "out of line" not in text


@pytest.mark.parametrize("field", ["text", "context", "phase"])
def test_hostile_text_of_a_token_is_escaped(field: str) -> None:
    report = full_report()
    report["worst_tokens"] = [token(-0.1, **{field: HOSTILE})]
    source = render(report)
    assert HOSTILE in Page(source).text
    assert "<script" not in source


def test_hostile_model_name_is_escaped() -> None:
    source = render({**full_report(), "model": f'"{HOSTILE}', "reasons": [HOSTILE], "oracle": f"'\">{HOSTILE}"})
    assert HOSTILE in Page(source).text
    assert "<script" not in source


def test_characters_that_show_nothing_are_made_visible() -> None:
    report = full_report()
    report["worst_tokens"] = [token(-0.1, text="\u202eevil\x00\ud800", context="one\ntwo\tthree")]
    source = render(report)
    assert "one↵two⇥three" in source
    assert r"\u202eevil\u0000\ud800" in source
    source.encode()


def test_token_without_text_shows_ids() -> None:
    report = full_report()
    report["worst_tokens"] = [token(-0.1, text=None, context=None)]
    assert "… 58 59 60 61 62 63 64 65 66 67 68 69 12345" in Page(render(report)).text


@pytest.mark.parametrize("name", SECTIONS)
def test_section_without_data_is_left_out(name: str) -> None:
    report = full_report()
    report[name] = [] if name == "worst_tokens" else {} if name == "tolerances" else None
    text = Page(render(report)).text
    for other, titles in SECTIONS.items():
        assert all((title in text) == (other != name) for title in titles)


def test_passing_report_of_the_headline_alone() -> None:
    report = {**full_report(), **dict.fromkeys(SECTIONS), "noise_floor_ratio": None, "verdict": "pass", "reasons": []}
    text = Page(render(report)).text
    assert "✓ pass" in text
    assert "What was compared" in text
    assert "Why it fails" not in text
    assert "noise floor ratio" not in text


@pytest.mark.parametrize("replacement", [math.nan, math.inf, -math.inf, None])
def test_broken_numbers_are_shown_as_such(replacement: float | None) -> None:
    page = Page(render(without_numbers(full_report(), replacement)))
    assert "noise floor ratio n/a" in page.text
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    assert not re.search(
        r"\b(nan|inf|None)\b", " ".join(str(value) for _, given in page.tags for value in given.values())
    )


def test_one_broken_number_leaves_the_others_drawn() -> None:
    report = full_report()
    report["stats"]["curve"][4]["engine_rms"] = None
    (path,) = (given for tag, given in Page(render(report)).tags if tag == "path" and given["class"] == "curve engine")
    assert path["d"] is not None
    assert path["d"].count("M") == 2


def test_errors_of_many_magnitudes_get_a_logarithmic_axis() -> None:
    def labels() -> set[str]:
        shown = Page(render(report)).shown
        return set(shown[shown.index("Error against position") : shown.index("Distribution of the error")])

    report = full_report()
    assert labels() >= {"0", "0.005", "0.01", "0.015", "0.02"}
    report["stats"]["curve"][-1]["engine_rms"] = 7.0
    assert labels() >= {"0.01", "0.1", "1", "10"}
    assert "0.005" not in labels()


def test_engine_without_decode_or_error() -> None:
    """Prefill alone, bitwise equal to the reference."""
    report = full_report()
    report["stats"] |= {"engine_decode": None, "slope": None, "positions": []}
    report["stats"]["curve"] = [{"start": 0, "stop": 16, "engine_rms": 0.0, "floor_rms": 0.0}]
    report["stats"]["histogram"] = {"edges": [1e-6, 1e-5, 1e-4], "engine": [0, 0], "floor": [0, 0]}
    assert "Per decode step" not in Page(render(report)).text


def test_report_is_not_changed() -> None:
    report = full_report()
    before = copy.deepcopy(report)
    render(report)
    assert report == before
