"""Autoformer: decomposition and auto-correlation in place of attention (Wu et al., NeurIPS 2021, arXiv:2106.13008).

A series is split into a trend, its moving average, and a seasonal rest, again and again inside the network. Rows are
mixed by delays: the correlation of queries and keys over time, by Fourier transforms, says which delays match, and the
values are rolled by the best ones and averaged. In training a batch shares its delays; else each series has its own.

The embedding of the calendar has the five features of the released code's `timeF` in minutes (minute, hour, weekday,
day of the month, month instead of day of the year), each from -0.5 to 0.5.

Legend: B windows, L rows, C channels, D width, H heads.
"""

from __future__ import annotations

from arcore.catalog import System

SYSTEM = System(
    name="autoformer",
    title="Autoformer",
    paper="arXiv:2106.13008",
    paper_title="Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting",
    topic="series",
    kind="model",
    model="Autoformer",
    recipe="forecasting",
    summary="Encoder and decoder that mix rows by delays found by auto-correlation and split off trends.",
    claim="Correlations by FFT are the direct ones, delays are multiples of the period, trend and season add up.",
    checked_on="real data",
    reported="a relative improvement of 38 % in squared error on six benchmarks",
)
