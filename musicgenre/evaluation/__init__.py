"""Metrics, intervals, leakage audit and report. Takes arrays, not models or stores."""
