"""Real data and weights of Python packages. Nothing is downloaded; a missing one is named with its command."""

from arcore.data.real.files import package_file
from arcore.data.real.records import (
    Icon,
    Pronunciation,
    airport_places,
    airport_weather,
    co2,
    departures,
    elnino,
    flights,
    glucose,
    icons,
    pronunciations,
    regional_departures,
    sea_temperature,
    stock_prices,
    sunspots,
)
from arcore.data.real.weights import PACKAGED, SHORT, PackagedWeights, gguf_tokenizer, packaged_weights

__all__ = [
    "PACKAGED",
    "SHORT",
    "Icon",
    "PackagedWeights",
    "Pronunciation",
    "airport_places",
    "airport_weather",
    "co2",
    "departures",
    "elnino",
    "flights",
    "gguf_tokenizer",
    "glucose",
    "icons",
    "package_file",
    "packaged_weights",
    "pronunciations",
    "regional_departures",
    "sea_temperature",
    "stock_prices",
    "sunspots",
]
