"""Measurements, and the search for faster tiles."""
