"""Time series and tables that grow in time."""
