"""Images token after token, in raster or another order."""
